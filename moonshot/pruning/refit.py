"""What is left of a part, fitted to what the dense part returned.

The surviving weights of a part's layers, with its norms and biases, are fitted by Adam so that the part's output on
the hidden states of the pruned model comes near the dense part's output on those of the dense model. Masks never
change, no labels are needed, and one part is in memory at a time.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.errors import ArgumentError, check_count, check_number
from moonshot.models.batchnorm import running_statistics
from moonshot.models.calibration import (
    Batch,
    CalibrationError,
    batch_samples,
    count_samples,
    real_tokens,
    split,
)
from moonshot.models.expert_view import ExpertView
from moonshot.models.ranks import Ranks
from moonshot.models.replay import Replay
from moonshot.pruning.calibration_pass import Part
from moonshot.pruning.report import PartReport

_BETAS = (0.9, 0.95)  # of Adam
_PATIENCE = 3  # epochs one after the other without gain on the samples set aside, after which a part is done


@dataclass(frozen=True)
class Refit:
    """How each part is fitted once its layers are pruned.

    epochs: passes over the samples that are fitted, at most.
    steps: of an epoch, which share its samples.
    lr: what a step changes in a tensor at most, about, as a fraction of the root mean square of its nonzero values; it
    decays along a cosine.
    fisher: where the objective has gradients, the share of the squared error that is measured by what the loss makes of
    it: by the mean of `g g'` over the loss gradients g at what the part returns. In the rest all channels count alike.
    share: of the samples that is set aside, to stop early and to see whether the part got better.
    stages: how often a part is pruned and fitted, at most. Its nonzeros fall by the same factor each time, up to what
    the pattern asks for (patterns.stages), so that the later masks are chosen among weights that were fitted.
    """

    epochs: int = 12
    steps: int = 12
    lr: float = 0.02
    fisher: float = 0.5
    share: float = 0.25
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "stages"):
            check_count(name, getattr(self, name))
        for name in ("lr", "fisher", "share"):
            check_number(name, getattr(self, name))
        if not 0 < self.lr < math.inf:
            raise ArgumentError(f"lr must be positive, got {self.lr!r}")
        if not 0 <= self.fisher < 1:
            raise ArgumentError(f"fisher must be at least 0 and below 1, got {self.fisher!r}")
        if not 0 < self.share < 1:
            raise ArgumentError(f"share must be between 0 and 1, got {self.share!r}")

    def split(self, batches: list[Batch]) -> list[Batch]:
        """The batches made so small that a step, and what is set aside, can be made of whole ones.

        Raises CalibrationError for a single sample.
        """
        count = count_samples(batches)
        if count < 2:
            raise CalibrationError("a refit sets samples aside and needs at least 2: give more, or do without")
        return split(batches, max(min(self.step_samples(count), int(self.share * count)), 1))

    def step_samples(self, count: int) -> int:
        """How many samples a step has, of `count` in all."""
        return math.ceil((1 - self.share) * count / self.steps)


class PartFit:
    """The fit of an observed part whose layers are pruned, while it is in float32.

    replay: of this rank's batches; each rank differentiates what it has of a step, and all do the same step.
    shared: parameters that others than the part use too, which are left alone.
    on_step: called before each step with its number, from 1, and that of all, at most.
    """

    def __init__(
        self,
        part: Part,
        replay: Replay,
        refit: Refit,
        seed: int,
        shared: set[nn.Parameter],
        ranks: Ranks,
        on_step: Callable[[int, int], None],
    ):
        self._part, self._refit, self._ranks, self._on_step = part, refit, ranks, on_step
        self._supports = _supports(part, shared)
        self._tensors = _tensors(part, self._supports)
        self._data = _Data(part, replay, refit, seed, ranks)

    def values(self) -> list[Tensor]:
        """What is fitted, and what running statistics go with it, in the model's dtype."""
        return [tensor.detach().to(self._part.dtypes[tensor], copy=True) for tensor in self._tensors]

    @torch.no_grad()
    def assign(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.copy_(value)

    def run(self, estimate: Callable[[], None]) -> PartReport:
        """Fit in place; the part is as it was unless its error on the samples set aside gets smaller.

        estimate: estimates the running statistics of the part's batch norms, if it has any.
        """
        begin = time.perf_counter()
        data, before, original = self._data, self._errors(), self.values()
        least, best, lost, halvings, steps = before[1], original, 0, 0, 0
        with _adam(self._part.module, self._supports) as adam:
            for epoch in range(self._refit.epochs):
                groups = data.groups()
                for k, group in enumerate(groups):
                    self._on_step(steps + k + 1, self._refit.epochs * len(groups))
                    decay = (1 + math.cos(math.pi * (epoch + k / len(groups)) / self._refit.epochs)) / 2
                    self._step(adam, group, decay / 2**halvings)
                steps += len(groups)
                estimate()
                error = data.error(data.aside)
                if error < least:
                    least, best, lost = error, self.values(), 0
                else:  # too large steps, or there is nothing left to gain
                    self.assign(best)
                    lost, halvings = lost + 1, halvings + 1
                if lost == _PATIENCE:
                    break
        self.assign(best)
        after = self._errors()
        if not after[1] < before[1]:
            self.assign(original)
            after = before
        self.assign(self._ranks.broadcast(self.values(), device=self._part.device))
        seconds = time.perf_counter() - begin
        return PartReport(self._part.name, before[0], after[0], before[1], after[1], steps, seconds)

    def _step(self, adam: torch.optim.Adam, group: list[int], decay: float) -> None:
        for options in adam.param_groups:
            options["lr"] = self._refit.lr * decay * options["size"]
        self._data.differentiate(group)
        self._sum_gradients()
        for parameter, support in self._supports.items():
            if parameter.grad is not None:
                parameter.grad.mul_(support)
        adam.step()
        adam.zero_grad()

    def _sum_gradients(self) -> None:
        """Add up the gradients that there are on any rank."""
        there = self._ranks.gather([parameter.grad is not None for parameter in self._supports])
        summed = [p for p, ranks in zip(self._supports, zip(*there, strict=True), strict=True) if any(ranks)]
        for parameter in summed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.sum_(parameter.grad for parameter in summed if parameter.grad is not None)

    def _errors(self) -> tuple[float, float]:
        return self._data.error(self._data.fitted), self._data.error(self._data.aside)


def fitted_shapes(part: Part, shared: set[nn.Parameter]) -> list[torch.Size]:
    """The shapes of `PartFit.values`, known before the part's layers are pruned."""
    return [tensor.shape for tensor in _tensors(part, _supports(part, shared))]


def _tensors(part: Part, supports: Iterable[nn.Parameter]) -> list[Tensor]:
    """What a refit changes of a part: the parameters that it fits, and running statistics."""
    return [*supports, *running_statistics(part.module)]


def _supports(part: Part, shared: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """{parameter to fit: True where it may change}: pruned layers where they are not zero, their biases, and norms."""
    supports: dict[nn.Parameter, Tensor] = {}
    for view in part.layers.values():
        parameter = getattr(view.module, view.parameter)
        at = view.expert if isinstance(view, ExpertView) else ...
        supports.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))[at] = parameter[at] != 0
    pruned = {view.module for view in part.layers.values()}
    others = {view.module for view in part.others.values()} - pruned
    for module in part.module.modules():
        for parameter in module.parameters(recurse=False) if module not in others else ():
            if parameter.ndim < 2 and parameter.is_floating_point():
                supports.setdefault(parameter, torch.ones_like(parameter, dtype=torch.bool))
    return {parameter: support for parameter, support in supports.items() if parameter not in shared}


class _Data:
    """What a part reads and should return, in batches to fit and batches set aside: of all ranks, by number.

    The batches of the first rank come first; a rank runs its own.
    """

    def __init__(self, part: Part, replay: Replay, refit: Refit, seed: int, ranks: Ranks):
        self._part, self._replay, self._ranks = part, replay, ranks
        by_rank = ranks.gather([batch_samples(batch) for batch in replay.batches])
        self._before = sum(map(len, by_rank[: ranks.index]))
        self._samples = [samples for of_rank in by_rank for samples in of_rank]
        self._size = refit.step_samples(sum(self._samples))
        self._generator = torch.Generator().manual_seed(seed)
        self.fitted = torch.randperm(len(self._samples), generator=self._generator).tolist()
        self.aside: list[int] = []
        wanted = refit.share * sum(self._samples)
        while len(self.fitted) > 1 and sum(self._samples[b] for b in self.aside) < wanted:
            self.aside.append(self.fitted.pop())
        self._metric = _metric(_over_ranks(replay.output_moment(part.index), ranks), refit.fisher)
        energies = [
            float(self._measured(replay.dense_output(part.index, b), b).double().square().sum())
            for b in range(len(replay.batches))
        ]
        self._energy = [energy for of_rank in ranks.gather(energies) for energy in of_rank]

    def groups(self) -> list[list[int]]:
        """The batches to fit in random order, as many together as a step has samples."""
        groups: list[list[int]] = [[]]
        for k in torch.randperm(len(self.fitted), generator=self._generator).tolist():
            if sum(self._samples[b] for b in groups[-1]) >= self._size:
                groups.append([])
            groups[-1].append(self.fitted[k])
        return groups

    def differentiate(self, group: list[int]) -> None:
        """Add up the gradients of the error of a group, relative to what outputs are in the mean."""
        mean = self._total(self._energy, self.fitted) / self._total(self._samples, self.fitted) or 1.0
        for b in self._own(group):
            with torch.enable_grad():
                error = self._difference(b).square().sum() / (mean * self._total(self._samples, group))
                if error.requires_grad:
                    error.backward()

    @torch.no_grad()
    def error(self, batches: list[int]) -> float:
        """The squared error over batches, relative to the dense outputs."""
        squares = sum(float(self._difference(b).double().square().sum()) for b in self._own(batches))
        return sum(self._ranks.gather(squares)) / (self._total(self._energy, batches) or 1.0)

    def _own(self, batches: list[int]) -> list[int]:
        """Those that are this rank's, as its replay numbers them."""
        own = range(self._before, self._before + len(self._replay.batches))
        return [b - self._before for b in batches if b in own]

    def _difference(self, b: int) -> Tensor:
        dense = self._replay.dense_output(self._part.index, b)
        return self._measured(self._replay.output(self._part.index, b) - dense, b)

    def _measured(self, output: Tensor, b: int) -> Tensor:
        """An output without padded tokens, in coordinates in which all channels count alike."""
        tokens = real_tokens(output, self._replay.batches[b], self._part.decoder)
        if self._metric is None:
            return tokens
        self._metric = self._metric.to(tokens)
        return tokens @ self._metric

    @staticmethod
    def _total(values: list[Any], batches: list[int]) -> Any:
        return sum(values[b] for b in batches)


def _over_ranks(moment: Tensor | None, ranks: Ranks) -> Tensor | None:
    """The sum of what ranks have of a matrix, if any has something."""
    sizes = [size for size in ranks.gather(None if moment is None else len(moment)) if size is not None]
    if not sizes:
        return None
    moment = torch.zeros((sizes[0], sizes[0]), dtype=torch.float64) if moment is None else moment
    ranks.sum_([moment])
    return moment


def _metric(moment: Tensor | None, share: float) -> Tensor | None:
    """L with `L L' = (1 - share) I + share F`, F being a moment (channels, channels) scaled to a mean diagonal of 1.

    None for the identity, also where no gradient was anything but zero.
    """
    if moment is None or not share or not (scale := float(moment.diagonal().mean())) > 0:
        return None
    mixed = moment * (share / scale)
    mixed.diagonal().add_(1 - share)
    return torch.linalg.cholesky(mixed)


@contextmanager
def _adam(part: nn.Module, fitted: Iterable[nn.Parameter]) -> Iterator[torch.optim.Adam]:
    """An Adam on some parameters of a part, the only ones that gradients are computed for inside."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in part.parameters()]
    groups = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in fitted:
            parameter.requires_grad_(True)
            groups.append({"params": [parameter], "size": _size(parameter.detach())})
        yield torch.optim.Adam(groups, betas=_BETAS)
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _size(tensor: Tensor) -> float:
    """The root mean square of what is not zero."""
    values = tensor[tensor != 0].double()
    return float(values.square().mean().sqrt()) if len(values) else 0.0
