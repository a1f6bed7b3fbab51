"""What `allocate` can choose from: each layer solved at several patterns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moonshot.layer.patterns import Pattern, PatternError, Unstructured, as_pattern
from moonshot.models.layer_view import LayerView
from moonshot.pruning import budgets
from moonshot.pruning.allocation import LayerBudget
from moonshot.pruning.layer_patterns import PatternLike, check_fit

RELATIVE = "relative objective"
_SPARSER, _DENSER = 6, 20  # steps from the even budget, each sqrt(2) times fewer or more nonzeros


def menu(
    view: LayerView, even: Unstructured, patterns: Sequence[PatternLike] | None
) -> list[tuple[int, Pattern]]:
    """(zeros, pattern) of what a layer can have, the densest first, no two with as many zeros.

    Raises PatternError where that is nothing.
    """
    if patterns is None:
        density = 1 - even.sparsity
        grid = {min(density * 2 ** (k / 2), 1.0) for k in range(-_SPARSER, _DENSER + 1)} | {1.0}
        offered: list[Pattern] = [Unstructured(1 - share) for share in grid]
    else:
        offered = [as_pattern(pattern) for pattern in patterns]
    fitting: dict[int, Pattern] = {}
    refused: list[str] = []
    for pattern in offered:
        try:
            check_fit(view, pattern)
        except PatternError as error:
            refused.append(str(error))
        else:
            fitting.setdefault(pattern.zeros(view.problem_shape), pattern)
    if not fitting:
        raise PatternError(f"none of the patterns fits: {'; '.join(refused) or 'there are none'}")
    return sorted(fitting.items(), key=lambda choice: choice[0])


class SparseMatrix(NamedTuple):
    """A matrix as its nonzeros and a bit for each entry, in main memory."""

    values: Tensor
    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, matrix: Tensor) -> "SparseMatrix":
        nonzero = matrix != 0
        bits = torch.from_numpy(np.packbits(nonzero.cpu().numpy()))
        return cls(matrix[nonzero].cpu(), bits, tuple(matrix.shape))

    def dense(self) -> Tensor:
        nonzero = np.unpackbits(self.bits.numpy(), count=math.prod(self.shape)).astype(bool).reshape(self.shape)
        matrix = torch.zeros(self.shape, dtype=self.values.dtype, device="cpu")
        matrix[torch.from_numpy(nonzero)] = self.values
        return matrix


class Choice(NamedTuple):
    """A layer solved at one pattern. costs: by unit of the curve."""

    pattern: Pattern
    zeros: int
    costs: dict[str, float]
    weight: SparseMatrix


@dataclass(frozen=True)
class Offer:
    """What every layer can have, and how many zeros all must have together.

    exact: whether a layer can have any number of zeros, its choices being points of a grid.
    """

    views: dict[str, LayerView]
    choices: dict[str, list[Choice]]
    total: int
    exact: bool

    @property
    def zeros(self) -> list[list[int]]:
        return [[choice.zeros for choice in choices] for choices in self.choices.values()]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(view.problem_shape) for view in self.views.values()]

    @property
    def units(self) -> list[str]:
        return list(next(iter(self.choices.values()))[0].costs)

    def costs(self, unit: str) -> list[list[float]]:
        return [[choice.costs[unit] for choice in choices] for choices in self.choices.values()]

    def patterns(self, answer: list[int]) -> dict[str, Pattern]:
        chosen = [choices[k] for choices, k in zip(self.choices.values(), answer, strict=True)]
        if not self.exact:
            return {name: choice.pattern for name, choice in zip(self.choices, chosen, strict=True)}
        zeros = budgets.exact([choice.zeros for choice in chosen], self.sizes, self.total)
        return {
            name: Unstructured(z / size) for name, z, size in zip(self.choices, zeros, self.sizes, strict=True)
        }

    def budgets(self, answer: list[int]) -> dict[str, LayerBudget]:
        layers = {}
        for (name, pattern), size in zip(self.patterns(answer).items(), self.sizes, strict=True):
            shape = self.views[name].problem_shape
            curve = [(choice.zeros / size, choice.costs[RELATIVE]) for choice in self.choices[name]]
            layers[name] = LayerBudget(shape, pattern, curve)
        return layers
