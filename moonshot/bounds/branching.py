"""Branch and bound on small rows: the zeros that cost least, and what no others can cost less than."""

import time
from dataclasses import dataclass

import numpy as np

from moonshot.layer.problem import Problem, Status
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.linalg.backend import Array, as_dtype, native
from moonshot.linalg.factor import smallest_pivot

COLUMNS = 64  # the most there is hope for
_SLICE = 50_000  # nodes between looks at the clock, all searches together
_PIVOT = 1e-14  # of a Hessian scaled to a unit diagonal


@dataclass(frozen=True)
class Rows:
    """A problem's rows as the kernels read them. Hessians too close to singular are refused."""

    hessian: RowHessian
    factors: Array  # (n, m, d), float64
    centre: Array  # (m, d), float64

    @classmethod
    def of(cls, problem: Problem) -> "Rows":
        """Raises NotPositiveDefiniteError."""
        hessian, centre = problem.hessian, as_dtype(problem.centre, "float64")
        for i in range(len(centre) if hessian.factors is not None else 1):
            h = native(hessian.row(i))
            scale = np.sqrt(np.maximum(np.diag(h), np.finfo(h.dtype).tiny))
            if not (pivot := smallest_pivot(h / np.outer(scale, scale))) > _PIVOT:
                raise NotPositiveDefiniteError(f"the Hessian of row {i}, scaled to a unit diagonal,", pivot)
        factors = np.zeros((0, *centre.shape)) if hessian.factors is None else hessian.factors
        return cls(hessian, np.array(factors, np.float64, order="C"), np.array(centre, order="C"))


@dataclass(frozen=True)
class Branched:
    """The best zeros found (m, d), what no zeros cost less than, how the search ended, and after how many nodes."""

    pruned: Array
    bound: float
    status: Status
    nodes: int


def branch(rows: Rows, size: int, zeros: int, nodes: int, seconds: float | None = None) -> Branched:
    """Search for the cheapest mask with `zeros` zeros in every `size` consecutive weights of the layer.

    size: that of the layer, or a divisor of a row's.
    nodes: the limit of one search. Groups within rows take one search a row; a budget over the layer one for every
    row and number of zeros that may matter.
    seconds: the limit of the call in wall-clock time, looked at now and then, or None.
    """
    m, d = rows.centre.shape
    searches = _Searches(rows, min(size, d), nodes, seconds)
    if size > d:
        count, closest = _share(searches, zeros)
    else:
        count = closest = np.full(m, zeros)
        searches.search(np.arange(m), count)
    bound = float(np.sum(searches.lower[np.arange(m), closest]))
    return Branched(searches.masks(count), bound, searches.status(closest), searches.spent)


class _Searches:
    """What is known of every row (first index) with every number of zeros a group (second index).

    upper, lower: (m, group + 1), the value of the best mask found, and a bound.
    over: (m, group + 1), True where the two have met.
    """

    def __init__(self, rows: Rows, group: int, nodes: int, seconds: float | None):
        m, d = rows.centre.shape
        self.rows, self.group, self.nodes = rows, group, nodes
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
        from moonshot.bounds import branching_kernels

        rows, d, s = self.rows, self.rows.centre.shape[1], len(which)
        A = np.array(rows.hessian.A, order="C")  # writable and in C order, for which the kernel is compiled
        pruned = np.zeros((s, d), bool)
        figures = np.tile([0.0, np.inf, 0.0, 0.0], (s, 1))  # depth, upper, lower, nodes
        column, next_branch = np.zeros((2, s, d + 1), np.int64)
        floor = np.zeros((s, d + 1))
        limit, done = self.nodes if nodes is None else nodes, 0
        while done < limit:
            running = np.flatnonzero(figures[:, 0] >= 0)
            if not len(running) or (done and self.late):
                break
            step = min(-(-_SLICE // len(running)), limit - done)
            part = [array[running] for array in (pruned, figures, column, next_branch, floor)]
            branching_kernels.search(
                A, rows.factors, rows.centre, which[running], zeros[running], self.group, step, *part
            )
            for whole, piece in zip((pruned, figures, column, next_branch, floor), part, strict=True):
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
        return np.unpackbits(packed, axis=1, count=self.rows.centre.shape[1]).astype(bool)

    def status(self, zeros: Array) -> Status:
        if self.over[np.arange(len(zeros)), zeros].all():
            return Status.OPTIMAL
        return Status.TIME_LIMIT if self.late else Status.NODE_LIMIT


def _share(searches: _Searches, total: int) -> tuple[Array, Array]:
    """The zeros of every row that are best together, by upper and by lower bounds: (m,) twice.

    No share of the budget costs less than the best share by lower bounds. Where its bounds are not attained yet its
    rows are searched, until all are: then it is an optimum.
    """
    m, d = searches.rows.centre.shape
    everyone = np.arange(m)
    for zeros in range(d + 1):
        searches.search(everyone, np.full(m, zeros), nodes=1)
    tried = searches.over.copy()
    while True:
        searches.lower = np.maximum.accumulate(searches.lower, axis=1)  # another zero never costs less
        closest = _best_share(searches.lower, total)
        which = everyone[~tried[everyone, closest]]
        if not len(which) or searches.late:
            return _best_share(searches.upper, total), closest
        searches.search(which, closest[which])
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
