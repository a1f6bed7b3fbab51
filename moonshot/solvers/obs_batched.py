"""Optimal Brain Surgeon as batched array operations, for CuPy and torch on a device.

A row with the inverse `G = H^-1` over the weights it still has loses the weight j for `w_j^2 / G_jj`. What is left has

    w <- w - b w_j / sqrt(G_jj)      G <- G - b b'      b = G e_j / sqrt(G_jj)

Only the diagonal of G is brought up to date at once. The columns b wait: the column of the next weight is that of
the stored G less the share of those waiting, and every `_BLOCK` removals G loses them all in one matrix product and
shrinks to the weights that can still go. A diagonal entry is what remains of the one it started from, so it tells how
many digits are gone. Below `LOST` of its start the row stops, and its caller goes on from a fresh inverse.

Rows are taken in slices, of `_BYTES` of memory.
"""

import numpy as np

from moonshot.linalg.backend import Array, asarray_like, eye_like, namespace, triangular_solve, zeros_like_shape
from moonshot.linalg.factor import NotPositiveDefiniteError, cholesky
from moonshot.linalg.lowrank import by_row

LOST = 1e-8
_BLOCK = 64
_BYTES = 2**30


def trace(
    inverse: Array, columns: Array, weights: Array, groups: np.ndarray, quotas: np.ndarray
) -> tuple[Array, Array, Array]:
    """Remove weights one by one, in every row the cheapest first, until each group has lost its quota.

    inverse: (d, d); columns: (n, m, d); row i starts from `inverse - columns_i columns_i'`. weights: (m, d).
    groups: (d,), the group of each column; quotas: how many weights each group loses. NumPy, of integers.

    Returns the order of removal (m, k) in columns, the loss each adds (m, k), and how many removals of each
    row can be trusted (m,), k unless digits were lost.
    """
    xp = namespace(weights)
    there, limits = asarray_like(groups, weights), asarray_like(quotas, weights)
    parts = [
        _trace(inverse, columns[:, rows], weights[rows], there, limits, int(quotas.sum()))
        for rows in _slices(*weights.shape)
    ]
    return tuple(xp.concat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def solve_restricted(
    shared: Array, factors: Array, sign: float, right: Array, chosen: Array
) -> tuple[Array, Array]:
    """Solutions of `(shared + sign * factors_i factors_i')[S_i, S_i] x = right_i[S_i]`, zero outside S_i.

    shared: (d, d); factors: (n, m, d); right: (m, d); chosen: (m, d) booleans, S_i.

    Returns x (m, d) and the smallest pivot of each row (m,), relative to the diagonal of `shared`: near 0, digits
    are lost; at 0 or below, the matrix is not positive definite and x is zero.
    """
    xp = namespace(right)
    parts = [
        _solve_restricted(shared, factors[:, rows], sign, right[rows], chosen[rows])
        for rows in _slices(*right.shape)
    ]
    return tuple(xp.concat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _slices(m: int, d: int) -> list[slice]:
    width = max(1, _BYTES // (4 * 8 * d * d))  # up to four matrices a row at a time
    return [slice(start, min(start + width, m)) for start in range(0, m, width)]


def _combined(shared: Array, factors: Array, sign: float) -> Array:
    """`shared + sign * factors_i factors_i'` of every row, (m, d, d)."""
    xp = namespace(shared)
    rows = by_row(factors)
    return shared + sign * (rows @ xp.permute_dims(rows, (0, 2, 1)))


def _trace(inverse, columns, weights, groups, quotas, total):
    xp = namespace(weights)
    m, d = weights.shape
    matrix = _combined(inverse, columns, -1.0)
    diagonal = xp.linalg.diagonal(matrix)
    floor = LOST * xp.linalg.diagonal(inverse) + 0 * diagonal
    rows = asarray_like(np.arange(m), weights)
    index = asarray_like(np.arange(d), weights) + 0 * rows[:, None]
    left = quotas + 0 * rows[:, None]
    alive = left[rows[:, None], groups[index]] > 0
    done = xp.where(xp.any(diagonal < floor, axis=1), 0 * rows, 0 * rows + total)
    order = asarray_like(np.zeros((m, total), np.int64), weights)
    increments = zeros_like_shape(weights, (m, total))
    pending = zeros_like_shape(weights, (m, _BLOCK, d))
    weight = weights
    for k in range(total):
        if k and k % _BLOCK == 0:
            matrix = matrix - xp.permute_dims(pending, (0, 2, 1)) @ pending
            size = int(xp.max(xp.sum(alive, axis=1)))
            places = xp.argsort(xp.astype(~alive, xp.int8), axis=1, stable=True)[:, :size]
            matrix = matrix[rows[:, None, None], places[:, :, None], places[:, None, :]]
            weight, diagonal, floor, index, alive = (
                x[rows[:, None], places] for x in (weight, diagonal, floor, index, alive)
            )
            pending = zeros_like_shape(weights, (m, _BLOCK, size))
        score = xp.where(alive, weight**2 / diagonal, xp.inf + 0 * weight)
        place = xp.argmin(score, axis=1)
        removed, root = index[rows, place], xp.sqrt(diagonal[rows, place])
        order[:, k], increments[:, k] = removed, score[rows, place]
        column = matrix[rows, place] - (pending[rows, :, place][:, None, :] @ pending)[:, 0]
        step = weight[rows, place] / root
        left[rows, groups[removed]] -= 1
        alive[rows, place] = False
        alive = alive & (left[rows[:, None], groups[index]] > 0)
        column = xp.where(alive, column / root[:, None], 0 * column)
        pending[:, k % _BLOCK] = column
        weight = weight - step[:, None] * column
        diagonal = diagonal - column**2
        lost = xp.any(alive & ~(diagonal >= floor), axis=1) & (done == total)
        done = xp.where(lost, 0 * done + (k + 1), done)
    return order, increments, done


def _solve_restricted(shared, factors, sign, right, chosen):
    xp = namespace(right)
    m, d = right.shape
    both = chosen[:, :, None] & chosen[:, None, :]
    matrix = xp.where(both, _combined(shared, factors, sign), eye_like(shared, d))
    try:
        lower = cholesky(matrix, "a row's Hessian on its support")
    except NotPositiveDefiniteError:
        return 0 * right, zeros_like_shape(right, (m,))
    half = triangular_solve(lower, xp.where(chosen, right, 0 * right)[:, :, None], lower=True)
    x = triangular_solve(xp.permute_dims(lower, (0, 2, 1)), half, lower=False)[:, :, 0]
    pivots = xp.linalg.diagonal(lower) ** 2 / xp.linalg.diagonal(shared)
    return x, xp.min(xp.where(chosen, pivots, 0 * pivots + 1), axis=1)
