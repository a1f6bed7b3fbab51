"""The steps of IHT between products with the rows' matrices: which points they lead to, and which are taken."""

from moonshot.linalg.backend import Array, is_cupy, namespace


def descended(x: Array, gradient: Array, step: Array, diagonal: Array) -> tuple[Array, Array]:
    """`y = x - step gradient / D`, and `D y^2`, by which its largest entries are found; both (m, d).

    x, gradient: (m, d); step: (m, 1); D, the diagonals of the rows' matrices: (m, d), or (1, d) for all of them.
    """
    if is_cupy(x):
        from moonshot.solvers import iht_cuda

        return iht_cuda.descended(x, gradient, step, diagonal)
    y = x - step * gradient / diagonal
    return y, diagonal * y**2


def restricted(y: Array, mask: Array, before: Array) -> tuple[Array, Array]:
    """y, zero outside the mask, and the rows (m,) whose mask is another than it was before; y may be overwritten."""
    if is_cupy(y):
        from moonshot.solvers import iht_cuda

        return iht_cuda.restricted(y, mask, before)
    xp = namespace(y)
    return xp.where(mask, y, xp.zeros_like(y)), xp.any(mask != before, axis=1)


def compared(x: Array, gradient: Array, to: Array, product: Array, pull: Array) -> tuple[Array, Array]:
    """The gradient (m, d) at `to`, and by how much F rises on the way there from x in each row, (m,), exactly.

    gradient: at x; product: of the rows' matrices with `to`, which may be overwritten; pull: with the minimiser.
    """
    if is_cupy(x):
        from moonshot.solvers import iht_cuda

        return iht_cuda.compared(x, gradient, to, product, pull)
    there = product - pull
    return there, namespace(x).sum((to - x) * (there + gradient), axis=1)


def taken(
    lower: Array,
    moved: Array,
    here: tuple[Array, Array, Array],
    there: tuple[Array, Array, Array],
    step: Array,
    factors: tuple[float, float],
) -> tuple[Array, Array, Array, Array]:
    """(x, gradient, mask) of every row: where it has arrived if F is lower there, else where it is; and its next step.

    lower, moved: (m,), whether F is lower in the row's budget, and whether a mask in that budget has changed: only then
    does the step (m, 1). factors: of the step, where F is lower and where it is not. here, there: (x, gradient, mask);
    there may be overwritten, but for its mask.
    """
    if is_cupy(step):
        from moonshot.solvers import iht_cuda

        return iht_cuda.taken(lower, moved, here, there, step, factors)
    xp = namespace(step)
    x, gradient, mask = (xp.where(lower[:, None], new, old) for new, old in zip(there, here, strict=True))
    longer, shorter = factors
    factor = xp.where(lower[:, None], longer + 0 * step, shorter + 0 * step)
    return x, gradient, mask, xp.where(moved[:, None], step * factor, step)
