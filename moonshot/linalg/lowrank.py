"""Products with every row's factors: `U_i' x_i` and `U_i U_i' x_i`, for factors stored (n, m, d)."""

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


def by_factor(factors: Array) -> Array:
    """Factors (m, d, n) as they are stored, (n, m, d) in C order; a copy only where they lie otherwise."""
    return contiguous(namespace(factors).permute_dims(factors, (2, 0, 1)))


def by_row(factors: Array) -> Array:
    """The view (m, d, n) of factors as they are stored."""
    return namespace(factors).permute_dims(factors, (1, 2, 0))


def squared_norm(factors: Array) -> float:
    """The sum of all squares; factors: (n, m, d)."""
    xp = namespace(factors)
    if is_cupy(factors):  # without a temporary
        squares = [xp.tensordot(factor, factor, axes=2) for factor in factors]
    else:
        squares = [xp.sum(factor**2) for factor in factors]
    return float(xp.sum(as_dtype(xp.stack(squares), "float64")))


def project(factors: Array, x: Array, scale: Array | None = None) -> Array:
    """`U_i' S x_i` for every row, (n, m), in the dtype of x; x: (m, d); S = diag(scale), (d,), None for I."""
    if is_cupy(factors):
        from moonshot.linalg import lowrank_cuda

        return lowrank_cuda.project(factors, x, scale)
    x = x if scale is None else x * scale
    if is_numpy(factors):
        from moonshot.linalg import kernels

        return kernels.project(factors, x)
    return (_by_row(factors, x) @ x[:, :, None])[:, :, 0].T


def apply(factors: Array, x: Array, scale: Array | None = None) -> Array:
    """`S U_i U_i' S x_i` for every row, (m, d), in the dtype of x; x: (m, d); S = diag(scale), (d,), None for I."""
    if is_numpy(factors):
        from moonshot.linalg import kernels

        return kernels.apply(factors, x, namespace(x).ones_like(x[0]) if scale is None else scale)
    return _combine(factors, project(factors, x, scale), scale)


def add_applied(y: Array, factors: Array, x: Array, scale: Array) -> Array:
    """`y_i + S U_i U_i' S x_i` for every row, (m, d). y may be overwritten."""
    if is_cupy(factors):
        from moonshot.linalg import lowrank_cuda

        y = contiguous(y)
        lowrank_cuda.add_applied(y, factors, x, scale)
    else:
        y += apply(factors, x, scale)
    return y


def refresh(factors: Array, x: Array, scale: Array, inverses: Array, coefficients: Array) -> Array:
    """Add `C_i^-1 (U_i' S x_i - c_i)` to the coefficients c_i, (m, n), in place; returns `S U_i c_i`, (m, d).

    x: (m, d); S = diag(scale), (d,); inverses: (m, n, n), of the capacitance matrices C_i.
    """
    if is_numpy(factors):
        from moonshot.linalg import kernels

        return kernels.refresh(factors, x, scale, inverses, coefficients)
    if is_cupy(factors):
        from moonshot.linalg import lowrank_cuda

        return lowrank_cuda.refresh(factors, x, scale, inverses, coefficients)
    xp = namespace(x)
    change = xp.permute_dims(project(factors, x, scale), (1, 0)) - coefficients
    coefficients += (inverses @ change[:, :, None])[:, :, 0]
    return _combine(factors, xp.permute_dims(coefficients, (1, 0)), scale)


def correct(y: Array, factors: Array, inverses: Array) -> Array:
    """`y_i - U_i C_i^-1 U_i' y_i`: the Woodbury correction. y may be overwritten.

    y: (m, d); factors: (n, m, d); inverses: (m, n, n), of the capacitance matrices.
    """
    if is_numpy(factors):
        from moonshot.linalg import kernels

        kernels.correct(y, factors, inverses)
        return y
    xp = namespace(y)
    projected = xp.permute_dims(project(factors, y), (1, 0))[:, :, None]
    return y - _combine(factors, xp.permute_dims((inverses @ projected)[:, :, 0], (1, 0)))


def diagonals(shared: Array, factors: Array, scale: Array) -> Array:
    """Diagonals of `A + S U_i U_i' S`, (m, d), in the dtype of that of A, shared (d,); S = diag(scale), (d,)."""
    if is_cupy(factors):
        from moonshot.linalg import lowrank_cuda

        out = zeros_like_shape(shared, factors.shape[1:]) + shared
        lowrank_cuda.add_diagonal(out, factors, scale)
        return out
    return sum(((u * scale) ** 2 for u in factors), start=shared[None, :])


def _combine(factors: Array, coefficients: Array, scale: Array | None = None) -> Array:
    """`S U_i c_i` for every row, (m, d); coefficients: (n, m)."""
    if is_cupy(factors):
        from moonshot.linalg import lowrank_cuda

        out = zeros_like_shape(coefficients, factors.shape[1:])
        lowrank_cuda.add_combined(out, factors, coefficients, scale)
        return out
    combined = (coefficients.T[:, None, :] @ _by_row(factors, coefficients))[:, 0]
    return combined if scale is None else combined * scale


def _by_row(factors: Array, x: Array) -> Array:
    """The U_i', (m, n, d), in the dtype of x."""
    return namespace(factors).permute_dims(as_dtype(factors, dtype_name(x)), (1, 0, 2))
