"""A layer solved in pieces, some rows each, as several processes solve it together."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import fsum
from threading import Condition

import numpy as np

from moonshot.layer.patterns import Pattern
from moonshot.layer.problem import Problem
from moonshot.linalg.backend import Array, computing_on
from moonshot.solvers.base import Answer, Solver


def solved_in_pieces(
    problem: Problem, pattern: Pattern, solver: Solver, ends: Sequence[int]
) -> tuple[Array, Array]:
    """Weight and mask (m, d), NumPy, of the answers for the rows up to each of `ends`, the last of which is m.

    Each piece has a thread, which runs alone until it asks for a total or is done. Raises RuntimeError where some
    pieces ask more often than others, and what the solver raises.
    """
    turns = _Turns(len(ends))

    def solved(k: int) -> Answer:
        with turns.running, computing_on(problem.weight):
            try:
                piece = problem.of_rows(ends[k - 1] if k else 0, ends[k], turns.total)
                answer = solver.compute(solver.init(piece), pattern)
            except Exception as error:
                turns.end(error)
                raise
            turns.end(RuntimeError("problem.total is asked for more often in some pieces than in others"))
            return answer

    with ThreadPoolExecutor(len(ends)) as pool:
        answers = list(pool.map(solved, range(len(ends))))
    return np.concatenate([a.weight for a in answers]), np.concatenate([a.mask for a in answers])


class _Turns:
    """What the pieces have said so far, and all totals there were.

    running: the lock of the piece that runs. Another does while this one waits for a total.
    """

    def __init__(self, count: int):
        self.running = Condition()
        self._count, self._said, self._totals = count, list[float](), list[float]()
        self._over: Exception | None = None

    def total(self, value: float) -> float:
        this = len(self._totals)
        self._said.append(value)
        if len(self._said) == self._count:
            self._totals.append(fsum(self._said))
            self._said.clear()
            self.running.notify_all()
        self.running.wait_for(lambda: len(self._totals) > this or self._over)
        if len(self._totals) == this:
            assert self._over is not None
            raise self._over
        return self._totals[this]

    def end(self, reason: Exception) -> None:
        """One piece is done: why there can be no further total."""
        self._over = self._over or reason
        self.running.notify_all()
