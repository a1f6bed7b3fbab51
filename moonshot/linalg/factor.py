"""Factorisations of the shared matrix and of the rows' capacitance matrices.

The shared matrix A (d x d, positive definite) is factored once as `A = M M'` with M upper triangular,
which costs d^3/3, and inverted as `R = M^-1`, another d^3/3. R is upper triangular and `A^-1 = R'R`:
the factor that SparseGPT obtains by inverting A and factoring the inverse, for half the work and without
squaring the rounding error.
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import scipy  # whose linalg is imported where it is first used

from moonshot.errors import MoonshotError
from moonshot.linalg.backend import (
    Array,
    as_dtype,
    contiguous,
    eye_like,
    is_cupy,
    is_numpy,
    namespace,
    on_host,
    triangular_solve,
)


class NotPositiveDefiniteError(MoonshotError):
    """A matrix that must be positive definite is not. `pivot` is the smallest pivot found."""

    def __init__(self, what: str, pivot: float):
        self.pivot = pivot
        super().__init__(
            f"{what} is not positive definite (smallest pivot {pivot:.3g}): "
            "add a ridge to its diagonal, or raise dampening_frac"
        )


def inverse_factor(a: Array) -> Array:
    """R (d, d), upper triangular, with `A^-1 = R'R`, in float64.

    a: (d, d) symmetric. Raises NotPositiveDefiniteError.
    """
    a = as_dtype(a, "float64")
    if is_numpy(a):
        from moonshot.linalg import kernels

        # rows and columns in reverse: in C order that is the whole of it backwards
        backwards = a.ravel()[::-1].copy().reshape(a.shape)
        upper, info = scipy.linalg.lapack.dpotrf(backwards.T, lower=0, clean=1, overwrite_a=1)
        if info == 0:  # LAPACK reads the transpose as it lies in memory
            inverse, info = scipy.linalg.lapack.dtrtri(upper, lower=0, overwrite_c=1)
        if info != 0:
            raise NotPositiveDefiniteError("the shared matrix A", smallest_pivot(a))
        kernels.reverse(inverse.T.reshape(-1))
        return inverse.T
    xp = namespace(a)
    lower = cholesky(xp.flip(a), "the shared matrix A")
    return xp.flip(triangular_solve(lower, eye_like(a, a.shape[0]), lower=True))


def inverse(a: Array) -> Array:
    """The inverse of a positive definite matrix (d, d), in float64. Raises NotPositiveDefiniteError."""
    if not is_numpy(a):
        r = inverse_factor(a)
        return r.T @ r
    lower, info = scipy.linalg.lapack.dpotrf(a.T, lower=1, clean=1)
    if info == 0:
        lower, info = scipy.linalg.lapack.dpotri(lower, lower=1, overwrite_c=1)
    if info != 0:
        raise NotPositiveDefiniteError("the matrix", smallest_pivot(a))
    out = lower + lower.T
    np.fill_diagonal(out, np.diag(lower))
    return out


def solve(a: Array, b: Array) -> Array:
    """x with `a x = b` for a positive definite matrix a (d, d) and a vector b (d,). Raises NotPositiveDefiniteError."""
    if is_numpy(a):
        # LAPACK reads the transpose as it lies in memory
        _, x, info = scipy.linalg.lapack.dposv(a.T, b, lower=1)
        if info != 0:
            raise NotPositiveDefiniteError("the matrix", smallest_pivot(a))
        return x
    lower = cholesky(a, "the matrix")
    half = triangular_solve(lower, b[:, None], lower=True)
    return triangular_solve(contiguous(lower.T), half, lower=False)[:, 0]


def cholesky(a: Array, what: str) -> Array:
    """Lower Cholesky factor of one symmetric matrix or a batch; NotPositiveDefiniteError says `what`."""
    lower, definite = _cholesky(a)
    if definite:
        return lower
    matrices = as_dtype(a, "float64").reshape(-1, *a.shape[-2:])
    raise NotPositiveDefiniteError(what, min(smallest_pivot(matrix) for matrix in matrices))


def _cholesky(a: Array) -> tuple[Array, bool]:
    """The lower factor of one symmetric matrix or a batch, and whether it is one: all are positive definite."""
    xp = namespace(a)
    try:
        with _refusing(a):
            lower = xp.linalg.cholesky(a)
    except Exception as error:  # each backend has its own LinAlgError
        if "LinAlgError" not in type(error).__name__:
            raise
        return a, False
    pivots = xp.linalg.diagonal(lower)
    return lower, bool(xp.all(xp.isfinite(lower)) & xp.all(pivots > 0))  # not every backend raises


def _refusing(a: Array) -> AbstractContextManager:
    """CuPy raises LinAlgError inside, which it does not by itself."""
    if not is_cupy(a):
        return nullcontext()
    import cupyx

    return cupyx.errstate(linalg="raise")


def is_positive_definite(a: Array) -> bool:
    """Whether the Cholesky factorisation of a symmetric matrix (d, d) runs to its end. Overwrites `a`."""
    if is_numpy(a):  # LAPACK reads the transpose as it lies in memory
        single = a.dtype == np.float32
        potrf = scipy.linalg.lapack.spotrf if single else scipy.linalg.lapack.dpotrf
        lower, info = potrf(a.T, lower=1, clean=0, overwrite_a=1)
        pivots = np.diag(lower)
        return info == 0 and bool((np.isfinite(pivots) & (pivots > 0)).all())
    return _cholesky(a)[1]


def smallest_pivot(a: Array) -> float:
    """The smallest pivot of `a` (d, d) under elimination that stops at the first one not positive."""
    host = np.array(on_host(a), dtype=np.float64)
    lower, info = scipy.linalg.lapack.dpotrf(host, lower=1, clean=1)
    if info <= 0:
        return float(np.min(np.diag(lower)) ** 2)
    k = info - 1
    row = scipy.linalg.solve_triangular(lower[:k, :k], host[:k, k], lower=True) if k else host[:0, 0]
    return float(host[k, k] - row @ row)


def rescaled(a: Array, scale: Array) -> Array:
    """`S^-1 A S^-1`, (d, d), in C order, S = diag(scale); scale: (d,)."""
    a = contiguous(a) / scale[:, None]
    a /= scale
    return a


def eigenbasis(a: Array) -> tuple[Array, Array]:
    """Eigenvalues (d,) and eigenvectors (d, d) in columns of a symmetric matrix, in float64."""
    a = as_dtype(a, "float64")
    if is_numpy(a):
        return scipy.linalg.eigh(a, driver="evd", check_finite=False)
    values, vectors = namespace(a).linalg.eigh(a)
    return values, vectors


def gram(p: Array) -> Array:
    """`P_i' P_i` for every row, (m, n, n); p: (n, m, d), the P_i' stacked by factor."""
    if is_numpy(p):
        from moonshot.linalg import kernels

        return kernels.gram(p)
    xp = namespace(p)
    return xp.permute_dims(p, (1, 0, 2)) @ xp.permute_dims(p, (1, 2, 0))


def capacitance(p: Array) -> Array:
    """`I + P_i' P_i` for every row, (m, n, n); p: (n, m, d)."""
    return gram(p) + eye_like(p, p.shape[0])


def inverses(matrices: Array) -> Array:
    """The inverses of positive definite matrices (m, n, n), which may be overwritten."""
    if is_numpy(matrices):
        from moonshot.linalg import kernels

        kernels.invert(matrices)
        return matrices
    return namespace(matrices).linalg.inv(matrices)


def capacitance_solve(lower: Array, b: Array) -> Array:
    """Solutions (n, m) of the systems whose Cholesky factors are `lower` (m, n, n), right sides (n, m)."""
    xp = namespace(lower)
    columns = xp.permute_dims(b, (1, 0))[:, :, None]
    half = _batched_triangular(lower, columns, lower=True)
    whole = _batched_triangular(xp.permute_dims(lower, (0, 2, 1)), half, lower=False)
    return xp.permute_dims(whole[:, :, 0], (1, 0))


def _batched_triangular(factor: Array, b: Array, *, lower: bool) -> Array:
    if is_numpy(factor):
        return np.linalg.solve(factor, b)
    return triangular_solve(factor, b, lower=lower)
