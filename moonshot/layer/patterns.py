"""Sparsity patterns: how many weights of a layer are zero, and where they may be.

A pattern turns scores into a mask (`keep`), says how many zeros it promises (`zeros`) and checks a mask
(`check`). Masks are True where a weight stays. Another pattern is another class with these methods.

A pattern of equal groups has `groups(shape) -> (size, zeros)` too: every `size` consecutive weights of the layer, row
after row, have exactly `zeros` zeros. SparseGPT, OBS, Swaps, Exact and `lower_bound` work group by group and need it;
`equal_groups` is how they ask. All other solvers take any pattern.

A pattern that can be reached in stages has `eased(share) -> Pattern` too: the same with more nonzeros, a fraction
density ** share of all weights. `stages` is how it is asked.
"""

import re
from dataclasses import dataclass, replace
from numbers import Real
from typing import Protocol, runtime_checkable

from moonshot.errors import ArgumentTypeError, MoonshotError, check_number
from moonshot.linalg.backend import Array, namespace, smallest


class PatternError(MoonshotError):
    """A pattern that cannot be read, or does not fit the layer it is asked of."""


class PatternMismatchError(MoonshotError):
    """A mask or a weight that does not have the zeros its pattern promises."""


@runtime_checkable
class Pattern(Protocol):
    """What a solver asks of a pattern."""

    def validate(self, shape: tuple[int, int]) -> None:
        """Raise PatternError where a layer of this shape (m, d) cannot have the pattern."""

    def zeros(self, shape: tuple[int, int]) -> int:
        """The exact number of zeros in a layer of this shape."""

    def keep(self, scores: Array) -> Array:
        """The mask (m, d) that keeps the largest sum of scores.

        scores: (m, d), 0 or more; what pruning each weight alone costs, in some unit. Costs add up, so a pattern of
        blocks scores a block by the sum over its weights. NumPy, CuPy or torch arrays.
        """

    def check(self, mask: Array) -> None:
        """Raise PatternMismatchError unless the mask has exactly the zeros promised."""


@dataclass(frozen=True)
class Unstructured:
    """A fraction of zeros anywhere in the layer, or the same fraction in each row.

    sparsity: the fraction of zeros, 0 to 1; the number of zeros is this times the layer's (or the row's)
    size, rounded to the nearest integer.
    scope: "layer" or "row".
    """

    sparsity: float
    scope: str = "layer"

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or isinstance(self.sparsity, bool):
            raise ArgumentTypeError(f"sparsity must be a number from 0 to 1, got {self.sparsity!r}")
        if not 0 <= self.sparsity <= 1:
            raise PatternError(
                f"sparsity is the fraction of zeros, from 0 to 1, got {self.sparsity!r}; "
                'write "50%" for a percentage'
            )
        if not isinstance(self.scope, str) or self.scope not in ("layer", "row"):
            raise PatternError(f'scope must be "layer" or "row", got {self.scope!r}')

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%" + (" per row" if self.scope == "row" else "")

    def validate(self, shape: tuple[int, int]) -> None:
        """Every layer can have it."""

    def zeros(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        if self.scope == "row":
            return rows * self.zeros_through(columns, columns)
        return self.zeros_through(rows * columns, rows * columns)

    def zeros_through(self, part: int, whole: int) -> int:
        """How many of `whole` weights' zeros fall to the first `part` of them, spread evenly."""
        return round(round(self.sparsity * whole) * part / whole)

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        rows, columns = shape
        size = columns if self.scope == "row" else rows * columns
        return size, self.zeros_through(size, size)

    def eased(self, share: float) -> "Unstructured":
        return replace(self, sparsity=eased_sparsity(self.sparsity, share))

    def keep(self, scores: Array) -> Array:
        size, zeros = self.groups(scores.shape)
        return ~smallest(scores.reshape(-1, size), zeros).reshape(scores.shape)

    def check(self, mask: Array) -> None:
        xp = namespace(mask)
        zeros, expected = int(xp.sum(~mask)), self.zeros(mask.shape)
        if zeros != expected:
            raise PatternMismatchError(f"{self} promises {expected} zeros, the mask has {zeros}")
        if self.scope == "row":
            counts = xp.sum(~mask, axis=1)
            if int(xp.min(counts)) != int(xp.max(counts)):
                raise PatternMismatchError(f"{self} promises the same number of zeros in every row")


@dataclass(frozen=True)
class NM:
    """At most n nonzeros in every m consecutive inputs of a row; "2:4" is NM(2, 4).

    n, m: integers, 0 <= n <= m. Raises TypeError or PatternError for others.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ArgumentTypeError(f"{name} of an N:M pattern must be an integer, got {value!r}")
        if not (0 <= self.n <= self.m and self.m >= 1):
            raise PatternError(
                f"N:M keeps n of every m weights, so 0 <= n <= m and m >= 1: got {self.n}:{self.m}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def validate(self, shape: tuple[int, int]) -> None:
        if shape[1] % self.m:
            raise PatternError(
                f"{self} needs a number of inputs divisible by {self.m}, this layer has {shape[1]}: "
                "leave the layer out with ignore, or give it an unstructured pattern"
            )

    def zeros(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] // self.m * (self.m - self.n)

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.m, self.m - self.n

    def eased(self, share: float) -> "NM":
        return NM(round(self.m * (1 - eased_sparsity(self.sparsity, share))), self.m)

    def keep(self, scores: Array) -> Array:
        self.validate(scores.shape)
        return ~smallest(scores.reshape(-1, self.m), self.m - self.n).reshape(scores.shape)

    def check(self, mask: Array) -> None:
        self.validate(mask.shape)
        xp = namespace(mask)
        groups, number = mask.reshape(-1, self.m), xp.uint8 if self.m < 256 else xp.int32
        first, *others = (xp.astype(groups[:, k], number) for k in range(self.m))
        kept = sum(others, start=first)  # many times as fast as a sum along short rows
        if int(xp.min(kept)) != self.n or int(xp.max(kept)) != self.n:
            raise PatternMismatchError(f"{self}: a group of the mask does not keep {self.n} weights")


def stages(pattern: Pattern, count: int) -> list[Pattern]:
    """Patterns one after the other, each with fewer nonzeros, up to the pattern itself; `count` of them at most.

    The fraction of nonzeros falls by the same factor each time, as far as the pattern can have it. A pattern without
    `eased` is reached at once.
    """
    found: list[Pattern] = []
    if hasattr(pattern, "eased"):
        eased = [pattern.eased(k / count) for k in range(1, count)]
        found = [each for each in eased if each not in (pattern, pattern.eased(0.0))]
    return [*dict.fromkeys(found), pattern]


def eased_sparsity(sparsity: float, share: float) -> float:
    """The sparsity whose density is (1 - sparsity) ** share."""
    return 1 - (1 - sparsity) ** share


def equal_groups(pattern: Pattern, shape: tuple[int, int]) -> tuple[int, int] | None:
    """(size, zeros) of a pattern of equal groups that divide a row, or are the whole layer; None for any other."""
    if not hasattr(pattern, "groups"):
        return None
    size, zeros = pattern.groups(shape)
    rows, columns = shape
    return (size, zeros) if columns % size == 0 or size == rows * columns else None


def is_by_row(pattern: Pattern, shape: tuple[int, int]) -> bool:
    """Whether a pattern has equal groups within rows, so that the zeros of no row depend on those of another."""
    groups = equal_groups(pattern, shape)
    return groups is not None and groups[0] <= shape[1]


def lacks_groups(pattern: Pattern, shape: tuple[int, int], who: str) -> str | None:
    """Why a solver that works group by group cannot take a pattern; None where it can. who: such as "a sweep"."""
    if equal_groups(pattern, shape) is not None:
        return None
    missing = (
        f"{pattern} has groups that divide neither a row nor are the layer"
        if hasattr(pattern, "groups")
        else f"{pattern} has no `groups(shape) -> (size, zeros)`"
    )
    return (
        f"{who} prunes equal groups of consecutive weights, and {missing}; ADMM, IHT, Magnitude and Wanda take any "
        "pattern"
    )


def as_pattern(pattern: "Pattern | str | float") -> Pattern:
    """A pattern from what users write.

    pattern: 0.5, "0.5", "50%" or "2:4"; a pattern object is returned as it is.

    Raises PatternError, or TypeError for what is neither number, text nor pattern.
    """
    if isinstance(pattern, str):
        text = pattern.strip()
        if match := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text):
            return NM(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text):
            return Unstructured(float(match[1]) / (100 if match[2] else 1))
        meant = ""
        if match := re.fullmatch(r"(\d+)\s*([^\d\s]+)\s*(\d+)", text):  # 2/4, 0,5
            sign = "." if match[2] == "," else ":"
            meant = f"did you mean {match[1]}{sign}{match[3]}? "
        raise PatternError(f'cannot read the pattern {pattern!r}: {meant}write 0.5, "50%" or "2:4"')
    if isinstance(pattern, Real) and not isinstance(pattern, bool):
        check_number("a sparsity", pattern)
        return Unstructured(float(pattern))
    if isinstance(pattern, Pattern) and not isinstance(pattern, type):
        return pattern
    raise ArgumentTypeError(f'a pattern is 0.5, "50%", "2:4", Unstructured or NM, got {pattern!r}')
