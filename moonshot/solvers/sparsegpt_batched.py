"""The sequential sweep's inner loops as batched array operations, for CuPy and torch on a device.

A row's Hessian is `A + U U'`; `A^-1 = R'R` with R upper triangular, `P = R U` with rows p_j. Writing a change of
the row as `R' z` turns its loss into `|z|^2 + |P' z|^2`, so that columns can be fixed from left to right: with
T_j = (I + sum_{k >= j} p_k p_k')^-1 and the residual `r = -sum_{k < j} p_k z_k`,

    t_j = T_j p_j     phi_j = 1 - p_j' t_j     mu_j = t_j' r

With `P = R U / sqrt(s)` instead, s the share, T_j = (I / s + sum ...)^-1 leaves phi and mu as they are.

mu_j is the best z_j if column j is kept, and `value^2 / (R_jj^2 phi_j)` what pruning it costs.

Shapes: a, keep, z (d, m); r (d, d). What belongs to the low-rank part comes in tiles of rows, `lanes(m)` rows each:
p, t (d, tiles, n, lanes); phi (d, tiles, lanes); residual (tiles, n, lanes). Columns come before rows, so that what a
step of the sweep reads is contiguous. n may be 0. Here all rows are one tile.
"""

from moonshot.linalg.backend import Array, asarray_like, eye_like, namespace, smallest, zeros_like_shape


def lanes(rows: int) -> int:
    """Rows of a tile."""
    return rows


def gains(p: Array, share: float) -> tuple[Array, Array]:
    """t and phi of every column, from the last to the first.

    T_j follows from T_{j+1} by adding p_j p_j', which is stable where the downdate from left to right is
    not: `u = T_{j+1} p_j`, `phi_j = 1 / (1 + p_j' u)`, `t_j = phi_j u`, `T_j = T_{j+1} - phi_j u u'`.
    """
    xp = namespace(p)
    p = p[:, 0]
    d, n, m = p.shape
    t, phi = xp.empty_like(p), zeros_like_shape(p, (d, m))
    inverse = share * eye_like(p, n)[None] + zeros_like_shape(p, (m, 1, 1))
    for j in range(d - 1, -1, -1):
        u = (inverse @ p[j].T[:, :, None])[:, :, 0]
        phi[j] = 1 / (1 + xp.sum(u * p[j].T, axis=1))
        t[j] = u.T * phi[j]
        inverse = inverse - u[:, :, None] * t[j].T[:, None, :]
    return t[:, None], phi[:, None]


def scores(a: Array, r: Array, p: Array, t: Array, phi: Array, residual: Array, start: int, stop: int) -> Array:
    """What pruning each of the columns start..stop costs when the columns before are fixed, (stop - start, m).

    If every column from here on were kept, their z would be the mu_j found one after the other.
    """
    xp = namespace(a)
    value = a[start:stop]
    if residual.shape[1]:
        rest, mu = residual[0], []
        for j in range(start, stop):
            mu.append(xp.sum(t[j, 0] * rest, axis=0))
            rest = rest - p[j, 0] * mu[-1]
        value = value + r[start:stop, start:stop].T @ xp.stack(mu)
    pivots = xp.linalg.diagonal(r)[start:stop, None]
    return value**2 / (pivots**2 * phi[start:stop, 0])


def sweep(
    a: Array,
    r: Array,
    p: Array,
    t: Array,
    residual: Array,
    keep: Array,
    z: Array,
    start: int,
    stop: int,
) -> None:
    """Fix columns start..stop with the given mask: a, z and residual change in place."""
    _sweep(a, r, p, t, residual, keep, z, start, stop, stop)


def sweep_groups(
    a: Array,
    r: Array,
    p: Array,
    t: Array,
    phi: Array,
    residual: Array,
    keep: Array,
    z: Array,
    start: int,
    stop: int,
    kept: int,
    group: int,
) -> None:
    """Fix columns start..stop, keeping the `kept` best of each group as they stand when it is entered."""
    for first in range(start, stop, group):
        cost = scores(a, r, p, t, phi, residual, first, first + group)
        keep[first : first + group] = ~smallest(cost.T, group - kept).T
        _sweep(a, r, p, t, residual, keep, z, first, first + group, stop)


def _sweep(a, r, p, t, residual, keep, z, start, stop, last):
    xp = namespace(a)
    zero = asarray_like(0.0, a)
    for j in range(start, stop):
        mu = xp.sum(t[j, 0] * residual[0], axis=0)
        z[j] = xp.where(keep[j], mu, -a[j] / r[j, j])
        residual[0] -= p[j, 0] * z[j]
        a[j:last] += r[j, j:last, None] * z[j]
        a[j] = xp.where(keep[j], a[j], xp.astype(zero, a.dtype))
