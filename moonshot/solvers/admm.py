"""ADMM: alternate between the quadratic and the pattern until they agree, then refit on the support."""

from dataclasses import dataclass

from moonshot.linalg.backend import Array, as_dtype, namespace
from moonshot.linalg.factor import capacitance, eigenbasis
from moonshot.linalg.lowrank import combine, correct, project
from moonshot.patterns import Pattern
from moonshot.problem import Problem, Status
from moonshot.solvers.base import Answer


@dataclass(frozen=True)
class _State:
    """The problem in the scaled coordinates `x_j = v_j sqrt(A_jj)`, in which A has a unit diagonal."""

    scale: Array  # (d,)
    target: Array  # (m, d), the minimiser c, scaled
    pull: Array  # (m, d), H c
    hessian: Array  # (d, d)
    factors: Array | None  # (n, m, d)
    eigenvalues: Array  # (d,), ascending
    basis: Array  # (d, d), eigenvectors of `hessian` in columns
    rotated: Array | None  # (n, m, d), the factors in the eigenbasis


@dataclass(frozen=True)
class ADMM:
    """Alternating direction method of multipliers on each row's own Hessian.

        x <- (H_i + rho I)^-1 (H_i c_i - dual + rho z)      z <- the best pattern of x + dual / rho
        dual <- dual + rho (x - z)

    rho is multiplied by `growth` every three iterations, and the method stops when the support has not changed over
    `patience` such checks. The weights are then refitted on the support by conjugate gradients. One
    eigendecomposition of A serves every rho and every pattern; a row's factors add an n x n capacitance matrix for
    each rho.

    rho: the first penalty, relative to the median eigenvalue of A scaled to a unit diagonal. Much above it, weights
    are chosen before they could compensate one another; much below, iterations are wasted.
    growth: above 1; nearer to 1 is slower and better, see docs/mathematics.md.
    iterations: the limit. refits: conjugate-gradient steps at the end, at most.

    Source: Meng et al., ALPS (arXiv 2406.07831), for the shared Hessian.
    """

    rho: float = 0.5
    growth: float = 1.1
    iterations: int = 300
    patience: int = 2
    refits: int = 100

    name = "ADMM"

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, got {self.rho!r}")
        if not self.growth > 1:
            raise ValueError(f"growth must be above 1, or the method would not settle, got {self.growth!r}")
        for field in ("iterations", "patience", "refits"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(f"{field} must be a positive integer, got {getattr(self, field)!r}")

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return None

    def init(self, problem: Problem) -> _State:
        hessian, dtype = problem.hessian, problem.dtype
        xp = namespace(problem.centre)
        scale = xp.sqrt(xp.linalg.diagonal(hessian.A))
        scaled = hessian.A / (scale[:, None] * scale[None, :])
        values, basis = eigenbasis(scaled)
        smallest = xp.zeros_like(values) + 1e-7  # float32 cannot tell smaller ones from zero
        values = xp.maximum(values, smallest) if dtype == "float32" else values
        scale, scaled, values, basis = (as_dtype(x, dtype) for x in (scale, scaled, values, basis))
        target = problem.centre * scale
        pull = target @ scaled
        factors = rotated = None
        if hessian.factors is not None:
            factors = as_dtype(hessian.factors, dtype) / scale
            n, m, d = factors.shape
            rotated = (factors.reshape(n * m, d) @ basis).reshape(n, m, d)
            pull = pull + combine(factors, project(factors, target))
        return _State(scale, target, pull, scaled, factors, values, basis, rotated)

    def compute(self, state: _State, pattern: Pattern) -> Answer:
        xp = namespace(state.target)
        started = mask = pattern.keep(abs(state.target))
        start = xp.where(mask, state.target, xp.zeros_like(state.target))
        z, dual = start, xp.zeros_like(start)
        rho = self.rho * float(state.eigenvalues[len(state.eigenvalues) // 2])
        inverse = _shifted_inverse(state, rho)
        checked, calm, status = mask, 0, Status.ITERATION_LIMIT
        done = 0
        for done in range(1, self.iterations + 1):
            x = inverse(state.pull - dual + rho * z)
            moved = x + dual / rho
            mask = pattern.keep(abs(moved))
            z = xp.where(mask, moved, xp.zeros_like(moved))
            dual = rho * (moved - z)
            if done % 3:
                continue
            calm = 0 if bool(xp.any(mask != checked)) else calm + 1
            checked = mask
            if calm >= self.patience:
                status = Status.CONVERGED
                break
            rho *= self.growth
            inverse = _shifted_inverse(state, rho)
        weight = _refit(state, z, mask, self.refits)
        if _loss(state, start) < _loss(state, weight):
            weight, mask = start, started  # never worse than where it started
        return Answer(weight / state.scale, mask, status, done, start=start / state.scale)


def _shifted_inverse(state: _State, rho: float):
    """The map B -> (H_i + rho I)^-1 b_i, by Woodbury in the eigenbasis of the shared part."""
    shrink = 1 / (state.eigenvalues + rho)
    basis, rotated = state.basis, state.rotated
    if rotated is None:
        dense = (basis * shrink) @ basis.T
        return lambda b: b @ dense
    inverses = namespace(basis).linalg.inv(capacitance(rotated, shrink))
    return lambda b: correct((b @ basis) * shrink, rotated, shrink, inverses) @ basis.T


def _matvec(state: _State, x: Array) -> Array:
    product = x @ state.hessian
    if state.factors is not None:
        product = product + combine(state.factors, project(state.factors, x))
    return product


def _loss(state: _State, x: Array) -> float:
    difference = x - state.target
    return float(namespace(x).sum(difference * _matvec(state, difference)))


def _refit(state: _State, x: Array, mask: Array, steps: int) -> Array:
    """Minimise the quadratic over the support of each row, by conjugate gradients from x."""
    xp = namespace(x)
    keep = xp.astype(mask, x.dtype)
    precondition = keep
    if state.factors is not None:
        precondition = keep / (1 + xp.sum(state.factors**2, axis=0))
    residual = (state.pull - _matvec(state, x)) * keep
    direction = residual * precondition
    rho = xp.sum(residual * direction, axis=1)
    tiny = xp.finfo(x.dtype).eps ** 1.5 * xp.max(rho, axis=0)
    for _ in range(steps):
        if not bool(xp.any(rho > tiny)):
            break
        product = _matvec(state, direction) * keep
        curvature = xp.sum(direction * product, axis=1)
        active = (rho > tiny) & (curvature > 0)
        step = xp.where(active, rho / xp.where(active, curvature, xp.ones_like(rho)), 0 * rho)
        x = x + step[:, None] * direction
        residual = residual - step[:, None] * product
        conditioned = residual * precondition
        following = xp.sum(residual * conditioned, axis=1)
        ratio = xp.where(active, following / xp.where(active, rho, xp.ones_like(rho)), 0 * rho)
        direction = conditioned + ratio[:, None] * direction
        rho = xp.where(active, following, 0 * rho)
    return x
