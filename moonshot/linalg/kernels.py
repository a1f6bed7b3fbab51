"""Inner loops for NumPy arrays, compiled by numba, rows in parallel.

`sparsegpt_kernels` has those of the sequential sweep.
"""

import os
from collections.abc import Callable
from functools import wraps
from threading import Lock

import numba
import numpy as np
from numba import njit, prange

# numba's own threads sleep between kernels. OpenMP's spin, and keep the BLAS's and torch's off the cores: ADMM on
# joint Hessians took more than twice as long. They serve one caller at a time, hence the lock.
if "NUMBA_THREADING_LAYER" not in os.environ and numba.config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
_ONE_CALLER = Lock()

_LINE = 64  # columns transposed at once
_LANES = 64  # groups ranked side by side

FAST = {"reassoc", "contract", "nsz", "arcp"}  # NaN and infinity keep their meaning


def kernel(function: Callable) -> Callable:
    """Compile a function with parallel loops over rows, and let one thread call it at a time."""
    compiled = njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)(function)

    @wraps(function)
    def run(*arguments):
        with _ONE_CALLER:
            return compiled(*arguments)

    return run


@njit(fastmath=FAST, inline="always")
def _dot(a, b):
    total = b.dtype.type(0)
    for j in range(len(b)):
        total += a[j] * b[j]
    return total


@kernel
def project(factors, x):
    n, m, d = factors.shape
    out = np.empty((n, m), x.dtype)
    for i in prange(m):
        for k in range(n):
            out[k, i] = _dot(factors[k, i], x[i])
    return out


@njit(fastmath=FAST, inline="always")
def _times(a, b):
    out = np.empty_like(a)
    for j in range(len(a)):
        out[j] = a[j] * b[j]
    return out


@kernel
def apply(factors, x, scale):
    n, m, d = factors.shape
    out = np.zeros((m, d), x.dtype)
    for i in prange(m):
        scaled = _times(x[i], scale)
        for k in range(n):
            coefficient = _dot(factors[k, i], scaled)
            for j in range(d):
                out[i, j] += factors[k, i, j] * coefficient
        for j in range(d):
            out[i, j] *= scale[j]
    return out


@kernel
def refresh(factors, x, scale, inverses, coefficients):
    n, m, d = factors.shape
    out = np.zeros((m, d), x.dtype)
    for i in prange(m):
        scaled, change = _times(x[i], scale), np.empty(n, x.dtype)
        for k in range(n):
            change[k] = _dot(factors[k, i], scaled) - coefficients[i, k]
        for k in range(n):
            coefficients[i, k] += _dot(inverses[i, k], change)
            for j in range(d):
                out[i, j] += factors[k, i, j] * coefficients[i, k]
        for j in range(d):
            out[i, j] *= scale[j]
    return out


@kernel
def gram(p):
    n, m, d = p.shape
    out = np.empty((m, n, n), p.dtype)
    for i in prange(m):
        for k in range(n):
            row = p[k, i]
            for q in range(0, k - 2, 4):  # four dot products for one reading of the row
                a, b, c, e = p[q, i], p[q + 1, i], p[q + 2, i], p[q + 3, i]
                ka = kb = kc = ke = p.dtype.type(0)
                for j in range(d):
                    ka += row[j] * a[j]
                    kb += row[j] * b[j]
                    kc += row[j] * c[j]
                    ke += row[j] * e[j]
                out[i, k, q], out[i, k, q + 1], out[i, k, q + 2], out[i, k, q + 3] = ka, kb, kc, ke
            for q in range((k + 1) // 4 * 4, k + 1):
                out[i, k, q] = _dot(p[q, i], row)
            out[i, :k, k] = out[i, k, :k]
    return out


@kernel
def invert(matrices):
    """Inverses of symmetric positive definite matrices (m, n, n), in place."""
    m, n, _ = matrices.shape
    for i in prange(m):
        c = matrices[i]
        for k in range(n):  # sweep on each column: what is left is minus the inverse
            pivot = 1 / c[k, k]
            for a in range(n):
                if a != k:
                    factor = c[a, k] * pivot
                    for b in range(n):
                        c[a, b] -= factor * c[k, b]
                    c[a, k] = factor
            for b in range(n):
                c[k, b] *= pivot
            c[k, k] = -pivot
        for a in range(n):
            for b in range(n):
                c[a, b] = -c[a, b]


@njit(fastmath=FAST, inline="always")
def _rank_pair(earlier, later, rank_earlier, rank_later):
    for l in range(_LANES):
        dearer = np.int32(earlier[l] <= later[l])
        rank_later[l] += dearer
        rank_earlier[l] += 1 - dearer


@kernel
def smallest_of_few(scores, k):
    rows, columns = scores.shape
    mask = np.empty((rows, columns), np.bool_)
    for tile in prange((rows + _LANES - 1) // _LANES):
        first = tile * _LANES
        count = min(_LANES, rows - first)
        values, ranks = np.zeros((columns, _LANES), scores.dtype), np.zeros((columns, _LANES), np.int32)
        for j in range(columns):
            for l in range(count):
                values[j, l] = scores[first + l, j]
        for j in range(columns):
            for q in range(j):
                _rank_pair(values[q], values[j], ranks[q], ranks[j])
        for j in range(columns):
            rank = ranks[j]
            for l in range(count):
                mask[first + l, j] = rank[l] < k
    return mask


@kernel
def add_multiple(y, x, factor):
    m, d = x.shape
    for i in prange(m):
        for j in range(d):
            y[i, j] += factor * x[i, j]


@kernel
def correct(y, factors, inverses):
    n, m, d = factors.shape
    for i in prange(m):
        projected = np.empty(n, y.dtype)
        for k in range(n):
            total = y.dtype.type(0)
            for j in range(d):
                total += factors[k, i, j] * y[i, j]
            projected[k] = total
        for k in range(n):
            coefficient = y.dtype.type(0)
            for q in range(n):
                coefficient += inverses[i, k, q] * projected[q]
            for j in range(d):
                y[i, j] -= factors[k, i, j] * coefficient


@kernel
def transposed(a):
    """`a'`, in C order."""
    rows, columns = a.shape
    out = np.empty((columns, rows), a.dtype)
    for strip in prange((rows + _LINE - 1) // _LINE):  # both arrays are read and written in whole cache lines
        first, last = strip * _LINE, min((strip + 1) * _LINE, rows)
        for start in range(0, columns, _LINE):
            stop = min(start + _LINE, columns)
            for j in range(start, stop):
                for i in range(first, last):
                    out[j, i] = a[i, j]
    return out


@kernel
def reverse(a):
    """Turn a vector round, in place."""
    last = len(a) - 1
    for i in prange(len(a) // 2):
        a[i], a[last - i] = a[last - i], a[i]


@kernel
def asymmetry(a):
    """The largest `|a_ij - a_ji|` of a square matrix."""
    d = len(a)
    largest = np.zeros((d + _LINE - 1) // _LINE, a.dtype)
    for strip in prange(len(largest)):
        first, last = strip * _LINE, min((strip + 1) * _LINE, d)
        for start in range(0, last, _LINE):
            for i in range(first, last):
                for j in range(start, min(start + _LINE, i)):
                    largest[strip] = max(largest[strip], abs(a[i, j] - a[j, i]))
    return largest.max()


def tiled(factors: np.ndarray, lanes: int) -> np.ndarray:
    """Factors (n, m, d) in tiles of rows, (d, tiles, n, lanes), zero beyond the last row."""
    n, m, d = factors.shape
    out = np.empty((d, -(-m // lanes), n, lanes), factors.dtype)  # NumPy's large arrays have large pages
    _fill_tiles(factors, out)
    return out


@kernel
def _fill_tiles(factors, out):
    n, m, d = factors.shape
    _, tiles, _, lanes = out.shape
    for tile in prange(tiles):
        first, count = tile * lanes, min(lanes, m - tile * lanes)
        for k in range(n):
            for start in range(0, d, _LINE):  # what is read of a row stays in the cache for the columns after
                for j in range(start, min(start + _LINE, d)):
                    for l in range(count):
                        out[j, tile, k, l] = factors[k, first + l, j]
                    out[j, tile, k, count:] = 0
