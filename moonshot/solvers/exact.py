"""Exact: the best mask there is, by branch and bound on small rows, with a proof."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # whose linalg is imported where it is first used

from moonshot.bounds.branching import COLUMNS, Rows, branch
from moonshot.errors import ArgumentError, check_count, check_number
from moonshot.layer.patterns import Pattern, lacks_groups
from moonshot.layer.problem import Problem
from moonshot.linalg.backend import Array, asarray_like, is_numpy, native
from moonshot.solvers.base import Answer


@dataclass(frozen=True)
class _State:
    rows: Rows
    problem: Problem


@dataclass(frozen=True)
class Exact:
    """The optimum by branch and bound on each row's own Hessian, or the best answer found and how far it can be off.

    nodes: the limit of one search. A row budget or N:M takes one search a row; a budget over the layer one for
    every row and number of zeros that may matter.
    seconds: the limit of a call in wall-clock time, looked at now and then, or None.

    The answer's `bound` holds for every weight with the pattern. Status OPTIMAL says that the search came to its end,
    with the value within a relative 1e-9 of the bound, or as close as rounding in float64 lets the ill-conditioned
    be told apart; NODE_LIMIT and TIME_LIMIT that it was stopped, with the gap that `Result.gap` has. Rows have 64
    columns at most; time grows exponentially with them. Without `seconds` the same problem gives the same answer.
    A layer on a device is copied to the CPU and searched there, which the result's note says.

    Source: Furnival and Wilson, Regressions by Leaps and Bounds (Technometrics 16, 1974), for the search; the
    bounds are proved in docs/solvers/exact.md.
    """

    nodes: int = 1_000_000
    seconds: float | None = None

    name = "Exact"

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes)
        if self.seconds is not None:
            check_number("seconds", self.seconds)
            if not self.seconds > 0:
                raise ArgumentError(
                    f"seconds must be a positive number, or None for no limit, got {self.seconds!r}"
                )

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        if reason := lacks_groups(pattern, problem.shape, "branch and bound"):
            return reason
        columns = problem.shape[1]
        if columns > COLUMNS:
            return (
                f"a row has {columns} columns, and branch and bound searches {COLUMNS} at most: use ADMM, with "
                "bound=True (--bound) for how far from the optimum it is at most"
            )
        return None

    def init(self, problem: Problem) -> _State:
        return _State(Rows.of(problem.on_cpu()), problem)

    def compute(self, state: _State, pattern: Any) -> Answer:
        rows = state.rows
        size, zeros = pattern.groups(rows.centre.shape)
        found = branch(rows, size, zeros, self.nodes, self.seconds)
        triples = zip(range(len(found.pruned)), rows.centre, found.pruned, strict=True)
        weight = np.stack([_refit(native(rows.hessian.row(i)), c, pruned) for i, c, pruned in triples])
        centre, bound = state.problem.centre, found.bound + state.problem.constant
        weight, mask = (asarray_like(array, centre) for array in (weight, ~found.pruned))
        note = "" if is_numpy(centre) else "searched on the CPU"
        return Answer(weight, mask, found.status, found.nodes, bound=bound, note=note)


def _refit(h: Array, c: Array, pruned: Array) -> Array:
    """The best weights (d,) of a row that are zero where pruned."""
    kept, v = ~pruned, np.zeros_like(c)
    if kept.any():
        factor = scipy.linalg.cho_factor(h[np.ix_(kept, kept)])
        v[kept] = c[kept] + scipy.linalg.cho_solve(factor, h[np.ix_(kept, pruned)] @ c[pruned])
    return v
