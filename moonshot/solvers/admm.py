"""ADMM: alternate between the quadratic and the pattern until they agree, then refit on the support."""

import math
from collections import deque
from dataclasses import dataclass

from moonshot.errors import ArgumentError, check_count, check_number
from moonshot.layer.patterns import Pattern
from moonshot.layer.problem import Problem, Status
from moonshot.linalg.backend import namespace, squares
from moonshot.linalg.cache import FirstFewCache
from moonshot.linalg.scaled import ScaledQuadratic
from moonshot.linalg.shifted import ShiftedInverse
from moonshot.solvers.admm_steps import move, reflected
from moonshot.solvers.base import Answer, lowest

_WINDOW = 5  # iterations over which the weights must rest: the first may move none
_LARGEST = 1e12  # rho, at which nothing moves any more


@dataclass(frozen=True)
class _State:
    """The problem in units of the weights' saliency (`RowHessian.saliency_scale`)."""

    problem: Problem  # in its own units
    quadratic: ScaledQuadratic
    inverse: FirstFewCache  # of the shifted matrix, and the factors' grams in it


@dataclass(frozen=True)
class ADMM:
    """Alternating direction method of multipliers on each row's own Hessian, weights in units of their saliency.

        x <- c_i + (H_i + rho I)^-1 (rho (z - c_i) - dual)      z <- the best pattern of x + dual / rho
        dual <- dual + rho (x - z)

    in the coordinates in which A^-1 has a unit diagonal: there x_j^2 is what pruning weight j alone costs by A. Where
    inputs nearly repeat one another that is nothing, and they have coordinates by the diagonal of A.

    rho is multiplied by `growth` in every iteration, and the method stops when no more than `tolerance` of the
    weights have come or gone in the last five. The weights are then refitted on the support by conjugate gradients.
    The answer is never worse than the largest `|x_j|`, where it starts, nor than the largest weights (Magnitude).
    A few inverses of A, shifted, serve every rho and every pattern; see `linalg.shifted`.

    rho: the first penalty, relative to the harmonic mean of the eigenvalues of A. Much above 1, weights are chosen
    before they could compensate one another; much below, iterations are wasted.
    growth: above 1; nearer to 1 is slower and better, see docs/solvers/admm.md.
    iterations: the limit. tolerance: a share of the weights, 0 or more. refits: conjugate-gradient steps at the end,
    at most.

    Source: Meng et al., ALPS (arXiv 2406.07831), for the shared Hessian.
    """

    rho: float = 0.75
    growth: float = 1.03
    iterations: int = 500
    tolerance: float = 1e-3
    refits: int = 100

    name = "ADMM"

    def __post_init__(self) -> None:
        for field in ("rho", "growth", "tolerance"):
            check_number(field, getattr(self, field))
        if not 0 < self.rho < math.inf:
            raise ArgumentError(f"rho must be positive and finite, got {self.rho!r}")
        if not self.growth > 1:
            raise ArgumentError(f"growth must be above 1, or the method would not settle, got {self.growth!r}")
        if not self.tolerance >= 0:
            raise ArgumentError(f"tolerance must be a share of the weights, 0 or more, got {self.tolerance!r}")
        for field in ("iterations", "refits"):
            check_count(field, getattr(self, field))

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return None

    def row_work(self, columns: int, factors: int) -> float:
        """That of a hundred iterations and steps of the refit, about the most there are, and of one set of grams."""
        return 100.0 * columns * (columns + 2 * factors) + factors * columns**2 / 2

    def init(self, problem: Problem) -> _State:
        hessian = problem.hessian
        quadratic = ScaledQuadratic.of(hessian, problem.centre, hessian.saliency_scale)
        return _State(problem, quadratic, FirstFewCache(hessian.shifted_inverse))

    def compute(self, state: _State, pattern: Pattern) -> Answer:
        problem, quadratic, total = state.problem, state.quadratic, state.problem.total
        target = quadratic.target
        xp, size = namespace(target), total(math.prod(target.shape))
        first = mask = pattern.keep(target * target)
        point, moved = target * mask, deque[float](maxlen=_WINDOW)
        inverse = ShiftedInverse(state.inverse, quadratic.factors, quadratic.units)
        status, done, rho, shrink = Status.ITERATION_LIMIT, 0, self.rho, 1.0
        for done in range(1, self.iterations + 1):
            # point is x + dual / rho with the rho before: z of it is what the mask keeps, the dual what it leaves
            step = inverse.solve(reflected(point, mask, target, rho, shrink * rho), rho)
            move(point, mask, target, step, shrink)
            before, mask = mask, pattern.keep(point * point)
            moved.append(total(int(xp.count_nonzero(mask != before))))
            if done >= _WINDOW and sum(moved) <= 2 * self.tolerance * size:
                status = Status.CONVERGED
                break
            larger = min(rho * self.growth, _LARGEST)
            rho, shrink = larger, rho / larger
        weight = quadratic.refit(point * mask, mask, self.refits)
        masks = first, pattern.keep(squares(problem.centre))
        answer, start = (weight / quadratic.scale, mask), problem.centre * first
        if not quadratic.is_below(weight, [target * mask for mask in masks], total):
            starts = [(problem.centre * mask, mask) for mask in masks]
            refitted = [
                (quadratic.refit(target * mask, mask, self.refits) / quadratic.scale, mask) for mask in masks
            ]
            start, _ = lowest(problem, starts)
            answer = lowest(problem, [answer, *refitted, *starts])
        return Answer(*answer, status, done, start=start)
