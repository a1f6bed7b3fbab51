"""A pattern for each layer, as `allocate` finds it: what it is, as a table, as a picture."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moonshot.layer.patterns import Pattern
from moonshot.pruning.picture import blank, draw_bars
from moonshot.pruning.report import Trial, unused_samples


@dataclass(frozen=True)
class LayerBudget:
    """What a layer gets.

    shape: (m, d). pattern: its own.
    curve: (sparsity, F / F(0)) of every choice it had, on the dense model's statistics.
    """

    shape: tuple[int, int]
    pattern: Pattern
    curve: list[tuple[float, float]]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the layer."""
        return self.pattern.zeros(self.shape) / math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Allocation(Mapping[str, Pattern]):
    """A pattern for each layer: what `prune` takes as its pattern.

    layers: {name: what the layer gets}.
    budget: the name of the trial that it comes from.
    trials: all that were compared, the even budget first.
    skipped: {name: why it has none and stays dense}, of layers that none of the patterns fits, that no sample reached
    or that cannot be pruned.
    unused: the calibration samples that were left out, with the reason.
    """

    layers: dict[str, LayerBudget]
    budget: str
    trials: list[Trial] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Pattern:
        return self.layers[name].pattern

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all layers."""
        sizes = [math.prod(layer.shape) for layer in self.layers.values()]
        zeros = [layer.pattern.zeros(layer.shape) for layer in self.layers.values()]
        return sum(zeros) / sum(sizes)

    def __str__(self) -> str:
        width = max(5, *(len(name) for name in self.layers))
        lines = [f"{'layer':{width}}  {'shape':>13}  {'zeros %':>7}  pattern"]
        lines += [
            f"{name:{width}}  {layer.shape[0]:>5} x {layer.shape[1]:<5}  {100 * layer.sparsity:7.2f}  {layer.pattern}"
            for name, layer in self.layers.items()
        ]
        lines += [f"{name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        lines += unused_samples(self.unused)
        lines += [str(trial) for trial in self.trials]
        lines.append(f"{len(self)} layers, {100 * self.sparsity:.2f} % zeros, budget: {self.budget}")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """A bar for each layer, from the share of weights that an even budget leaves it to the share it got; as PNG."""
        even = 100 * (1 - self.sparsity)
        shares = [100 * (1 - layer.sparsity) for layer in self.layers.values()]
        figure = blank(7, 1.2 + 0.2 * len(self))
        axis = figure.subplots()
        draw_bars(
            axis,
            dict(zip(short_names(list(self)), shares, strict=True)),
            even,
            numbers=[f"{share:.1f}" for share in shares],
            colours=["#1f5fa8" if share >= even else "#d19a4e" for share in shares],
            size=7.5,
        )
        axis.set_xlabel("weights that are not zero, %, log scale", fontsize=8)
        axis.set_title(
            f"{100 * self.sparsity:.3g} % zeros in all; an even budget leaves {even:.3g} % of every layer",
            fontsize=9,
        )
        figure.savefig(path)


def short_names(names: list[str]) -> list[str]:
    """The names without what they all begin with, up to the last common part between dots, and all end with."""
    if len(names) == 1:
        return names
    parts = [name.split(".") for name in names]
    while min(map(len, parts)) > 2 and len({tuple(each[:2]) for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    while min(map(len, parts)) > 1 and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return [".".join(each) for each in parts]
