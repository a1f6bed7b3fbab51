"""ADMM: alternate between the quadratic and the pattern until they agree, then refit on the support."""

import math
from dataclasses import dataclass

from moonshot.linalg.backend import Array, namespace
from moonshot.linalg.scaled import ScaledQuadratic
from moonshot.linalg.shifted import ShiftedInverse
from moonshot.linalg.splitting import add_outside, reflected
from moonshot.patterns import Pattern
from moonshot.problem import Problem, Status
from moonshot.solvers.base import Answer

_ROUND = 5  # iterations with one rho


@dataclass(frozen=True)
class _State:
    """The problem in the coordinates in which A has a unit diagonal, and the eigenbasis of A there."""

    quadratic: ScaledQuadratic
    eigenvalues: Array  # (d,), ascending
    basis: Array  # (d, d), eigenvectors of the shared matrix in columns
    rotated: Array | None  # (n, m, d), the factors in the eigenbasis


@dataclass(frozen=True)
class ADMM:
    """Alternating direction method of multipliers on each row's own Hessian.

        x <- (H_i + rho I)^-1 (H_i c_i - dual + rho z)      z <- the best pattern of x + dual / rho
        dual <- dual + rho (x - z)

    rho is multiplied by `growth` every five iterations, and the method stops when no more than `tolerance` of the
    weights have come or gone since. The weights are then refitted on the support by conjugate gradients. One
    eigendecomposition of A serves every rho and every pattern; a row's factors add an n x n capacitance matrix for
    each rho.

    rho: the first penalty, relative to the median eigenvalue of A scaled to a unit diagonal. Much above it, weights
    are chosen before they could compensate one another; much below, iterations are wasted.
    growth: above 1; nearer to 1 is slower and better, see docs/solvers/admm.md.
    iterations: the limit. tolerance: a share of the weights, 0 or more. refits: conjugate-gradient steps at the end,
    at most.

    Source: Meng et al., ALPS (arXiv 2406.07831), for the shared Hessian.
    """

    rho: float = 0.5
    growth: float = 1.2
    iterations: int = 300
    tolerance: float = 3e-4
    refits: int = 100

    name = "ADMM"

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, got {self.rho!r}")
        if not self.growth > 1:
            raise ValueError(f"growth must be above 1, or the method would not settle, got {self.growth!r}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be a share of the weights, 0 or more, got {self.tolerance!r}")
        for field in ("iterations", "refits"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(f"{field} must be a positive integer, got {getattr(self, field)!r}")

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return None

    def init(self, problem: Problem) -> _State:
        values, basis, rotated = problem.hessian.unit_eigenbasis(problem.dtype)
        if problem.dtype == "float32":  # which cannot tell smaller eigenvalues from zero
            xp = namespace(values)
            values = xp.maximum(values, xp.zeros_like(values) + 1e-7)
        return _State(ScaledQuadratic.of(problem.hessian, problem.centre), values, basis, rotated)

    def compute(self, state: _State, pattern: Pattern) -> Answer:
        quadratic = state.quadratic
        target = quadratic.target
        xp = namespace(target)
        started = mask = checked = pattern.keep(abs(target))
        point = start = xp.where(mask, target, xp.zeros_like(target))
        rho = self.rho * float(state.eigenvalues[len(state.eigenvalues) // 2])
        inverse = ShiftedInverse(state.eigenvalues, state.basis, state.rotated, quadratic.factors)
        inverse.shift(rho)
        status, done = Status.ITERATION_LIMIT, 0
        for done in range(1, self.iterations + 1):
            # point is x + dual / rho: the mask keeps z of it, and leaves the next dual / rho
            x = inverse.solve(reflected(point, mask, quadratic.pull, rho))
            add_outside(x, point, mask)
            point, mask = x, pattern.keep(abs(x))
            if done % _ROUND:
                continue
            moved = int(xp.count_nonzero(mask != checked))
            if moved <= 2 * self.tolerance * math.prod(mask.shape):
                status = Status.CONVERGED
                break
            checked = mask
            rho *= self.growth
            inverse.shift(rho)
            point = xp.where(mask, point, point / self.growth)
        weight = quadratic.refit(point * mask, mask, self.refits)
        if quadratic.loss(start) < quadratic.loss(weight):  # never worse than where it started
            weight, mask = quadratic.refit(start, started, self.refits), started
        return Answer(weight / quadratic.scale, mask, status, done, start=start / quadratic.scale)
