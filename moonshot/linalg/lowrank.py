"""Products with every row's factors: `U_i' x_i` and `U_i U_i' x_i`, for factors stored (n, m, d)."""

from moonshot.linalg.backend import Array, as_dtype, dtype_name, is_cupy, is_numpy, namespace


def project(factors: Array, x: Array) -> Array:
    """`U_i' x_i` for every row, (n, m), in the dtype of x; x: (m, d)."""
    if is_numpy(factors):
        from moonshot.linalg import kernels

        return kernels.project(factors, x)
    if is_cupy(factors):
        from moonshot.linalg import lowrank_cuda

        return lowrank_cuda.project(factors, x)
    return (_by_row(factors, x) @ x[:, :, None])[:, :, 0].T


def apply(factors: Array, x: Array, scale: Array | None = None) -> Array:
    """`S U_i U_i' S x_i` for every row, (m, d), in the dtype of x; x: (m, d); S = diag(scale), (d,), None for I."""
    scale = namespace(x).ones_like(x[0]) if scale is None else scale
    if is_numpy(factors):
        from moonshot.linalg import kernels

        return kernels.apply(factors, x, scale)
    return _combine(factors, project(factors, x * scale)) * scale


def refresh(factors: Array, x: Array, scale: Array, inverses: Array, coefficients: Array) -> Array:
    """Add `C_i^-1 (U_i' S x_i - c_i)` to the coefficients c_i, (m, n), in place; returns `S U_i c_i`, (m, d).

    x: (m, d); S = diag(scale), (d,); inverses: (m, n, n), of the capacitance matrices C_i.
    """
    if is_numpy(factors):
        from moonshot.linalg import kernels

        return kernels.refresh(factors, x, scale, inverses, coefficients)
    xp = namespace(x)
    change = xp.permute_dims(project(factors, x * scale), (1, 0)) - coefficients
    coefficients += (inverses @ change[:, :, None])[:, :, 0]
    return _combine(factors, xp.permute_dims(coefficients, (1, 0))) * scale


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


def _combine(factors: Array, coefficients: Array) -> Array:
    """`U_i c_i` for every row, (m, d); coefficients: (n, m)."""
    if is_cupy(factors):
        from moonshot.linalg import lowrank_cuda

        return lowrank_cuda.combine(factors, coefficients)
    return (coefficients.T[:, None, :] @ _by_row(factors, coefficients))[:, 0]


def _by_row(factors: Array, x: Array) -> Array:
    """The U_i', (m, n, d), in the dtype of x."""
    return namespace(factors).permute_dims(as_dtype(factors, dtype_name(x)), (1, 0, 2))
