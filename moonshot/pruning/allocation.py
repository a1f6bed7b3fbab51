"""A pattern for each layer, as `allocate` finds it: what it is, as a table, as a picture."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moonshot.layer.patterns import Pattern
from moonshot.pruning.report import Trial


@dataclass(frozen=True)
class LayerBudget:
    """What a layer gets.

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

    budget: the name of the trial that it comes from; trials: all that were compared, the even budget first.
    """

    layers: dict[str, LayerBudget]
    budget: str
    trials: list[Trial] = field(default_factory=list)

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
        lines += [str(trial) for trial in self.trials]
        lines.append(f"{len(self)} layers, {100 * self.sparsity:.2f} % zeros, budget: {self.budget}")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """A bar for each layer, its share of kept weights on a logarithmic scale, and a line at their mean; as PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(6, 1 + 0.18 * len(self)))
        axis.barh(list(self), [100 * (1 - layer.sparsity) for layer in self.layers.values()])
        axis.axvline(100 * (1 - self.sparsity), color="black", linestyle="--", label="the same everywhere")
        axis.set(xscale="log", xlabel="weights kept, %", title=f"{100 * self.sparsity:g} % zeros")
        axis.tick_params(axis="y", labelsize=7)
        axis.invert_yaxis()
        axis.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
