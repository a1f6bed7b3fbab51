"""Optimal Brain Surgeon's inner loops for CuPy arrays: every row is one thread block's (obs.cu).

`obs_batched` has the same functions, with the same arguments, for any device; its docstrings hold the
mathematics. There each removal is many launches over some rows, here all removals of all rows are one.
"""

import numpy as np

from moonshot.linalg import cuda
from moonshot.linalg.backend import Array, asarray_like, contiguous, namespace
from moonshot.solvers.obs_batched import LOST

SOURCE = "solvers/obs.cu"
_BLOCK, _TILE = 32, 64
_THREADS = 256
_ROWS = 512  # at once at most: a few for each multiprocessor


def trace(
    inverse: Array, columns: Array, weights: Array, groups: np.ndarray, quotas: np.ndarray
) -> tuple[Array, Array, Array]:
    xp = namespace(weights)
    (m, d), n, total = weights.shape, len(columns), int(quotas.sum())
    order, increments = xp.zeros((m, total), dtype=xp.int64), xp.zeros((m, total), dtype=xp.float64)
    done = xp.zeros(m, dtype=xp.int64)
    kinds, limits = (asarray_like(x.astype(np.int32), weights) for x in (groups, quotas))
    arrays = (inverse, columns, weights, kinds, limits, order, increments, done)
    _launch("trace", arrays, (n, m, d, total, len(quotas)), 3 + max(n, _BLOCK), 3 * d + len(quotas))
    return order, increments, done


def solve_restricted(
    shared: Array, factors: Array, sign: float, right: Array, chosen: Array
) -> tuple[Array, Array]:
    xp = namespace(right)
    (m, d), n = right.shape, len(factors)
    out, pivots = xp.zeros_like(right), xp.ones(m, dtype=xp.float64)
    arrays = (shared, xp.astype(factors, xp.float64), np.float64(sign), right, chosen, out, pivots)
    _launch("solve_restricted", arrays, (n, m, d), 1 + _BLOCK, d)
    return out, pivots


def _launch(name: str, arguments: tuple, sizes: tuple[int, ...], vectors: int, integers: int) -> None:
    """Run a kernel with these arguments, work space and sizes, m and d the second and third of them.

    vectors, integers: how many vectors (d,) and integers are in the work space of a thread block.
    """
    first, (_, m, d) = arguments[0], sizes[:3]
    xp = namespace(first)
    each = 8 * d * (d + vectors) + 4 * integers
    rows = max(1, min(m, _ROWS, cuda.free_memory(first) // 2 // each))
    space = (
        xp.empty((rows, d, d), dtype=xp.float64),
        xp.empty((rows, vectors, d), dtype=xp.float64),
        xp.empty((rows, integers), dtype=xp.int32),
    )
    passed = (item if np.isscalar(item) else contiguous(item) for item in (*arguments, *space))
    numbers = (np.int32(size) for size in sizes)
    cuda.launch(SOURCE, options(), name, rows, _THREADS, (*passed, *numbers))


def options() -> tuple[str, ...]:
    """What the source is compiled with."""
    return (f"-DBLOCK={_BLOCK}", f"-DTILE={_TILE}", f"-DLOST={LOST}")
