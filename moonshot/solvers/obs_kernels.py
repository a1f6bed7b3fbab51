"""Inner loops of Optimal Brain Surgeon for NumPy arrays, compiled by numba, rows in parallel.

`obs_batched` has the same functions for arrays on a device; its docstrings hold the mathematics. Here each
thread owns one (d, d) matrix, of which the lower triangle is used. Rank-one downdates wait in `pending` and are applied
`_BLOCK` at a time, as a matrix product; a weight that goes leaves its place to the last one left, so that the places in
use are always 0 .. size - 1.
"""

import numba
import numpy as np
from numba import njit, prange

from moonshot.linalg.kernels import FAST, kernel
from moonshot.solvers.obs_batched import LOST

_BLOCK = 48
_TILE = 256
_inner = njit(
    fastmath=FAST, error_model="numpy"
)  # x / 0 is no exception: the place of a removed weight may hold it


@_inner
def _rank_update(matrix, pending, first, size, count, sign):
    """`matrix += sign * pending' pending` on the lower triangle of first .. size; 2 x 4 coefficients in registers."""
    for q in range(count, -(-count // 4) * 4):
        pending[q] = 0
    for left in range(first, size, _TILE):
        for row in range(left, size, 2):
            right = min(left + _TILE, row + 2)
            upper, lower = matrix[row, left:right], matrix[row + 1, left:right]
            for q in range(0, count, 4):
                a0, b0 = sign * pending[q, row], sign * pending[q, row + 1]
                a1, b1 = sign * pending[q + 1, row], sign * pending[q + 1, row + 1]
                a2, b2 = sign * pending[q + 2, row], sign * pending[q + 2, row + 1]
                a3, b3 = sign * pending[q + 3, row], sign * pending[q + 3, row + 1]
                x0, x1 = pending[q, left:right], pending[q + 1, left:right]
                x2, x3 = pending[q + 2, left:right], pending[q + 3, left:right]
                for c in range(right - left):
                    upper[c] += a0 * x0[c] + a1 * x1[c] + a2 * x2[c] + a3 * x3[c]
                    lower[c] += b0 * x0[c] + b1 * x1[c] + b2 * x2[c] + b3 * x3[c]


@_inner
def _subtract(column, pending, first, size, count, place):
    """`column -= pending' pending[:, place]` on first .. size."""
    q = 0
    target = column[first:size]
    while q + 4 <= count:
        a0, a1, a2, a3 = pending[q, place], pending[q + 1, place], pending[q + 2, place], pending[q + 3, place]
        x0, x1 = pending[q, first:size], pending[q + 1, first:size]
        x2, x3 = pending[q + 2, first:size], pending[q + 3, first:size]
        for c in range(size - first):
            target[c] -= a0 * x0[c] + a1 * x1[c] + a2 * x2[c] + a3 * x3[c]
        q += 4
    while q < count:
        a0, x0 = pending[q, place], pending[q, first:size]
        for c in range(size - first):
            target[c] -= a0 * x0[c]
        q += 1


@_inner
def _compact(matrix, source, where, size):
    """Bring what is at where[p] of `source` to place p of `matrix`, for every p < size.

    The two may be one matrix: where[p] is p, or at least `size` and so never overwritten.
    """
    moved = np.empty(size, np.int64)
    count = 0
    for p in range(size):
        r = where[p]
        if r == p:
            matrix[p, : p + 1] = source[p, : p + 1]
            for k in range(count):
                matrix[p, moved[k]] = source[where[moved[k]], p]
        else:
            for c in range(p + 1):
                matrix[p, c] = source[max(r, where[c]), min(r, where[c])]
            moved[count] = p
            count += 1
    for p in range(size):
        where[p] = p


@_inner
def _eliminate(column, work, place, size):
    """Remove the weight at `place`; `column` becomes what the inverse loses. True if digits were lost."""
    weight, diagonal, floor, score = work[0], work[1], work[2], work[3]
    root = 1 / np.sqrt(diagonal[place])
    step = weight[place] * root
    floor[place] = -np.inf
    lost = 0
    for c in range(size):
        column[c] *= root
        weight[c] -= step * column[c]
        diagonal[c] -= column[c] * column[c]
        score[c] = weight[c] * weight[c] / diagonal[c]
        lost += diagonal[c] < floor[c]
    return lost > 0


@_inner
def _start(inverse, columns, weights, work):
    """Weight, diagonal, floor and score in rows 0 to 3 of `work`, the columns after. True if digits were lost."""
    d, lost = len(weights), 0
    work[0, :d] = weights
    work[4 : 4 + len(columns), :d] = columns
    for c in range(d):
        diagonal = inverse[c, c]
        for k in range(len(columns)):
            diagonal -= columns[k, c] * columns[k, c]
        work[1, c] = diagonal
        work[2, c] = LOST * inverse[c, c]
        work[3, c] = weights[c] * weights[c] / diagonal
        lost += diagonal < work[2, c]
    return lost > 0


@_inner
def _drop(work, index, where, place, size):
    """Give `place` to the last one in use; one place fewer."""
    work[:, place] = work[:, size - 1]
    index[place] = index[size - 1]
    where[place] = where[size - 1]
    return size - 1


@_inner
def _trace_row(inverse, columns, weights, groups, quotas, matrix, work, order, increments):
    """One row of `trace`: how many removals were made before digits were lost."""
    size, count = len(weights), len(columns)
    index, where, left = np.arange(size), np.arange(size), quotas.copy()
    source, pending, score = inverse, work[4:], work[3]
    if _start(inverse, columns, weights, work):
        return 0
    for done in range(len(order)):
        if count >= _BLOCK:
            _compact(matrix, source, where, size)
            _rank_update(matrix, pending, 0, size, count, -1.0)
            source, count = matrix, 0
        p = 0
        for c in range(1, size):
            if score[c] < score[p]:
                p = c
        order[done], increments[done] = index[p], score[p]
        column, r = pending[count], where[p]
        for c in range(size):
            column[c] = source[max(r, where[c]), min(r, where[c])]
        _subtract(column, pending, 0, size, count, p)
        lost = _eliminate(column, work, p, size)
        count += 1
        size = _drop(work, index, where, p, size)
        group = groups[order[done]]
        left[group] -= 1
        if left[group] == 0:
            for c in range(size - 1, -1, -1):
                if groups[index[c]] == group:
                    size = _drop(work, index, where, c, size)
        if lost:
            return done + 1
    return len(order)


def trace(inverse, columns, weights, groups, quotas):
    return _trace(inverse, columns, weights, groups, quotas, numba.get_num_threads())


@kernel
def _trace(inverse, columns, weights, groups, quotas, threads):
    m, d = weights.shape
    total = quotas.sum()
    order = np.zeros((m, total), np.int64)
    increments = np.zeros((m, total))
    done = np.empty(m, np.int64)
    for thread in prange(threads):
        matrix = np.zeros((d + 1, d + 1))
        work = np.zeros((8 + max(len(columns), _BLOCK), d + 1))
        for i in range(thread, m, threads):
            done[i] = _trace_row(
                inverse, columns[:, i], weights[i], groups, quotas, matrix, work, order[i], increments[i]
            )
    return order, increments, done


@_inner
def _cholesky_solve(matrix, pending, unit, x, size):
    """Solve in place by the Cholesky factor, whose columns go to the upper triangle; the smallest pivot / unit."""
    smallest = 1.0
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        for c in range(start, size):
            for j in range(start, min(c + 1, stop)):
                pending[j - start, c] = matrix[c, j]
        for j in range(start, stop):
            column = pending[j - start]
            _subtract(column, pending, j, size, j - start, j)
            smallest = min(smallest, column[j] / unit[j])
            if not column[j] > 0:
                return smallest
            column[j:size] /= np.sqrt(column[j])
            matrix[j, j:size] = column[j:size]
            x[j] /= column[j]
            x[j + 1 : size] -= x[j] * column[j + 1 : size]
        _rank_update(matrix, pending, stop, size, stop - start, -1.0)
    for j in range(size - 1, -1, -1):
        total = x[j]
        for c in range(j + 1, size):
            total -= matrix[j, c] * x[c]
        x[j] = total / matrix[j, j]
    return smallest


def solve_restricted(shared, factors, sign, right, chosen):
    return _solve_restricted(shared, factors, sign, right, chosen, numba.get_num_threads())


@kernel
def _solve_restricted(shared, factors, sign, right, chosen, threads):
    m, d = right.shape
    n = len(factors)
    out = np.zeros((m, d))
    pivots = np.ones(m)
    for thread in prange(threads):
        matrix = np.zeros((d + 1, d + 1))
        pending = np.zeros((4 + max(n, _BLOCK), d + 1))
        for i in range(thread, m, threads):
            index = np.flatnonzero(chosen[i])
            size = len(index)
            for p in range(size):
                for c in range(p + 1):
                    matrix[p, c] = shared[index[p], index[c]]
                for k in range(n):
                    pending[k, p] = factors[k, i, index[p]]
            unit = np.diag(matrix)[:size].copy()
            _rank_update(matrix, pending, 0, size, n, sign)
            x = right[i][index]
            pivots[i] = _cholesky_solve(matrix, pending, unit, x, size)
            if pivots[i] > 0:
                out[i][index] = x
    return out, pivots


@kernel
def hull_slopes(increments):
    """Slopes (m, d) of the lower convex hull of each row's added-up increments (m, d): they never fall."""
    m, d = increments.shape
    slopes = np.empty((m, d))
    for i in prange(m):
        first, total, top = np.empty(d + 1, np.int64), np.empty(d), 0
        for k in range(d):
            first[top], total[top] = k, increments[i, k]
            top += 1
            first[top] = k + 1
            while top > 1 and (
                total[top - 2] * (first[top] - first[top - 1])
                >= total[top - 1] * (first[top - 1] - first[top - 2])
            ):
                total[top - 2] += total[top - 1]
                first[top - 1] = k + 1
                top -= 1
        for block in range(top):
            slopes[i, first[block] : first[block + 1]] = total[block] / (first[block + 1] - first[block])
    return slopes
