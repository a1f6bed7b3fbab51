"""How time grows with rows m, columns d, factors n and tokens, beside how the multiply-adds do.

    python -m benchmarks.speed.growth [--runs 3] [--only SparseGPT ADMM ...]

Each dimension takes four sizes, a quarter of its base to twice that, the others stay. Exponents are of the two largest
sizes, the expected ones those of the multiply-adds. Iterative methods make a fixed number of iterations, which would
otherwise depend on the data.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import moonshot as ms
import numpy as np
from rich.console import Console
from rich.table import Table

from .cases import HALF, PATTERN, accumulated, observed, solved
from .layers import random_layer
from .timing import alternate

STEPS = (0.25, 0.5, 1, 2)


@dataclass(frozen=True)
class Size:
    """Rows, columns, factors or samples, and calibration tokens."""

    m: int
    d: int
    n: int = 16
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.m} x {self.d}, n = {self.n}" + (f", {self.tokens} tokens" if self.tokens else "")

    def grown(self, dimension: str) -> list["Size"]:
        """This size with one dimension in four steps."""
        return [replace(self, **{dimension: int(getattr(self, dimension) * step)}) for step in STEPS]


@dataclass(frozen=True)
class Grown:
    """What is timed. base: where the sizes start from; dimensions: which of them grow.

    prepared: the size -> what is timed there. count: the size -> multiply-adds, up to terms that never lead.
    """

    name: str
    base: Size
    dimensions: tuple[str, ...]
    prepared: Callable[[Size], Callable[[], Any]]
    count: Callable[[Size], float]


def solver(
    name: str,
    method: ms.Solver,
    base: Size,
    count: Callable[[Size], float],
    *,
    pattern: ms.Pattern = PATTERN,
    dimensions: tuple[str, ...] = ("m", "d", "n"),
) -> Grown:
    """A solver on a joint problem of the size."""

    def prepared(size: Size) -> Callable[[], Any]:
        layer = random_layer(size.m, size.d, size.n)
        return lambda: solved(layer.joint(), method, pattern)

    return Grown(name, base, dimensions, prepared, count)


def statistic(objective: ms.Objective, dimensions: tuple[str, ...], count: Callable[[Size], float]) -> Grown:
    """An objective's statistic."""

    def prepared(size: Size) -> Callable[[], Any]:
        seen = observed(size.m, size.d, size.n, size.tokens // size.n)
        return lambda: accumulated(objective, *seen)

    return Grown(objective.name, Size(1024, 1024, 16, 4096), dimensions, prepared, count)


def sweep_count(s: Size) -> float:
    """R, the product P = R U, the recursion for each weight and the updates to the right."""
    return 2 / 3 * s.d**3 + s.m * s.d * (s.n * s.d / 2 + 2 * s.n**2 + 2 * s.n + s.d / 2)


def admm_count(s: Size) -> float:
    """30 iterations, with two inverses of the shared matrix and one set of the factors' grams."""
    iteration = s.m * (s.d**2 + 2 * s.n * s.d)
    grams = s.m * s.n * (s.d**2 / 2 + s.n * s.d / 2 + 2 * s.n**2)
    return 3 * 2 / 3 * s.d**3 + 2 * s.d**3 / 2 + grams + 30 * iteration


def obs_count(s: Size) -> float:
    """The inverse, every row's low-rank part of it, the trace, and the refit at one half."""
    row = 2 * s.n * s.d**2 + s.n**2 * s.d + s.d**3 * (1 / 6 + 1 / 48)
    return 4 / 3 * s.d**3 + s.m * row


def iht_count(s: Size) -> float:
    """Products with every row's Hessian."""
    return s.m * (s.d**2 + 2 * s.n * s.d)


def swaps_count(s: Size) -> float:
    """The sweep it starts from, every row's Hessian and its first tableau; how many exchanges follow the data say."""
    return sweep_count(s) + s.m * (s.n * s.d**2 / 2 + s.d**3 * (1 / 48 + 1 / 8 + 1 / 4))


GROWN = (
    solver("Magnitude", ms.Magnitude(), Size(4096, 512, 1), lambda s: s.m * s.d, dimensions=("m", "d")),
    solver("Wanda", ms.Wanda(), Size(4096, 512), lambda s: s.m * s.d * (1 + s.n)),
    solver("SparseGPT", ms.SparseGPT(), Size(1024, 1024), sweep_count),
    solver("ADMM", ms.ADMM(iterations=30, tolerance=0, refits=1), Size(1024, 1024), admm_count),
    solver("IHT", ms.IHT(iterations=10), Size(256, 1024), iht_count),
    solver("OBS", ms.OBS(), Size(64, 512), obs_count, pattern=HALF),
    solver("Swaps", ms.Swaps(ms.SparseGPT()), Size(16, 512), swaps_count),
    statistic(ms.Reconstruction(), ("d", "tokens"), lambda s: s.tokens * s.d**2 / 2),
    statistic(ms.TokenFisher(), ("m", "d", "tokens"), lambda s: s.tokens * (s.d**2 / 2 + s.d + s.m)),
    statistic(ms.Fisher(), ("m", "d", "tokens"), lambda s: s.tokens * s.m * s.d),
)
NAMES = tuple(grown.name for grown in GROWN)


def exponent(sizes: list[int], figures: list[float]) -> float:
    """The slope of log figure against log size over the upper half of the sizes, by least squares."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(figures[half:]), 1)[0])


def grow(grown: Grown, dimension: str, rounds: int) -> tuple[list[int], list[float], float, float]:
    """Sizes of one dimension, least seconds at each, and the exponents of the seconds and of the multiply-adds."""
    steps = grown.base.grown(dimension)
    sizes = [getattr(step, dimension) for step in steps]
    runs = {size: grown.prepared(step) for size, step in zip(sizes, steps, strict=True)}
    runs[sizes[0]]()  # compiles
    seconds = [min(times) for times in alternate(runs, rounds).values()]
    counts = [float(grown.count(step)) for step in steps]
    return sizes, seconds, exponent(sizes, seconds), exponent(sizes, counts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.growth", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--runs", type=int, default=3, help="rounds; the least time of each size counts")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error("--runs must be 1 or more")
    console = Console()
    for grown in GROWN:
        if grown.name in options.only:
            console.print(table(grown, options.runs))


def table(grown: Grown, rounds: int) -> Table:
    """The growth of one thing, a row for each dimension."""
    out = Table("in", "sizes", "seconds", "exponent", "expected", title=f"{grown.name}, {grown.base}")
    for dimension in grown.dimensions:
        sizes, seconds, measured, expected = grow(grown, dimension, rounds)
        times = " ".join(f"{second:.2g}" for second in seconds)
        out.add_row(dimension, f"{sizes[0]} to {sizes[-1]}", times, f"{measured:.2f}", f"{expected:.2f}")
    return out


if __name__ == "__main__":
    main()
