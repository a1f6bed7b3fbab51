"""Diagonal minorants of a positive definite matrix: D with `A - D` positive semidefinite. D is stored (d,)."""

from moonshot.linalg.backend import Array, eye_like, namespace
from moonshot.linalg.factor import NotPositiveDefiniteError, inverse, is_positive_definite, solve

_SHRINK = (1e-8, 1e-6, 1e-4, 1e-2, 0.5)
_HALVINGS = 30


def first_minorant(a: Array) -> Array:
    """Half the smallest eigenvalue of `a` (d, d) scaled to a unit diagonal, in the units of `a`."""
    xp = namespace(a)
    diagonal = xp.linalg.diagonal(a)
    scale = xp.sqrt(diagonal)
    lowest = xp.linalg.eigvalsh(a / (scale[:, None] * scale))[0]
    return diagonal * xp.clip(lowest, xp.finfo(a.dtype).eps, None) / 2


def raised_minorant(a: Array, minorant: Array, slope: Array, barrier: float) -> Array:
    """A Newton step from a minorant towards the D that maximises `gain(D) + mu (log det(A - D) + log det D)`.

    slope: (d,), not negative, of a concave gain whose second derivative is about `-2 diag(slope / D)`.
    barrier: mu in units of the mean of `slope D`.

    The result is a minorant; D itself where rounding leaves no step.
    """
    xp = namespace(a)
    gain = slope * minorant
    mu = barrier * xp.mean(gain)
    if not float(mu) > 0:
        return minorant
    identity = eye_like(a, a.shape[0])
    try:
        within = inverse(a - identity * minorant)
        root = xp.sqrt(minorant)
        within = within * (root[:, None] * root)  # in units of D, so that the step is relative to D
        gradient = gain + mu * (1 - xp.linalg.diagonal(within))
        curvature = mu * within**2 + identity * (mu + 2 * gain)
        unit = 1 / xp.sqrt(xp.linalg.diagonal(curvature))
        # close to the boundary it is singular
        curvature = curvature * (unit[:, None] * unit) + 1e-10 * identity
        step = unit * solve(curvature, unit * gradient)
    except NotPositiveDefiniteError:
        return minorant
    length = 0.9 / max(float(xp.max(-step)), 0.9)
    for _ in range(_HALVINGS):
        if _is_minorant(a, minorant * (1 + length * step)):
            return minorant * (1 + 0.95 * length * step)
        length /= 2
    return minorant


def _is_minorant(a: Array, minorant: Array) -> bool:
    """Whether the Cholesky factorisation of `A - D` runs to its end."""
    rest = namespace(a).asarray(a, copy=True)
    rest.reshape(-1)[:: a.shape[0] + 1] -= minorant
    return is_positive_definite(rest)


def proven_minorant(a: Array, minorant: Array, rank: int = 0) -> Array:
    """t D with the largest of a few t < 1 for which `A - t D` is positive semidefinite without doubt, else zeros.

    Scaled to a unit diagonal and lowered by more than rounding can have added, the matrix must still have a Cholesky
    factor. rank: how many products were summed into an entry of `a`, for their rounding.

    Source: Rump, Verification of positive definiteness (BIT 46, 2006).
    """
    xp = namespace(a)
    size = a.shape[0]
    scale = xp.sqrt(xp.linalg.diagonal(a))
    scaled, shares = a / (scale[:, None] * scale), minorant / scale**2
    margin = 4 * (size + rank + 10) * size * float(xp.finfo(a.dtype).eps)
    for shrink in _SHRINK:
        if _is_minorant(scaled, (1 - shrink) * shares + margin):
            return (1 - shrink) * minorant
    return xp.zeros_like(minorant)
