"""Where a model is cut open: segments that run one after the other, and the layers in them."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from moonshot.models.blocks import (
    Chain,
    Loss,
    ModelError,
    check_loss,
    evaluating,
    find_blocks,
    held,
    in_float32,
    running_in_float32,
)
from moonshot.models.calibration import Batch, batch_samples, one_by_one, take
from moonshot.models.chain import ChainReplay
from moonshot.models.graph import GraphReplay
from moonshot.models.layers import ExpertView, LayerView, layers_of
from moonshot.models.recording import counting, watching
from moonshot.models.scratch import Scratch
from moonshot.models.statistics import LayerStatistics

_LAYERS = 4  # in a segment at most, where it can be divided
_CHAIN = 0.8  # the share of all prunable weights that a chain of blocks must hold
_SAME = 1e-3  # relative difference of the loss through a chain


class Replay(Protocol):
    """A model run segment by segment: `observe` each while it is dense, prune its layers, then `advance`."""

    segments: list[tuple[str, nn.Module]]

    def observe(self, index: int, statistics: LayerStatistics) -> None: ...

    def advance(self, index: int) -> None: ...


@dataclass(frozen=True)
class Cut:
    """Segments by name, in the order of execution, and what is to be known of the layers in them.

    chained: each segment reads the one before and nothing else.
    heads: names of the layers that a transformers model has on top of its base model.
    routers: names of the layers that choose among experts, or weigh them.
    unreached: the layers that no sample of any batch reached, in a segment or not.
    routed: some layers do not read the same number of rows for every sample, such as experts; samples are then
    replayed one by one, so that all that a layer reads in a batch belongs to one sample, and none of it is padding.
    """

    segments: list[tuple[str, nn.Module]]
    chained: bool
    heads: frozenset[str] = frozenset()
    routers: frozenset[str] = frozenset()
    unreached: dict[str, LayerView] = field(default_factory=dict)
    routed: bool = False

    def layers(self) -> dict[str, LayerView]:
        """{name in the model: layer} of all in the segments, and of those that were not reached."""
        inside = {name: view for prefix, segment in self.segments for name, view in layers_of(prefix, segment)}
        return self.unreached | inside

    def replay(
        self, model: nn.Module, batches: list[Batch], loss: Loss, gradients: bool, scratch: Scratch
    ) -> Replay:
        kind = ChainReplay if self.chained else GraphReplay
        batches = _samples(model, batches) if self.routed else batches
        return kind(model, self.segments, batches, loss, gradients, scratch)


def cut_open(model: nn.Module, batches: list[Batch], loss: Loss) -> Cut:
    """A chain of blocks where the model is one, else the finest segments that run once each, in their order.

    Raises ModelError for a model without weights or layers, or that does not run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model is on the meta device and holds no weights: load it first")
    heads, views = _heads(model), dict(layers_of("", model))
    weights = {name: view.weight.numel() for name, view in views.items() if name not in heads}
    if not weights:
        raise ModelError(f"{type(model).__name__} has no Linear or convolutional layer to prune")
    sample, blocks = take(batches[0], [0]), find_blocks(model)
    with evaluating(model):
        first = _run(model, blocks, views, sample, loss)
        if not first.rows:
            raise ModelError("the loss ran no layer of the model: it must call model")
        routed = any(isinstance(view, ExpertView) for view in views.values())
        if not routed and (count := batch_samples(batches[0])) > 1:
            alike = {name: [count * rows for rows in calls] for name, calls in first.rows.items()}
            others = (take(batches[0], [k]) for k in range(1, count))
            routed = _run(model, blocks, views, batches[0], loss).rows != alike or any(
                _run(model, blocks, views, other, loss).rows != first.rows for other in others
            )
        share = sum(weights[name] for part in blocks for name, _ in layers_of(*part) if name in weights)
        chained = share >= _CHAIN * sum(weights.values()) and _is_chain(model, blocks, sample, loss, first.loss)
        once, reached = first.once, first.reached(views)
        for batch in _samples(model, batches) if routed else batches:
            if len(reached) == len(views) and (chained or not routed):
                break
            run = _run(model, blocks, views, batch, loss)
            once, reached = once & run.once, reached | run.reached(views)
    unreached = {name: view for name, view in views.items() if name not in reached}
    routers = _routers(model) if routed else frozenset()
    if chained:
        inside = {name for part in blocks for name, _ in layers_of(*part)}
        unreached = {name: view for name, view in unreached.items() if name in inside}
        return Cut(blocks, True, routers=routers, unreached=unreached, routed=routed)
    parts = _parts("", model, {views[name].module for name in reached}, once)
    if repeated := [name or "the model" for name, part in parts if part not in once]:
        raise ModelError(
            f"{', '.join(repeated)} ran more than once for one loss, or not for every batch: it must call the model "
            "once"
        )
    segments = sorted(parts, key=lambda part: first.order.index(part[1]))
    return Cut(segments, False, heads, routers, unreached, routed)


def _samples(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    sequences = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return one_by_one(batches, aligned=not sequences)


def _heads(model: nn.Module) -> frozenset[str]:
    base = getattr(model, "base_model", model)  # a property of every transformers model
    if base is model:
        embeddings = getattr(model, "get_output_embeddings", lambda: None)()
        return frozenset(name for name, view in layers_of("", model) if view.module is embeddings)
    within = {view.module for _, view in layers_of("", base)}
    return frozenset(name for name, view in layers_of("", model) if view.module not in within)


def _routers(model: nn.Module) -> frozenset[str]:
    """Layers beside a list of experts, alone in their module, with as many outputs as there are experts, or one."""
    found = set()
    for prefix, module in model.named_modules():
        children = [(f"{prefix}.{name}".lstrip("."), child) for name, child in module.named_children()]
        counts = {1, *(_experts(child) for _, child in children)} - {0}
        if len(counts) > 1:
            beside = [list(layers_of(*child)) for child in children if not _experts(child[1])]
            found |= {layers[0][0] for layers in beside if len(layers) == 1 and layers[0][1].shape[0] in counts}
    return frozenset(found)


def _experts(module: nn.Module) -> int:
    """How many experts a module consists of, or may: the length of a list of modules that hold layers."""
    views = [view for _, view in layers_of("", module)]
    if any(isinstance(view, ExpertView) and view.module is module for view in views):
        return int(module.num_experts)  # type: ignore[arg-type]
    return len(module) if views and isinstance(module, nn.ModuleList | nn.ModuleDict) else 0


@dataclass(frozen=True)
class _Run:
    """One pass: the modules in the order of their first calls, those that ran once, the rows of each layer's calls."""

    order: list[nn.Module]
    once: set[nn.Module]
    rows: dict[str, list[int]]
    loss: float

    def reached(self, views: dict[str, LayerView]) -> set[str]:
        """The layers that ran. An expert counts as one where any of its parameter did."""
        ran = {(views[name].module, views[name].parameter) for name in self.rows}
        return {name for name, view in views.items() if (view.module, view.parameter) in ran}


@torch.no_grad()
def _run(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    views: dict[str, LayerView],
    batch: Batch,
    loss: Loss,
) -> _Run:
    rows: dict[str, list[int]] = {}

    def record(name: str, x: Tensor, output: Tensor) -> Tensor:
        rows.setdefault(name, []).append(len(x))
        return output

    parts = [block for _, block in blocks]
    with counting(model.modules()) as calls, watching(views, record), running_in_float32(model, parts):
        value = loss(model, batch)
    check_loss(value)
    return _Run(list(calls), {module for module, count in calls.items() if count == 1}, rows, float(value))


@torch.no_grad()
def _is_chain(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], sample: Batch, loss: Loss, expected: float
) -> bool:
    """Whether the blocks, one after the other, turn hidden states of one shape into the model's own loss."""
    chain = Chain(model, [block for _, block in blocks], loss)
    try:
        with in_float32(chain.outside):
            hidden, calls = chain.enter(sample)
            for index, call in enumerate(calls):
                before = hidden.shape
                with in_float32(held(chain.blocks[index])):
                    hidden = chain.run(index, hidden, call)
                if hidden.shape != before:
                    return False
            with torch.enable_grad():
                found, _ = chain.leave(sample, hidden)
    except (ModelError, TypeError, IndexError, AttributeError, RuntimeError, ValueError):
        return False  # whatever a model does that is no chain
    return abs(found - expected) <= _SAME * max(abs(expected), 1e-6)


def _parts(
    name: str, module: nn.Module, layers: set[nn.Module], once: set[nn.Module]
) -> list[tuple[str, nn.Module]]:
    """A module divided until a part has few layers that run, or what is in it does not run exactly once."""

    def running(part: nn.Module) -> int:
        return sum(view.module in layers for _, view in layers_of("", part))

    children = [
        (f"{name}.{key}".lstrip("."), child) for key, child in module.named_children() if running(child)
    ]
    if not children or (module in once and running(module) <= _LAYERS):
        return [(name, module)] if running(module) else []
    parts = [part for child in children for part in _parts(*child, layers, once)]
    divided = all(part in once for _, part in parts)
    return parts if divided or module not in once else [(name, module)]
