"""Products with every row's factors: `U_i' x_i` and `U_i U_i' x_i`, for factors stored (n, m, d)."""

from moonshot.linalg.backend import Array, is_numpy, namespace


def project(factors: Array, x: Array) -> Array:
    """`U_i' x_i` for every row, (n, m), in the dtype of x; x: (m, d)."""
    if is_numpy(factors):
        from moonshot.linalg import kernels

        return kernels.project(factors, x)
    xp = namespace(x)
    return xp.stack([xp.sum(u * x, axis=1) for u in factors])


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
    product = factors[0] * coefficients[0][:, None]
    for u, c in zip(factors[1:], coefficients[1:], strict=True):
        product = product + u * c[:, None]
    return product
