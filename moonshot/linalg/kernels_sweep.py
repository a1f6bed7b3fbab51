"""The sequential sweep's inner loops for NumPy arrays, compiled by numba, tiles of rows in parallel.

`kernels_batched` has the same functions, with the same arguments, for arrays on a device; its docstrings hold the
mathematics. Here a tile of rows stands side by side, one row a lane, so that every loop of the recursion is one
over contiguous lanes. The number of lanes is a constant large enough that the compiler makes vector code of such a
loop rather than unrolling it.
"""

import numpy as np
from numba import njit, prange

from moonshot.linalg.kernels_cpu import FAST, kernel

_LANES = 64


@njit(fastmath=FAST, inline="always")
def _tile(tile, m):
    first = tile * _LANES
    return first, min(first + _LANES, m)


@njit(fastmath=FAST, inline="always")
def _load(target, source):
    """Copy (k, rows of the tile) into (k, lanes); lanes beyond the last row keep what they hold."""
    for k in range(source.shape[0]):
        for l in range(source.shape[1]):
            target[k, l] = source[k, l]


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


@kernel
def gains(p):
    d, n, m = p.shape
    t, phi = np.empty_like(p), np.empty((d, m), p.dtype)
    one = p.dtype.type(1)
    for tile in prange(-(-m // _LANES)):
        first, last = _tile(tile, m)
        inverse = np.zeros((n, n, _LANES), p.dtype)
        for k in range(n):
            inverse[k, k] = one
        column, u, gain = np.zeros((3, n, _LANES), p.dtype)
        shrink = np.empty(_LANES, p.dtype)
        for j in range(d - 1, -1, -1):
            _load(column, p[j, :, first:last])
            u[:] = 0
            shrink[:] = one
            for k in range(n):
                for q in range(n):
                    _add_product(u[k], inverse[k, q], column[q])
                _add_product(shrink, u[k], column[k])
            for l in range(_LANES):
                shrink[l] = one / shrink[l]
            for k in range(n):
                for l in range(_LANES):
                    gain[k, l] = u[k, l] * shrink[l]
            for k in range(n):
                for q in range(n):
                    _subtract_product(inverse[k, q], u[k], gain[q])
            phi[j, first:last] = shrink[: last - first]
            t[j, :, first:last] = gain[:, : last - first]
    return t, phi


@njit(fastmath=FAST, inline="always")
def _best_step(step, gain, rest):
    """mu = t' r, in every lane."""
    step[:] = 0
    for k in range(len(rest)):
        _add_product(step, gain[k], rest[k])


@njit(fastmath=FAST, inline="always")
def _cost(cost, r, p, t, phi, rest, start, first, last, column, gain, step):
    """Turn the values of columns start.. into what pruning each costs; `rest` is used up."""
    for j in range(len(cost)):
        if len(rest) > 0:
            _load(column, p[start + j, :, first:last])
            _load(gain, t[start + j, :, first:last])
            _best_step(step, gain, rest)
            for k in range(len(rest)):
                _subtract_product(rest[k], column[k], step)
            for q in range(j, len(cost)):
                _add_multiple(cost[q], r[start + j, start + q], step)
    for j in range(len(cost)):
        pivot = r[start + j, start + j]
        for l in range(last - first):
            cost[j, l] = cost[j, l] * cost[j, l] / (pivot * pivot * phi[start + j, first + l])


@njit(fastmath=FAST, inline="always")
def _fix(value, r, p, t, rest, keep, z, start, j, first, last, column, gain, step):
    """Fix column j of a tile and compensate the columns of `value`, which begins with column `start`."""
    _load(column, p[j, :, first:last])
    _load(gain, t[j, :, first:last])
    _best_step(step, gain, rest)
    now = value[j - start]
    for l in range(last - first):
        step[l] = step[l] if keep[j, first + l] else -now[l] / r[j, j]
        z[j, first + l] = step[l]
    for k in range(len(rest)):
        _subtract_product(rest[k], column[k], step)
    for q in range(j - start, len(value)):
        _add_multiple(value[q], r[j, start + q], step)
    for l in range(last - first):
        now[l] = now[l] if keep[j, first + l] else 0


@kernel
def scores(a, r, p, t, phi, residual, start, stop):
    n, m = residual.shape
    out = np.empty((stop - start, m), a.dtype)
    for tile in prange(-(-m // _LANES)):
        first, last = _tile(tile, m)
        column, gain, rest = np.zeros((3, n, _LANES), a.dtype)
        cost, step = np.zeros((stop - start, _LANES), a.dtype), np.zeros(_LANES, a.dtype)
        _load(cost, a[start:stop, first:last])
        _load(rest, residual[:, first:last])
        _cost(cost, r, p, t, phi, rest, start, first, last, column, gain, step)
        out[:, first:last] = cost[:, : last - first]
    return out


@kernel
def sweep(a, r, p, t, residual, keep, z, start, stop):
    n, m = residual.shape
    for tile in prange(-(-m // _LANES)):
        first, last = _tile(tile, m)
        column, gain, rest = np.zeros((3, n, _LANES), a.dtype)
        value, step = np.zeros((stop - start, _LANES), a.dtype), np.zeros(_LANES, a.dtype)
        _load(value, a[start:stop, first:last])
        _load(rest, residual[:, first:last])
        for j in range(start, stop):
            _fix(value, r, p, t, rest, keep, z, start, j, first, last, column, gain, step)
        a[start:stop, first:last] = value[:, : last - first]
        residual[:, first:last] = rest[:, : last - first]


@kernel
def sweep_groups(a, r, p, t, phi, residual, keep, z, start, stop, kept, group):
    n, m = residual.shape
    for tile in prange(-(-m // _LANES)):
        first, last = _tile(tile, m)
        column, gain, rest, ahead = np.zeros((4, n, _LANES), a.dtype)
        value, step = np.zeros((stop - start, _LANES), a.dtype), np.zeros(_LANES, a.dtype)
        cost, rank = np.zeros((group, _LANES), a.dtype), np.zeros((group, _LANES), np.int32)
        _load(value, a[start:stop, first:last])
        _load(rest, residual[:, first:last])
        for begin in range(start, stop, group):
            cost[:] = value[begin - start : begin - start + group]
            ahead[:] = rest
            _cost(cost, r, p, t, phi, ahead, begin, first, last, column, gain, step)
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
                _fix(value, r, p, t, rest, keep, z, start, j, first, last, column, gain, step)
        a[start:stop, first:last] = value[:, : last - first]
        residual[:, first:last] = rest[:, : last - first]
