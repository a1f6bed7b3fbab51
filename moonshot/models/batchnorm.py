"""Batch-norm statistics that fit the pruned model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from moonshot.models.calibration import Batch, CalibrationError
from moonshot.models.modules import evaluating, hooked, replaced
from moonshot.models.ranks import ALONE, Ranks
from moonshot.models.recording import counting


@torch.no_grad()
def reestimate(
    model: nn.Module,
    batches: list[Batch],
    forward: Callable[[nn.Module, Batch], Any],
    parts: Sequence[nn.Module] = (),
    ranks: Ranks = ALONE,
) -> None:
    """Set every batch norm's running mean and variance to those of its inputs over all batches, in place.

    forward: (model, batch) -> anything, runs the model; the model is in eval mode meanwhile.
    parts: modules that run once each in a pass, none inside another. What they return for each batch is remembered, so
    that those that have no layer left to estimate need not run again: faster, for the memory.
    ranks: those that have a share of the batches each, the first rank one of at least one.

    Layers are taken in the order in which the model calls them, each one's inputs computed with the new statistics of
    those before. The variance is the unbiased one. So the result does not depend on how the samples are batched, and
    each statistic is that of the model as it will run; for this the batches are run once for each layer, up to it.
    A layer that the model does not call, or without running statistics, is left alone.

    Raises CalibrationError for no batches, and for a layer that sees one value of each channel, NaN or infinity. If it
    fails, all statistics are as they were before.
    """
    running = {layer: buffers for layer in model.modules() if (buffers := _running(layer))}
    if not running:
        return
    if not batches and ranks.is_first:
        raise CalibrationError("the calibration data is empty: give at least one sample")
    names = {layer: name for name, layer in model.named_modules()}
    before = [(buffer, buffer.clone()) for buffer in running_statistics(model)]
    with evaluating(model):
        try:
            with counting(running) as order:
                if ranks.is_first:
                    forward(model, batches[0])
            finished: list[_Results] = [{} for _ in batches]
            layers = {name: layer for layer, name in names.items()}
            for name, calls in ranks.broadcast({names[layer]: calls for layer, calls in order.items()}).items():
                layer, moments = layers[name], _Moments()
                for batch, results in zip(batches, finished, strict=True):
                    more = _run_until(layer, calls, moments, model, batch, forward, parts, results)
                    if calls == 1:  # so that every layer in what ran before it has its new statistics
                        results.update(more)
                moments.add_up(ranks)
                for buffer, estimate in zip(running[layer], moments.result(name), strict=True):
                    buffer.copy_(estimate)
        except BaseException:
            for buffer, original in before:
                buffer.copy_(original)
            raise


@torch.no_grad()
def estimate_in_one_pass(
    model: nn.Module,
    batches: list[Batch],
    forward: Callable[[nn.Module, Batch], Any],
    ranks: Ranks = ALONE,
) -> None:
    """As `reestimate`, roughly, at the price of one pass: the mean over the batches of each batch's own statistics.

    Every batch norm's inputs come from layers that normalise by the batch, so the result depends on how the samples are
    batched: for comparing many models, not for keeping one. ranks: those that have a share of the batches each.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and _running(layer)]
    before = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    try:
        for layer in layers:
            layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=_running(layer)[0].device)
            layer.momentum = None  # torch's spelling of a plain mean over the batches
            layer.train()
        for batch in batches if layers else []:
            forward(model, batch)
    finally:
        for layer, momentum, tracked in before:
            layer.momentum, layer.num_batches_tracked = momentum, tracked
            layer.eval()
    if ranks.count > 1:
        share = len(batches) / sum(ranks.gather(len(batches)))
        for buffer in running_statistics(model):
            buffer.copy_(buffer * share if share else torch.zeros_like(buffer))
        ranks.sum_(running_statistics(model))


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of all batch norms in a model."""
    return [buffer for layer in model.modules() for buffer in _running(layer)]


def has_running_statistics(layer: nn.Module) -> bool:
    """Whether a layer is a batch norm with a running mean and variance."""
    return bool(_running(layer))


def _running(layer: nn.Module) -> list[Tensor]:
    """A batch norm's running mean and variance; empty for one without, and for other layers."""
    if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.running_var is None:
        return []
    return [layer.running_mean, layer.running_var]


class _Moments:
    """Mean and variance of each channel over all that is added, in float64 (Chan, Golub and LeVeque, 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0  # sum of squared deviations from the mean

    def add(self, x: Tensor) -> None:
        """x: (samples, channels, ...)."""
        values = x.double().transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(values, 1, correction=0)
        self._add(values.shape[1], mean, variance * values.shape[1])

    def _add(self, count: int, mean: Tensor | float, squares: Tensor | float) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.squares = self.squares + squares + difference**2 * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def add_up(self, ranks: Ranks) -> None:
        """Add what the other ranks have added, in the same order on each."""
        if ranks.count == 1:
            return
        device = getattr(self.mean, "device", "cpu")
        mine = (self.count, torch.as_tensor(self.mean).cpu(), torch.as_tensor(self.squares).cpu())
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        for count, mean, squares in ranks.gather(mine):
            if count:
                self._add(count, mean.to(device), squares.to(device))

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        if self.count < 2:
            raise CalibrationError(f"{name} sees one value of each channel: give more than one image")
        mean, variance = torch.as_tensor(self.mean), torch.as_tensor(self.squares) / (self.count - 1)
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise CalibrationError(f"{name} sees NaN or infinity: the model is broken before it")
        return mean, variance


class _Reached(Exception):
    """The layer has seen the batch: the rest of the model need not run."""


_Results = dict[nn.Module, Any]  # what parts return for one batch


def _run_until(
    layer: nn.Module,
    calls: int,
    moments: _Moments,
    model: nn.Module,
    batch: Batch,
    forward: Callable,
    parts: Sequence[nn.Module],
    results: _Results,
) -> _Results:
    """Add what the layer sees of one batch to its moments, in as many calls; what other parts returned before them.

    results: of parts that need not run. A batch that does not call the layer so often has none to add.
    """
    left = calls
    finished: _Results = {}

    def record(_layer: nn.Module, arguments: tuple) -> None:
        nonlocal left
        moments.add(arguments[0])
        left -= 1
        if not left:
            raise _Reached

    def keep(part: nn.Module, _arguments: tuple, output: Any) -> None:
        finished[part] = _copied(output)

    forwards = [lambda *_, part=part, **__: _copied(results[part]) for part in results]
    keeping = (part.register_forward_hook(keep) for part in parts if part not in results)
    try:
        with (
            hooked([layer.register_forward_pre_hook(record)]),
            hooked(keeping),
            replaced(list(results), forwards),
        ):
            forward(model, batch)
    except _Reached:
        return finished
    return {}


def _copied(tree: Any) -> Any:
    """A copy of whatever a module returns, which others may change in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
