"""Products with a matrix that are faster than plain ones: made again and again, or with a triangular one."""

from typing import Any

import numpy as np
import scipy  # whose linalg is imported where it is first used

from moonshot.linalg.backend import (
    Array,
    as_dtype,
    contiguous,
    dtype_name,
    is_cupy,
    is_numpy,
    namespace,
    zeros_like_shape,
)
from moonshot.linalg.factor import gram

_ROWS = 256  # whose P_i there are at a time
_NUMBERS = 2**26  # that P has at most at a time on a GPU, where many rows are multiplied as fast as few
_STRIP = 256  # rows of a triangular matrix multiplied at once, where no BLAS does that


class Times:
    """Products with one square matrix M (d, d), again and again: `x M` for x (m, d), in its own dtype."""

    def __init__(self, matrix: Array):
        self._matrix, self._by_parts = matrix, None
        if is_cupy(matrix):
            from moonshot.linalg import split_cuda

            if split_cuda.possible(matrix):
                self._by_parts = split_cuda.below(contiguous(matrix))

    def __call__(self, x: Array) -> Array:
        if self._by_parts is None:
            return x @ self._matrix
        from moonshot.linalg import split_cuda

        return split_cuda.product(contiguous(x), self._by_parts)


def square(r: Array) -> Array:
    """`R'R`, (d, d), in the dtype of R."""
    return Times(r)(r.T) if is_cupy(r) else r.T @ r  # of which NumPy computes one half


def half_product(factors: Array, r: Array, lanes: int) -> Array:
    """`P_i = R U_i` for every row i, in tiles of rows: (d, tiles, n, lanes), zero beyond the last row.

    factors: (n, m, d), the U_i' stacked by factor; r: (d, d) upper triangular; lanes: rows of a tile. Uses that R is
    triangular: little more than m n d^2 / 2 multiply-adds instead of m n d^2.
    """
    n, m, d = factors.shape
    if is_numpy(factors):
        from moonshot.linalg import kernels

        out = kernels.tiled(factors, lanes)
        if n:  # in place: the BLAS reads transposes, and multiplies from the right
            columns = out.reshape(d, -1).T
            _blas("trmm", factors)(1.0, contiguous(r).T, columns, side=1, lower=1, overwrite_b=1)
        return out
    xp = namespace(factors)
    tiles = -(-m // lanes)
    if m % lanes:
        missing = zeros_like_shape(factors, (n, tiles * lanes - m, d))
        factors = xp.concat((factors, missing), axis=1)
    by_tile = xp.permute_dims(factors.reshape(n, tiles, lanes, d), (1, 0, 2, 3))
    rows = by_tile.reshape(tiles * n * lanes, d)
    if is_cupy(r):
        from moonshot.linalg import split_cuda

        if split_cuda.possible(r):
            return split_cuda.triangular_product(rows, contiguous(r), _STRIP).reshape(d, tiles, n, lanes)
    columns = rows.T
    out = zeros_like_shape(columns, columns.shape)
    for start in range(0, d, _STRIP):
        stop = min(start + _STRIP, d)
        xp.matmul(r[start:stop, start:], columns[start:], out=out[start:stop])
    return out.reshape(d, tiles, n, lanes)


def half_product_by_factor(factors: Array, r: Array) -> Array:
    """`P_i = R U_i` for every row i, as the factors are laid out: (n, m, d)."""
    n, m, d = factors.shape
    if is_numpy(factors) and n:
        columns = factors.copy().reshape(n * m, d).T
        return _blas("trmm", factors)(
            1.0, contiguous(r).T, columns, lower=1, trans_a=1, overwrite_b=1
        ).T.reshape(n, m, d)
    product = half_product(factors, r, lanes=m)[:, 0]
    return contiguous(namespace(factors).permute_dims(product, (1, 2, 0)))


def half_product_grams(factors: Array, r: Array) -> Array:
    """`P_i' P_i` for every row i, P_i = R U_i: (m, n, n), in the dtype of r.

    factors: (n, m, d), the U_i' stacked by factor; r: (d, d) upper triangular. A few rows' P_i are there at a time.
    """
    n, m, d = factors.shape
    dtype, by_column = dtype_name(r), False
    if is_cupy(factors):
        from moonshot.linalg import cuda, lowrank_cuda

        by_column = lowrank_cuda.gram_fits(n, dtype, cuda.shared_memory(factors))
    rows = max(_NUMBERS // (n * d), _ROWS) if by_column else _ROWS
    grams = []
    for start in range(0, m, rows):
        part = as_dtype(factors[:, start : start + rows], dtype)
        grams.append(
            lowrank_cuda.gram(half_product(part, r, 1)[..., 0])
            if by_column
            else gram(half_product_by_factor(part, r))
        )
    return namespace(r).concat(grams, axis=0)


def _blas(name: str, array: np.ndarray) -> Any:
    (routine,) = scipy.linalg.get_blas_funcs((name,), (array,))
    return routine
