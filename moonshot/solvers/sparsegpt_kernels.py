"""The sequential sweep's inner loops for NumPy arrays, compiled by numba, tiles of rows in parallel.

`sparsegpt_batched` has the same functions, with the same arguments, for arrays on a device; its docstrings hold the
mathematics. Here the rows of a tile stand side by side, one row a lane, so that every loop of the recursion is one
over contiguous lanes. Their number is a constant large enough that the compiler makes vector code of such a loop
rather than unrolling it. Lanes beyond the last row are zero and stay so.
"""

import numpy as np
from numba import njit, prange

from moonshot.linalg.kernels import FAST, kernel

_LANES = 96


def lanes(rows: int) -> int:
    """Rows of a tile."""
    return _LANES


@njit(fastmath=FAST, inline="always")
def _tile(tile, m):
    first = tile * _LANES
    return first, min(first + _LANES, m)


@njit(fastmath=FAST, inline="always")
def _load(array, start, stop, first, last):
    """The tile's part of columns start..stop, (stop - start, lanes)."""
    out = np.zeros((stop - start, _LANES), array.dtype)
    for j in range(start, stop):
        for l in range(last - first):
            out[j - start, l] = array[j, first + l]
    return out


@njit(fastmath=FAST, inline="always")
def _add_product(target, a, b):
    for l in range(_LANES):
        target[l] += a[l] * b[l]


@njit(fastmath=FAST, inline="always")
def _subtract_product(target, a, b):
    for l in range(_LANES):
        target[l] -= a[l] * b[l]


@njit(fastmath=FAST, inline="always")
def _add_multiple(target, factor, a):
    for l in range(_LANES):
        target[l] += factor * a[l]


def gains(p: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    # NumPy's large arrays have large pages
    t, phi = np.empty_like(p), np.empty((*p.shape[:2], _LANES), p.dtype)
    _fill_gains(p, p.dtype.type(share), t, phi)
    return t, phi


@kernel
def _fill_gains(p, share, t, phi):
    d, tiles, n, _ = p.shape
    one = p.dtype.type(1)
    for tile in prange(tiles):
        inverse = np.zeros((n * (n + 1) // 2, _LANES), p.dtype)  # its lower triangle, row after row
        for k in range(n):
            inverse[k * (k + 3) // 2] = share
        u = np.empty((n, _LANES), p.dtype)
        for j in range(d - 1, -1, -1):
            column, gain, shrink = p[j, tile], t[j, tile], phi[j, tile]
            shrink[:] = one
            for k in range(n):
                row = inverse[k * (k + 1) // 2 : k * (k + 3) // 2 + 1]
                u[k] = 0
                for q in range(k):
                    for l in range(_LANES):
                        u[k, l] += row[q, l] * column[q, l]
                        u[q, l] += row[q, l] * column[k, l]
                _add_product(u[k], row[k], column[k])
            for k in range(n):
                _add_product(shrink, u[k], column[k])
            for l in range(_LANES):
                shrink[l] = one / shrink[l]
            for k in range(n):
                row = inverse[k * (k + 1) // 2 : k * (k + 3) // 2 + 1]
                for l in range(_LANES):
                    gain[k, l] = u[k, l] * shrink[l]
                for q in range(k + 1):
                    _subtract_product(row[q], gain[k], u[q])


@njit(fastmath=FAST, inline="always")
def _best_step(step, gain, rest):
    """mu = t' r, in every lane."""
    step[:] = 0
    for k in range(len(rest)):
        _add_product(step, gain[k], rest[k])


@njit(fastmath=FAST, inline="always")
def _cost(cost, r, p, t, phi, tile, rest, start, step):
    """Turn the values of columns start.. of a tile into what pruning each costs; `rest` is used up."""
    if len(rest) > 0:
        for j in range(len(cost)):
            _best_step(step, t[start + j, tile], rest)
            for k in range(len(rest)):
                _subtract_product(rest[k], p[start + j, tile, k], step)
            for q in range(j, len(cost)):
                _add_multiple(cost[q], r[start + j, start + q], step)
    for j in range(len(cost)):
        pivot, now, share = r[start + j, start + j], cost[j], phi[start + j, tile]
        for l in range(_LANES):
            now[l] = now[l] * now[l] / (pivot * pivot * share[l])


@njit(fastmath=FAST, inline="always")
def _fix(value, r, p, t, tile, rest, keep, z, start, j, first, last, step):
    """Fix column j of a tile and compensate the columns of `value`, which begins with column `start`."""
    _best_step(step, t[j, tile], rest)
    now = value[j - start]
    for l in range(last - first):
        step[l] = step[l] if keep[j, first + l] else -now[l] / r[j, j]
        z[j, first + l] = step[l]
    for k in range(len(rest)):
        _subtract_product(rest[k], p[j, tile, k], step)
    for q in range(j - start, len(value)):
        _add_multiple(value[q], r[j, start + q], step)
    for l in range(last - first):
        now[l] = now[l] if keep[j, first + l] else 0


@kernel
def scores(a, r, p, t, phi, residual, start, stop):
    m = a.shape[1]
    out = np.empty((stop - start, m), a.dtype)
    for tile in prange(len(residual)):
        first, last = _tile(tile, m)
        cost, step = _load(a, start, stop, first, last), np.zeros(_LANES, a.dtype)
        _cost(cost, r, p, t, phi, tile, residual[tile].copy(), start, step)
        out[:, first:last] = cost[:, : last - first]
    return out


@kernel
def sweep(a, r, p, t, residual, keep, z, start, stop):
    for tile in prange(len(residual)):
        first, last = _tile(tile, a.shape[1])
        value, step = _load(a, start, stop, first, last), np.zeros(_LANES, a.dtype)
        for j in range(start, stop):
            _fix(value, r, p, t, tile, residual[tile], keep, z, start, j, first, last, step)
        a[start:stop, first:last] = value[:, : last - first]


@kernel
def sweep_groups(a, r, p, t, phi, residual, keep, z, start, stop, kept, group):
    for tile in prange(len(residual)):
        first, last = _tile(tile, a.shape[1])
        value, step = _load(a, start, stop, first, last), np.zeros(_LANES, a.dtype)
        rest, ahead = residual[tile], residual[tile].copy()
        cost, rank = np.zeros((group, _LANES), a.dtype), np.zeros((group, _LANES), np.int32)
        for begin in range(start, stop, group):
            cost[:] = value[begin - start : begin - start + group]
            ahead[:] = rest
            _cost(cost, r, p, t, phi, tile, ahead, begin, step)
            rank[:] = 0  # how many of the group cost less, or as much and come earlier
            for j in range(group):
                for q in range(j):
                    for l in range(_LANES):
                        dearer = cost[q, l] <= cost[j, l]
                        rank[j, l] += dearer
                        rank[q, l] += 1 - dearer
            for j in range(group):
                for l in range(last - first):
                    keep[begin + j, first + l] = rank[j, l] >= group - kept
            for j in range(begin, begin + group):
                _fix(value, r, p, t, tile, rest, keep, z, start, j, first, last, step)
        a[start:stop, first:last] = value[:, : last - first]
