"""A layer solved by all ranks together, each some of its rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moonshot.layer.patterns import Pattern, is_by_row
from moonshot.layer.problem import Problem, Status
from moonshot.linalg.backend import like, native
from moonshot.models.ranks import Ranks
from moonshot.solvers.base import Answer, Solver, check_answer, row_work

_CUBES, _SQUARES = 3, 2  # how often d^3 and m d^2, to make a problem, factor its Hessian and grade its answer
_EXCHANGES = {"cpu": 2e9, "cuda": 1e12}  # multiply-adds while ranks talk of a layer, some hundred times


def work(solver: Solver, shape: tuple[int, int], factors: int, device: torch.device, ranks: int = 1) -> float:
    """About how many multiply-adds a layer (m, d) takes each of so many ranks that solve it together.

    factors: of each row; device: of each rank. A row takes what the solver says (solvers.base.row_work), or d^2.
    """
    m, d = shape
    by_row = row_work(solver, d, factors)
    at_once = _CUBES * d**3 + _SQUARES * m * d**2 + (ranks > 1) * _EXCHANGES[device.type]
    return at_once + m / ranks * (d**2 if by_row is None else by_row)


def is_divisible(solver: Solver, patterns: Iterable[Pattern], shape: tuple[int, int], count: int) -> bool:
    """Whether so many ranks can each solve some rows of a layer (m, d), which is to have one pattern after another."""
    m, d = shape
    return (
        m >= count and row_work(solver, d, 0) is not None and all(is_by_row(each, shape) for each in patterns)
    )


@dataclass(frozen=True)
class ByRows:
    """A solver that solves a share of the rows on each rank, by one that treats rows by themselves (row_work).

    Every rank solves the same problems in the same order, each with at least as many rows as there are ranks, and has
    the whole answer.
    """

    solver: Solver
    ranks: Ranks

    @property
    def name(self) -> str:
        return self.solver.name

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return self.solver.unsupported(problem, pattern)

    def init(self, problem: Problem) -> tuple[Problem, Problem, Any]:
        rows, index, count = problem.shape[0], self.ranks.index, self.ranks.count
        own = problem.of_rows(rows * index // count, rows * (index + 1) // count, self.ranks.total)
        return problem, own, self.solver.init(own)

    def compute(self, state: tuple[Problem, Problem, Any], pattern: Pattern) -> Answer:
        problem, own, own_state = state
        found = self.solver.compute(own_state, pattern)
        check_answer(found, own, pattern, self.solver)
        given = (found.weight, found.mask, found.start)
        arrays = [like(array, problem.weight) for array in given if array is not None]
        said = arrays, found.status, found.iterations, found.bound, found.note
        device = problem.weight.device
        pieces = [self.ranks.broadcast(said, source, device) for source in range(self.ranks.count)]
        by_rank, statuses, iterations, bounds, notes = zip(*pieces, strict=True)
        weight, mask, *start = map(torch.cat, zip(*by_rank, strict=True))
        return Answer(
            native(weight),
            native(mask.float()) != 0,
            max(statuses, key=list(Status).index),  # a limit that any piece met
            max(iterations),
            native(start[0]) if start else None,
            None if None in bounds else sum(bounds),
            max(notes),
        )
