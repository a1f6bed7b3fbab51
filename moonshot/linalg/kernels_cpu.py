"""Inner loops for NumPy arrays, compiled by numba, rows in parallel.

`kernels_batched` has the functions of the sweep with the same arguments for arrays on a device; its docstrings hold
the mathematics. Here the n x n state of a row stays in cache, and columns are copied out of the (n, m, d)
factors a block at a time so that reads are contiguous.
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
if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
_ONE_CALLER = Lock()

FAST = {"reassoc", "contract", "nsz", "arcp"}  # NaN and infinity keep their meaning
_CHUNK = 64


def kernel(function: Callable) -> Callable:
    """Compile a function with parallel loops over rows, and let one thread call it at a time."""
    compiled = njit(parallel=True, fastmath=FAST, cache=True)(function)

    @wraps(function)
    def run(*arguments):
        with _ONE_CALLER:
            return compiled(*arguments)

    return run


@kernel
def gains(p):
    n, m, d = p.shape
    t = np.empty((m, d, n), p.dtype)
    phi = np.empty((m, d), p.dtype)
    one = p.dtype.type(1)
    for i in prange(m):
        inverse = np.eye(n, dtype=p.dtype)
        columns = np.empty((_CHUNK, n), p.dtype)
        for stop in range(d, 0, -_CHUNK):
            start = max(stop - _CHUNK, 0)
            for k in range(n):
                for j in range(start, stop):
                    columns[j - start, k] = p[k, i, j]
            for j in range(stop - 1, start - 1, -1):
                column = columns[j - start]
                gain = t[i, j]
                inner = one
                for k in range(n):
                    product = p.dtype.type(0)
                    for q in range(n):
                        product += inverse[k, q] * column[q]
                    gain[k] = product
                    inner += product * column[k]
                shrink = one / inner
                phi[i, j] = shrink
                for k in range(n):
                    factor = gain[k] * shrink
                    for q in range(n):
                        inverse[k, q] -= factor * gain[q]
                for k in range(n):
                    gain[k] *= shrink
    return t, phi


@njit(inline="always")
def _load(p, i, start, stop):
    n = p.shape[0]
    columns = np.empty((stop - start, n), p.dtype)
    for k in range(n):
        for j in range(start, stop):
            columns[j - start, k] = p[k, i, j]
    return columns


@kernel
def scores(a, r, p, t, phi, residual, start, stop):
    n, m = residual.shape[1], residual.shape[0]
    width = stop - start
    out = np.empty((m, width), a.dtype)
    for i in prange(m):
        value = a[i, start:stop].copy()
        if n > 0:
            columns = _load(p, i, start, stop)
            rest = residual[i].copy()
            for j in range(width):
                mu = a.dtype.type(0)
                for k in range(n):
                    mu += t[i, start + j, k] * rest[k]
                for k in range(n):
                    rest[k] -= columns[j, k] * mu
                for q in range(j, width):
                    value[q] += r[start + j, start + q] * mu
        for j in range(width):
            pivot = r[start + j, start + j]
            out[i, j] = value[j] * value[j] / (pivot * pivot * phi[i, start + j])
    return out


@kernel
def sweep(a, r, p, t, residual, keep, z, start, stop):
    m, n = residual.shape
    for i in prange(m):
        columns = _load(p, i, start, stop)
        _sweep_row(a[i], r, columns, t[i], residual[i], keep[i], z[i], start, start, stop, stop, n)


@kernel
def sweep_groups(a, r, p, t, phi, residual, keep, z, start, stop, kept, group):
    m, n = residual.shape
    for i in prange(m):
        columns = _load(p, i, start, stop)
        value = np.empty(group, a.dtype)
        rest = np.empty(n, a.dtype)
        for first in range(start, stop, group):
            for j in range(group):
                value[j] = a[i, first + j]
            for k in range(n):
                rest[k] = residual[i, k]
            for j in range(group):
                if n > 0:
                    mu = a.dtype.type(0)
                    for k in range(n):
                        mu += t[i, first + j, k] * rest[k]
                    for k in range(n):
                        rest[k] -= columns[first + j - start, k] * mu
                    for q in range(j, group):
                        value[q] += r[first + j, first + q] * mu
            for j in range(group):
                pivot = r[first + j, first + j]
                value[j] = value[j] * value[j] / (pivot * pivot * phi[i, first + j])
                keep[i, first + j] = True
            for _ in range(group - kept):
                smallest = -1
                for j in range(group):
                    if keep[i, first + j] and (smallest < 0 or value[j] < value[smallest]):
                        smallest = j
                keep[i, first + smallest] = False
            _sweep_row(a[i], r, columns, t[i], residual[i], keep[i], z[i], start, first, first + group, stop, n)


@njit(fastmath=FAST, inline="always")
def _sweep_row(a, r, columns, t, residual, keep, z, block, start, stop, last, n):
    """Fix columns start..stop of one row and compensate those up to `last`."""
    for j in range(start, stop):
        if keep[j]:
            step = a.dtype.type(0)
            for k in range(n):
                step += t[j, k] * residual[k]
        else:
            step = -a[j] / r[j, j]
        z[j] = step
        if step != 0:
            for k in range(n):
                residual[k] -= columns[j - block, k] * step
            for q in range(j, last):
                a[q] += r[j, q] * step
        if not keep[j]:
            a[j] = a.dtype.type(0)


@kernel
def project(factors, x):
    n, m, d = factors.shape
    out = np.empty((n, m), x.dtype)
    for i in prange(m):
        for k in range(n):
            total = x.dtype.type(0)
            for j in range(d):
                total += factors[k, i, j] * x[i, j]
            out[k, i] = total
    return out


@kernel
def combine(factors, coefficients):
    n, m, d = factors.shape
    out = np.zeros((m, d), coefficients.dtype)
    for i in prange(m):
        for k in range(n):
            coefficient = coefficients[k, i]
            for j in range(d):
                out[i, j] += factors[k, i, j] * coefficient
    return out


@kernel
def capacitance(p, weights):
    n, m, d = p.shape
    out = np.empty((m, n, n), p.dtype)
    for i in prange(m):
        for k in range(n):
            for q in range(k + 1):
                total = p.dtype.type(1 if k == q else 0)
                for j in range(d):
                    total += p[k, i, j] * p[q, i, j] * weights[j]
                out[i, k, q] = total
                out[i, q, k] = total
    return out


@kernel
def correct(y, factors, weights, inverses):
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
                y[i, j] -= factors[k, i, j] * weights[j] * coefficient
