"""Exact: the best mask there is, by branch and bound on small rows, with a proof."""

import time
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import scipy.linalg

from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.linalg.backend import Array, as_dtype, is_numpy, native
from moonshot.linalg.factor import smallest_pivot
from moonshot.patterns import NM, Pattern, Unstructured
from moonshot.problem import Problem, Status
from moonshot.solvers.base import Answer

_COLUMNS = 64  # the most there is hope for
_SLICE = 50_000  # nodes between looks at the clock, all searches together
_PIVOT = 1e-14  # of a Hessian scaled to a unit diagonal


@dataclass(frozen=True)
class _State:
    hessian: RowHessian
    factors: Array  # (n, m, d), float64
    centre: Array  # (m, d), float64
    constant: float


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

    Source: Furnival and Wilson, Regressions by Leaps and Bounds (Technometrics 16, 1974), for the search; the
    bounds are proved in docs/solvers/exact.md.
    """

    nodes: int = 1_000_000
    seconds: float | None = None

    name = "Exact"

    def __post_init__(self) -> None:
        if not isinstance(self.nodes, int) or isinstance(self.nodes, bool) or self.nodes < 1:
            raise ValueError(f"nodes must be a positive integer, got {self.nodes!r}")
        if self.seconds is not None and (not isinstance(self.seconds, Real) or not self.seconds > 0):
            raise ValueError(f"seconds must be a positive number, or None for no limit, got {self.seconds!r}")

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        if not isinstance(pattern, Unstructured | NM):
            return f"branch and bound needs an Unstructured or NM pattern, got {type(pattern).__name__}"
        if not is_numpy(problem.centre):
            return "missing branch and bound on a device: move the weight and the Hessian to the CPU"
        columns = problem.shape[1]
        if columns > _COLUMNS:
            return (
                f"missing hope: a row has {columns} columns, branch and bound takes {_COLUMNS} at most; "
                "use ADMM, and lower_bound for a proof"
            )
        return None

    def init(self, problem: Problem) -> _State:
        hessian, centre = problem.hessian, as_dtype(problem.centre, "float64")
        for i in range(len(centre) if hessian.factors is not None else 1):
            h = native(hessian.row(i))
            scale = np.sqrt(np.diag(h))
            if not (pivot := smallest_pivot(h / np.outer(scale, scale))) > _PIVOT:
                raise NotPositiveDefiniteError(f"the Hessian of row {i}, scaled to a unit diagonal,", pivot)
        factors = np.zeros((0, *centre.shape)) if hessian.factors is None else hessian.factors
        return _State(
            hessian, np.array(factors, np.float64, order="C"), np.array(centre, order="C"), problem.constant
        )

    def compute(self, state: _State, pattern: Any) -> Answer:
        m, d = state.centre.shape
        group = pattern.m if isinstance(pattern, NM) else d
        rows = _Rows(state, group, self.nodes, self.seconds)
        if isinstance(pattern, Unstructured) and pattern.scope == "layer":
            zeros, closest = _share(rows, pattern.zeros((m, d)))
        else:
            zeros = closest = np.full(m, pattern.zeros((1, d)) * group // d)
            rows.search(np.arange(m), zeros)
        pruned = rows.masks(zeros)
        weight = np.stack([_refit(native(state.hessian.row(i)), state.centre[i], pruned[i]) for i in range(m)])
        bound = float(np.sum(rows.lower[np.arange(m), closest])) + state.constant
        return Answer(weight, ~pruned, rows.status(closest), rows.spent, bound=bound)


class _Rows:
    """What is known of every row (first index) with every number of zeros a group (second index).

    upper, lower: (m, group + 1), the value of the best mask found, and a bound.
    over: (m, group + 1), True where the two have met.
    """

    def __init__(self, state: _State, group: int, nodes: int, seconds: float | None):
        m, d = state.centre.shape
        self.state, self.group, self.nodes = state, group, nodes
        self.deadline = np.inf if seconds is None else time.perf_counter() + seconds
        self.upper, self.lower = np.full((m, group + 1), np.inf), np.zeros((m, group + 1))
        self.over = np.zeros((m, group + 1), bool)
        self.spent = 0
        self._packed = np.zeros((m, group + 1, -(-d // 8)), np.uint8)

    @property
    def late(self) -> bool:
        return time.perf_counter() >= self.deadline

    def search(self, which: Array, zeros: Array, nodes: int | None = None) -> None:
        """Search rows `which` (s,) with `zeros` (s,) in every group until over or at a limit."""
        from moonshot.linalg import kernels_exact

        state, d, s = self.state, self.state.centre.shape[1], len(which)
        A = np.array(state.hessian.A, order="C")  # writable and in C order, for which the kernel is compiled
        pruned = np.zeros((s, d), bool)
        figures = np.tile([0.0, np.inf, 0.0, 0.0], (s, 1))  # depth, upper, lower, nodes
        column, branch = np.zeros((2, s, d + 1), np.int64)
        floor = np.zeros((s, d + 1))
        limit, done = self.nodes if nodes is None else nodes, 0
        while done < limit:
            running = np.flatnonzero(figures[:, 0] >= 0)
            if not len(running) or (done and self.late):
                break
            step = min(-(-_SLICE // len(running)), limit - done)
            part = [array[running] for array in (pruned, figures, column, branch, floor)]
            kernels_exact.search(
                A, state.factors, state.centre, which[running], zeros[running], self.group, step, *part
            )
            for whole, piece in zip((pruned, figures, column, branch, floor), part, strict=True):
                whole[running] = piece
            done += step
        self.spent += int(np.sum(figures[:, 3]))
        better = figures[:, 1] < self.upper[which, zeros]
        self._packed[which[better], zeros[better]] = np.packbits(pruned[better], axis=1)
        self.upper[which, zeros] = np.minimum(self.upper[which, zeros], figures[:, 1])
        self.lower[which, zeros] = np.maximum(self.lower[which, zeros], figures[:, 2])
        self.over[which, zeros] = figures[:, 0] < 0

    def masks(self, zeros: Array) -> Array:
        """The best sets of zeros (m, d) found with `zeros` (m,) in every group."""
        packed = self._packed[np.arange(len(zeros)), zeros]
        return np.unpackbits(packed, axis=1, count=self.state.centre.shape[1]).astype(bool)

    def status(self, zeros: Array) -> Status:
        if self.over[np.arange(len(zeros)), zeros].all():
            return Status.OPTIMAL
        return Status.TIME_LIMIT if self.late else Status.NODE_LIMIT


def _share(rows: _Rows, total: int) -> tuple[Array, Array]:
    """The zeros of every row that are best together, by upper and by lower bounds: (m,) twice.

    No share of the budget costs less than the best share by lower bounds. Where its bounds are not attained yet its
    rows are searched, until all are: then it is an optimum.
    """
    m, d = rows.state.centre.shape
    everyone = np.arange(m)
    for zeros in range(d + 1):
        rows.search(everyone, np.full(m, zeros), nodes=1)
    tried = rows.over.copy()
    while True:
        rows.lower = np.maximum.accumulate(rows.lower, axis=1)  # another zero never costs less
        closest = _best_share(rows.lower, total)
        which = everyone[~tried[everyone, closest]]
        if not len(which) or rows.late:
            return _best_share(rows.upper, total), closest
        rows.search(which, closest[which])
        tried[which, closest[which]] = True


def _best_share(curves: Array, total: int) -> Array:
    """`k` (m,) of the smallest `sum_i curves[i, k_i]` with `sum_i k_i = total`, by dynamic programming."""
    m, width = curves.shape
    best = np.where(np.arange(total + 1) == 0, 0.0, np.inf)  # of the rows so far, by zeros so far
    choice = np.zeros((m, total + 1), np.int8)
    for i, curve in enumerate(curves):
        following = np.full(total + 1, np.inf)
        for k in range(min(width, total + 1)):
            candidate = best[: total + 1 - k] + curve[k]
            better = candidate < following[k:]
            following[k:][better] = candidate[better]
            choice[i, k:][better] = k
        best = following
    share = np.zeros(m, np.int64)
    for i in reversed(range(m)):
        share[i] = choice[i, total]
        total -= share[i]
    return share


def _refit(h: Array, c: Array, pruned: Array) -> Array:
    """The best weights (d,) of a row that are zero where pruned."""
    kept, v = ~pruned, np.zeros_like(c)
    if kept.any():
        factor = scipy.linalg.cho_factor(h[np.ix_(kept, kept)])
        v[kept] = c[kept] + scipy.linalg.cho_solve(factor, h[np.ix_(kept, pruned)] @ c[pruned])
    return v
