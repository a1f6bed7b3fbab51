"""OBS: remove the cheapest weight of a row, compensate with all that are left, and again."""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from moonshot.layer.columns import Columns
from moonshot.layer.patterns import Pattern, lacks_groups
from moonshot.layer.problem import Problem
from moonshot.linalg.backend import (
    Array,
    as_dtype,
    asarray_like,
    contiguous,
    is_cupy,
    is_numpy,
    namespace,
    native,
    on_host,
    zeros_like_shape,
)
from moonshot.linalg.factor import NotPositiveDefiniteError, inverse_factor
from moonshot.linalg.hessian import RowHessian
from moonshot.linalg.lowrank import apply
from moonshot.solvers import obs_batched, obs_cuda
from moonshot.solvers.base import Answer
from moonshot.solvers.obs_batched import LOST
from moonshot.solvers.obs_columns import without_columns


@dataclass(frozen=True)
class _Trace:
    """What happens when the weights of each row go one by one."""

    order: Array  # (m, d), columns as they go
    increments: np.ndarray  # (m, d), the loss each adds
    slopes: np.ndarray  # (m, d), of the lower convex hull of the added-up increments


@dataclass(frozen=True)
class _State:
    """The problem in float64; row i's inverse is `inverse - columns_i columns_i'`."""

    kernels: ModuleType
    dtype: str
    hessian: RowHessian
    centre: Array  # (m, d)
    factors: Array  # (n, m, d)
    inverse: Array  # (d, d), of A
    columns: Array  # (n, m, d)

    @cached_property
    def trace(self) -> _Trace:
        """Of all weights, without a pattern: found once, when first asked for."""
        from moonshot.solvers.obs_kernels import hull_slopes

        d = self.centre.shape[1]
        order, increments = _eliminate(self, np.zeros(d, np.int64), np.array([d]))
        increments = on_host(increments)
        return _Trace(order, increments, hull_slopes(increments))


@dataclass(frozen=True)
class OBS:
    """Optimal Brain Surgeon, greedily, on each row's own Hessian.

    Every row removes the weight with the smallest `w_j^2 / [H^-1]_jj`, moves its other weights to where they compensate
    best, and goes on. The first unstructured pattern follows every row to its last weight; all others on the
    same state reuse that. A row budget takes the start of each row's trace, a layer budget hands zeros to the
    rows along the lower convex hulls of their losses. N:M patterns have a pass of their own, in which a group of m
    that has lost m - n weights is closed. Columns go by the sum of what they cost in all rows. The weights are then
    the exact minimiser on the support.

    Cost of a trace: d^3 / 6 multiply-adds a row, in float64, and d^2 numbers a thread. Of columns: d^2 + n m d for each
    that goes, with n factors a row.

    Numerical stability: what is left of a diagonal entry of the inverse, relative to what it was, tells how many of
    its digits are gone. At 1e-8 the row's inverse is computed afresh from the Hessian of the weights left.

    Source: Frantar and Alistarh, Optimal Brain Compression (arXiv 2208.11580), algorithm 1; for columns Kurtic et al.,
    ZipLM (arXiv 2302.04089), whose rows share a Hessian. The hull in place of their heap, the blocked downdates, and
    columns of rows with factors are ours: see docs/solvers/obs.md.
    """

    name = "OBS"

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return (
            None
            if isinstance(pattern, Columns)
            else lacks_groups(pattern, problem.shape, "a trace of removals")
        )

    def working_memory(self, shape: tuple[int, int]) -> int:
        """Bytes of the inverses that threads work on, one each."""
        from numba import get_num_threads

        m, d = shape
        return 8 * d**2 * min(m, get_num_threads())

    def row_work(self, columns: int, factors: int) -> float:
        """That of a trace, in float64."""
        return 2 * columns**3 / 6

    def init(self, problem: Problem) -> _State:
        hessian, centre = problem.hessian, contiguous(as_dtype(problem.centre, "float64"))
        r = hessian.inverse_factor
        factors, columns = hessian.factors, hessian.inverse_update()
        if factors is None or columns is None:
            factors = columns = zeros_like_shape(r, (0, *problem.shape))
        return _State(_kernels(centre), problem.dtype, hessian, centre, factors, r.T @ r, columns)

    def compute(self, state: _State, pattern: Any) -> Answer:
        m, d = state.centre.shape
        if isinstance(pattern, Columns):
            weight, mask = without_columns(
                state.hessian, state.centre, pattern.group, pattern.pruned_groups((m, d))
            )
            return Answer(as_dtype(weight, state.dtype), mask)
        size, zeros = pattern.groups((m, d))
        if size < d:
            quotas = np.full(d // size, zeros)
            order, _ = _eliminate(state, np.arange(d) // size, quotas)
            counts = np.full(m, quotas.sum())
        else:
            order = state.trace.order
            counts = np.full(m, zeros) if size == d else _share_out(state.trace, zeros)
        keep = namespace(state.centre).ones_like(state.centre, dtype=bool)
        rows = asarray_like(np.arange(m), order)[:, None]
        keep[rows, order] = asarray_like(np.arange(order.shape[1]) >= counts[:, None], order)
        return Answer(as_dtype(_refit(state, keep), state.dtype), keep)


def _kernels(array: Array) -> ModuleType:
    """The inner loops for this kind of array."""
    if is_numpy(array):
        from moonshot.solvers import obs_kernels

        return obs_kernels
    return obs_cuda if is_cupy(array) else obs_batched


def _eliminate(state: _State, groups: np.ndarray, quotas: np.ndarray) -> tuple[Array, Array]:
    """Order of removal and increments, both (m, quotas.sum()), until each group of columns has lost its quota."""
    order, increments, done = state.kernels.trace(state.inverse, state.columns, state.centre, groups, quotas)
    for i, trusted in enumerate(done.tolist()):
        while trusted < order.shape[1]:
            trusted += _resume(state, i, groups, quotas, order[i], increments[i], trusted)
    return order, increments


def _resume(
    state: _State,
    i: int,
    groups: np.ndarray,
    quotas: np.ndarray,
    order: Array,
    increments: Array,
    trusted: int,
) -> int:
    """Go on with row i after `trusted` removals, from a fresh inverse; returns how many more can be trusted."""
    hessian, centre = native(state.hessian.row(i)), state.centre[i]
    removed = on_host(order[:trusted])
    support = np.setdiff1d(np.arange(len(groups)), removed)
    left = quotas - np.bincount(groups[removed], minlength=len(quotas))
    open_ = np.flatnonzero(left[groups[support]] > 0)  # places within the support
    s, p, o, j = (asarray_like(x, order) for x in (support, removed, open_, support[open_]))
    r = inverse_factor(hessian[s][:, s])
    weight = centre[s] + r.T @ (r @ (hessian[s][:, p] @ centre[p]))
    inverse = r[:, o].T @ r[:, o]
    none = zeros_like_shape(inverse, (0, 1, len(open_)))
    later, added, more = state.kernels.trace(inverse, none, weight[o][None, :], groups[support[open_]], left)
    order[trusted:], increments[trusted:] = j[later[0]], added[0]
    return int(more[0])


def _share_out(trace: _Trace, zeros: int) -> np.ndarray:
    """How many weights each row loses (m,), `zeros` in all, at about the least loss.

    Whole parts of the rows' convex hulls are taken in the order of their slopes, which is optimal where they fit.
    The last one rarely does: one row makes up the difference, losing more without that segment or fewer with it.
    """
    slopes = trace.slopes
    m, d = slopes.shape
    if zeros == 0:
        return np.zeros(m, np.int64)
    limit = np.partition(slopes, zeros - 1, axis=None)[zeros - 1]
    counts, tied = np.sum(slopes < limit, axis=1), np.sum(slopes == limit, axis=1)
    last = int(
        np.searchsorted(np.cumsum(tied), zeros - counts.sum())
    )  # the row whose segment reaches the budget
    counts[:last] += tied[:last]
    missing = zeros - counts.sum()
    surplus = tied[last] - missing
    loss = np.concatenate([np.zeros((m, 1)), np.cumsum(trace.increments, axis=1)], axis=1)
    rows, longer = np.arange(m), counts + tied[last] * (np.arange(m) == last)
    more = np.where(
        counts + missing <= d, loss[rows, np.minimum(counts + missing, d)] - loss[rows, counts], np.inf
    )
    fewer = np.where(
        longer >= surplus, loss[rows, longer] - loss[rows, np.maximum(longer - surplus, 0)], -np.inf
    )
    if more.min() <= loss[last, longer[last]] - loss[last, counts[last]] - fewer.max():
        counts[np.argmin(more)] += missing
        return counts
    longer[np.argmax(fewer)] -= surplus
    return longer


def _refit(state: _State, keep: Array) -> Array:
    """The minimiser with zeros outside `keep`, (m, d).

    With P the pruned weights of a row, S the others and `G = H^-1`,

        v = c - G[:, P] y,  G[P, P] y = c_P      or      H[S, S] v_S = (H c)_S

    whichever system is smaller; the second where G has lost its digits.
    """
    xp = namespace(keep)
    centre = state.centre
    few = 2 * xp.sum(keep, axis=1) >= keep.shape[1]
    y, pivots = state.kernels.solve_restricted(state.inverse, state.columns, -1.0, centre, ~keep & few[:, None])
    weight = centre - y @ state.inverse
    if len(state.columns):
        weight = weight + apply(state.columns, y)
    few = few & (pivots > LOST)
    if not bool(xp.all(few)):
        pull = native(state.hessian.matvec(centre))
        x, pivots = state.kernels.solve_restricted(
            contiguous(state.hessian.A), state.factors, 1.0, pull, keep & ~few[:, None]
        )
        if float(xp.min(pivots)) <= 0:
            raise NotPositiveDefiniteError("a row's Hessian on its support", float(xp.min(pivots)))
        weight = xp.where(few[:, None], weight, x)
    return xp.where(keep, weight, xp.zeros_like(weight))
