"""Where a model is cut open: segments that run one after the other, and the layers in them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

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
from moonshot.models.calibration import Batch, take
from moonshot.models.chain import ChainReplay
from moonshot.models.graph import GraphReplay
from moonshot.models.layers import LayerView, layers_of
from moonshot.models.recording import counting
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
    unreached: names of the layers that did not run.
    """

    segments: list[tuple[str, nn.Module]]
    chained: bool
    heads: frozenset[str] = frozenset()
    unreached: frozenset[str] = frozenset()

    def layers(self) -> dict[str, LayerView]:
        """{name in the model: layer} of all that can be pruned in the segments."""
        return {name: view for prefix, segment in self.segments for name, view in layers_of(prefix, segment)}

    def replay(self, model: nn.Module, batches: list[Batch], loss: Loss, gradients: bool) -> Replay:
        kind = ChainReplay if self.chained else GraphReplay
        return kind(model, self.segments, batches, loss, gradients)


def cut_open(model: nn.Module, batches: list[Batch], loss: Loss) -> Cut:
    """A chain of blocks where the model is one, else the finest segments that run once each, in their order.

    Raises ModelError for a model without weights or layers, or that does not run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model is on the meta device and holds no weights: load it first")
    heads = _heads(model)
    weights = {name: view.module.weight.numel() for name, view in layers_of("", model) if name not in heads}
    if not weights:
        raise ModelError(f"{type(model).__name__} has no Linear or convolutional layer to prune")
    sample, blocks = take(batches[0], [0]), find_blocks(model)
    with evaluating(model):
        order, expected = _order(model, blocks, sample, loss)
        inside = sum(weights[name] for part in blocks for name, _ in layers_of(*part) if name in weights)
        if inside >= _CHAIN * sum(weights.values()) and _is_chain(model, blocks, sample, loss, expected):
            return Cut(blocks, chained=True)
    position = {module: index for index, module in enumerate(order)}
    segments = sorted(_parts("", model, order), key=lambda part: position[part[1]])
    if repeated := [name or "the model" for name, part in segments if order[part] != 1]:
        raise ModelError(f"{', '.join(repeated)} ran more than once for one loss: it must call the model once")
    unreached = frozenset(name for name, view in layers_of("", model) if view.module not in order)
    return Cut(segments, chained=False, heads=heads, unreached=unreached)


def _heads(model: nn.Module) -> frozenset[str]:
    base = getattr(model, "base_model", model)  # a property of every transformers model
    if base is model:
        embeddings = getattr(model, "get_output_embeddings", lambda: None)()
        return frozenset(name for name, view in layers_of("", model) if view.module is embeddings)
    within = {view.module for _, view in layers_of("", base)}
    return frozenset(name for name, view in layers_of("", model) if view.module not in within)


@torch.no_grad()
def _order(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], sample: Batch, loss: Loss
) -> tuple[dict[nn.Module, int], float]:
    """How often every module runs in one pass, in the order of the first calls, and the loss."""
    with counting(model.modules()) as calls, running_in_float32(model, [block for _, block in blocks]):
        value = loss(model, sample)
    check_loss(value)
    if not any(view.module in calls for _, view in layers_of("", model)):
        raise ModelError("the loss ran no layer of the model: it must call model")
    return calls, float(value)


@torch.no_grad()
def _is_chain(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], sample: Batch, loss: Loss, expected: float
) -> bool:
    """Whether running the blocks one after the other gives the model's own loss."""
    chain = Chain(model, [block for _, block in blocks], loss)
    try:
        hidden, calls = chain.enter(sample)
        for index, call in enumerate(calls):
            with in_float32(held(chain.blocks[index])):
                hidden = chain.run(index, hidden, call)
        with torch.enable_grad():
            found, _ = chain.leave(sample, hidden)
    except (ModelError, TypeError, IndexError, AttributeError, RuntimeError, ValueError):
        return False  # whatever a model does that is no chain
    return abs(found - expected) <= _SAME * max(abs(expected), 1e-6)


def _parts(name: str, module: nn.Module, order: dict[nn.Module, int]) -> list[tuple[str, nn.Module]]:
    """A module divided until a part has few layers that run, or what is in it does not run exactly once."""

    def running(part: nn.Module) -> int:
        return sum(view.module in order for _, view in layers_of("", part))

    once = order.get(module) == 1
    children = [
        (f"{name}.{key}".lstrip("."), child) for key, child in module.named_children() if running(child)
    ]
    if not children or (once and running(module) <= _LAYERS):
        return [(name, module)] if running(module) else []
    parts = [part for child in children for part in _parts(*child, order)]
    divided = all(order.get(part) == 1 for _, part in parts)
    return parts if divided or not once else [(name, module)]
