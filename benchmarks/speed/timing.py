"""Time several things in alternation, and compare them round by round."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Figure:
    """The median over the rounds, the least and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: list[float]) -> "Figure":
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Case:
    """Things that are timed together.

    runs: what is timed, by name. ratios: pairs (top, bottom) of names whose times are divided.
    value: the objective of what a run returns; graded: pairs (top, bottom) of names whose values are divided.
    """

    name: str
    runs: Mapping[str, Callable[[], Any]]
    ratios: tuple[tuple[str, str], ...]
    value: Callable[[Any], float] = float
    graded: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Measured:
    """The figures of a case: "top / bottom" for ratios of times and of values, the run's name for seconds."""

    ratios: dict[str, Figure]
    seconds: dict[str, Figure]
    values: dict[str, float] = field(default_factory=dict)


def measured(case: Case, rounds: int, seconds: float = math.inf) -> Measured:
    """The figures of a case, after one run of each thing to warm up, whose answers are graded; see `alternate`."""
    to_grade = {name for pair in case.graded for name in pair}
    values = {}
    for name, run in case.runs.items():
        answer = run()
        if name in to_grade:
            values[name] = case.value(answer)
        del answer
    times = alternate(case.runs, rounds, seconds)
    return Measured(
        {
            f"{top} / {bottom}": Figure.of([a / b for a, b in zip(times[top], times[bottom], strict=True)])
            for top, bottom in case.ratios
        },
        {name: Figure.of(of_run) for name, of_run in times.items()},
        {f"{top} / {bottom}": values[top] / values[bottom] for top, bottom in case.graded},
    )


def alternate(
    runs: Mapping[Any, Callable[[], Any]], rounds: int, seconds: float = math.inf
) -> dict[Any, list[float]]:
    """Seconds of every run in every round; each round begins with another run.

    seconds: when the rounds have taken that long there is none after, but for the first LEAST_ROUNDS.
    """
    names = list(runs)
    times: dict[Any, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times
