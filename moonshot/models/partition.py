"""A model divided into parts that run one after the other, and what is to be known of the layers in them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from moonshot.models.blocks import Chain, find_blocks
from moonshot.models.calibration import Batch, batch_samples, one_by_one, take
from moonshot.models.chain import ChainReplay
from moonshot.models.graph import GraphReplay
from moonshot.models.layers import ExpertView, LayerView, layers_of
from moonshot.models.losses import Loss
from moonshot.models.modules import ModelError, evaluating
from moonshot.models.offload import Offload
from moonshot.models.precision import in_float32, tensors_of
from moonshot.models.replay import Replay
from moonshot.models.roles import heads, routers
from moonshot.models.targets import select
from moonshot.models.trial_run import TrialRun, trial_run

Parts = list[tuple[str, nn.Module]]

_LAYERS = 4  # in a part at most, where it can be divided
_CHAIN = 0.8  # the share of all prunable weights that a chain of blocks must hold
_SAME = 1e-3  # relative difference of the loss through a chain


@dataclass(frozen=True)
class Partition:
    """Parts by name, in the order in which they run, and what is to be known of the layers in them.

    chained: each part reads the one before and nothing else.
    heads: names of the layers that a transformers model has on top of its base model.
    routers: names of the layers that choose among experts, or weigh them.
    unreached: the layers that no sample of any batch reached, in a part or not.
    routed: some layers do not read the same number of rows for every sample, such as experts; samples are then
    replayed one by one, so that all that a layer reads in a batch belongs to one sample, and none of it is padding.
    """

    parts: Parts
    chained: bool
    heads: frozenset[str] = frozenset()
    routers: frozenset[str] = frozenset()
    unreached: dict[str, LayerView] = field(default_factory=dict)
    routed: bool = False

    def layers(self) -> dict[str, LayerView]:
        """{name in the model: layer} of all in the parts, and of those that were not reached."""
        inside = {name: view for prefix, part in self.parts for name, view in layers_of(prefix, part)}
        return self.unreached | inside

    def select(self, targets: str | Iterable[str] | None, ignore: str | Iterable[str]) -> list[str]:
        """The names of the layers to prune (`targets.select`); without targets, all but heads and routers.

        Raises TargetError for an expression that matches nothing.
        """
        left_alone = self.heads | self.routers
        names = [name for name in self.layers() if targets is not None or name not in left_alone]
        return select(names, targets, ignore)

    def check_reached(self, names: Iterable[str]) -> None:
        """Raises ModelError for a layer that no sample reached."""
        if unreached := [name for name in names if name in self.unreached]:
            raise ModelError(
                f"no calibration sample reached {', '.join(unreached)}: leave them out with ignore={unreached}, or "
                'with unreached="skip"'
            )

    def replay(
        self, model: nn.Module, batches: list[Batch], loss: Loss, gradients: bool, offload: Offload
    ) -> Replay:
        kind = ChainReplay if self.chained else GraphReplay
        batches = _samples(model, batches) if self.routed else batches
        return kind(model, self.parts, batches, loss, gradients, offload)


def partition_model(model: nn.Module, batches: list[Batch], loss: Loss) -> Partition:
    """A chain of blocks where the model is one, else the finest parts that run once each, in their order.

    Raises ModelError for a model without weights or layers, or that does not run.
    """
    _check(model)
    views, trials = dict(layers_of("", model)), _Trials(model, loss)
    head = heads(model)
    weights = {name: view.weight.numel() for name, view in views.items() if name not in head}
    if not weights:
        raise ModelError(f"{type(model).__name__} has no Linear or convolutional layer to prune")
    with evaluating(model):
        first = trials.run(take(batches[0], [0]))
        if not first.rows:
            raise ModelError("the loss ran no layer of the model: it must call model")
        routed = any(isinstance(view, ExpertView) for view in views.values()) or trials.differ(
            batches[0], first
        )
        chained = _holds_most(trials.blocks, weights) and _is_chain(
            model, trials.blocks, take(batches[0], [0]), loss, first.loss
        )
        once, reached = first.once, first.reached(views)
        for batch in _samples(model, batches) if routed else batches:
            if len(reached) == len(views) and (chained or not routed):
                break
            run = trials.run(batch)
            once, reached = once & run.once, reached | run.reached(views)
    unreached = {name: view for name, view in views.items() if name not in reached}
    found = routers(model) if routed else frozenset()
    if chained:
        inside = {name for part in trials.blocks for name, _ in layers_of(*part)}
        unreached = {name: view for name, view in unreached.items() if name in inside}
        return Partition(trials.blocks, True, routers=found, unreached=unreached, routed=routed)
    parts = _divided(model, {views[name].module for name in reached}, once, first.order)
    return Partition(parts, False, head, found, unreached, routed)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model is on the meta device and holds no weights: load it first")


class _Trials:
    """Trial runs of one model."""

    def __init__(self, model: nn.Module, loss: Loss):
        self.model, self.loss = model, loss
        self.blocks = find_blocks(model)
        self._views = dict(layers_of("", model))

    def run(self, batch: Batch) -> TrialRun:
        return trial_run(self.model, self.blocks, self._views, batch, self.loss)

    def differ(self, batch: Batch, first: TrialRun) -> bool:
        """Whether layers read other numbers of rows for other samples of the batch than `first`, its first sample."""
        count = batch_samples(batch)
        if count == 1:
            return False
        together = {name: [count * rows for rows in calls] for name, calls in first.rows.items()}
        return self.run(batch).rows != together or any(
            self.run(take(batch, [k])).rows != first.rows for k in range(1, count)
        )


def _samples(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    sequences = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return one_by_one(batches, aligned=not sequences)


def _holds_most(blocks: Parts, weights: Mapping[str, int]) -> bool:
    """Whether the blocks hold most of the weights. weights: how many each layer has."""
    share = sum(weights[name] for block in blocks for name, _ in layers_of(*block) if name in weights)
    return share >= _CHAIN * sum(weights.values())


@torch.no_grad()
def _is_chain(model: nn.Module, blocks: Parts, sample: Batch, loss: Loss, expected: float) -> bool:
    """Whether the blocks, one after the other, turn hidden states of one shape into the model's own loss."""
    chain = Chain(model, [block for _, block in blocks], loss)
    try:
        with in_float32(chain.outside):
            hidden, calls = chain.enter(sample)
            for index, call in enumerate(calls):
                before = hidden.shape
                with in_float32(tensors_of(chain.blocks[index])):
                    hidden = chain.run(index, hidden, call)
                if hidden.shape != before:
                    return False
            with torch.enable_grad():
                found, _ = chain.leave(sample, hidden)
    except (ModelError, TypeError, IndexError, AttributeError, RuntimeError, ValueError):
        return False  # whatever a model does that is no chain
    return abs(found - expected) <= _SAME * max(abs(expected), 1e-6)


def _divided(model: nn.Module, layers: set[nn.Module], once: set[nn.Module], order: list[nn.Module]) -> Parts:
    """The finest parts of a model that run once each, in this order.

    Raises ModelError where not even the whole model does.
    """
    parts = _parts("", model, layers, once)
    if repeated := [name or "the model" for name, part in parts if part not in once]:
        raise ModelError(
            f"{', '.join(repeated)} ran more than once for one loss, or not for every batch: it must call the model "
            "once"
        )
    return sorted(parts, key=lambda part: order.index(part[1]))


def _parts(name: str, module: nn.Module, layers: set[nn.Module], once: set[nn.Module]) -> Parts:
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
