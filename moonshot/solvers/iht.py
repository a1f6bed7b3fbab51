"""Iterative hard thresholding: gradient steps onto the pattern, each refitted before it is judged."""

from dataclasses import dataclass, field

from moonshot.errors import check_count
from moonshot.layer.patterns import Pattern, is_by_row
from moonshot.layer.problem import Problem, Status, check_weight
from moonshot.linalg.backend import Array, as_dtype, namespace, native, squares
from moonshot.linalg.scaled import ScaledQuadratic
from moonshot.solvers.base import Answer, lowest
from moonshot.solvers.iht_steps import compared, descended, restricted, taken

_FIRST, _LONGER, _SHORTER = 4.0, 1.25, 0.7  # the first step size, and its factors after success and failure


@dataclass(frozen=True)
class _State:
    problem: Problem
    quadratic: ScaledQuadratic


@dataclass(frozen=True)
class _Point:
    """Rows on their supports."""

    x: Array  # (m, d), zero outside the mask
    mask: Array  # (m, d)
    gradient: Array  # (m, d), H (x - t): half the gradient
    step: Array  # (m, 1), the step size each row tries next

    def rows(self, rows: Array) -> "_Point":
        return _Point(self.x[rows], self.mask[rows], self.gradient[rows], self.step[rows])


@dataclass(frozen=True)
class IHT:
    """Projected gradient steps in the metric of each row's own diagonal, `D_i = diag H_i`.

        y <- the best pattern of x - tau D_i^-1 H_i (x - c_i), refitted by conjugate gradients
        F(y) < F(x): x <- y, tau <- 1.25 tau          otherwise: tau <- 0.7 tau

    A row has settled, and is left out from then on, when it is refitted and the step no longer changes its support;
    a budget over the layer has one tau for all rows. F never rises, and the answer is never worse than the start:
    the largest `D_ij c_ij^2`, refitted; nor than the largest weights as they are (Magnitude).

    iterations: the limit. steps: conjugate-gradient steps for each y. refits: those of a full refit, at most.
    start: weights (m, d) whose largest `D_ij start_ij^2` are the start instead, as the answer for a neighbouring
    weighting of the objective (docs/weighting_sweep.md); None for c.

    Status.CONVERGED says that every row has settled. A step with `tau <= 1 / L`, L the largest eigenvalue of
    `D_i^-1/2 H_i D_i^-1/2`, always lowers F, so a row settles for a tau of at least 0.7 / L.

    Source: Blumensath and Davies, Iterative hard thresholding for compressed sensing (2009); Foucart, Hard
    thresholding pursuit (2011), for the refit; Benbaki et al., CHITA (arXiv 2302.14623), for pruning.
    """

    iterations: int = 100
    steps: int = 10
    refits: int = 100
    start: Array | None = field(default=None, compare=False, repr=False)

    name = "IHT"

    def __post_init__(self) -> None:
        for limit in ("iterations", "steps", "refits"):
            check_count(limit, getattr(self, limit))
        if self.start is not None:
            check_weight(self.start, "start")

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        if self.start is None:
            return None
        start = native(self.start, "start")
        if tuple(start.shape) != problem.shape:
            return f"its start is {' x '.join(map(str, start.shape))}, the layer {' x '.join(map(str, problem.shape))}"
        if type(start) is not type(problem.centre):
            return "its start is on another device than the layer: move it there"
        return None

    def init(self, problem: Problem) -> _State:
        hessian = problem.hessian
        xp = namespace(hessian.A)
        return _State(
            problem, ScaledQuadratic.of(hessian, problem.centre, xp.sqrt(xp.linalg.diagonal(hessian.A)))
        )

    def compute(self, state: _State, pattern: Pattern) -> Answer:
        problem, quadratic = state.problem, state.quadratic
        xp = namespace(quadratic.target)
        by_row = is_by_row(pattern, problem.shape)
        first = quadratic.target
        if self.start is not None:
            first = as_dtype(native(self.start, "start"), problem.dtype) * quadratic.scale
        started = pattern.keep(quadratic.diagonal * first**2)
        start = xp.where(started, first, xp.zeros_like(first))
        start = quadratic.refit(start, started, self.refits)
        x, mask = xp.asarray(start, copy=True), xp.asarray(started, copy=True)

        rows = xp.nonzero(xp.ones_like(x[:, 0], dtype=xp.bool))[0]  # those that have not settled
        point = _at(quadratic, start, started, _FIRST + xp.zeros_like(x[:, :1]))
        status, done = Status.ITERATION_LIMIT, 0
        for done in range(1, self.iterations + 1):
            point, moved = _advance(quadratic, pattern, point, self.steps, by_row)
            still = int(xp.sum(moved))
            if 2 * still > len(rows) and done < self.iterations:
                continue
            point = _refitted(quadratic, point, self.refits)
            x[rows], mask[rows] = point.x, point.mask
            moves = xp.nonzero(_per_budget(_thresholded(quadratic, pattern, point)[2], by_row))[0]
            if len(moves) == 0:
                status = Status.CONVERGED
                break
            if len(moves) < len(rows):
                rows, quadratic, point = rows[moves], quadratic.rows(moves), point.rows(moves)
        quadratic, centre = state.quadratic, problem.centre
        start, plain = start / quadratic.scale, pattern.keep(squares(centre))
        weight, mask = lowest(  # float32 can lose the last digits of a descent
            problem, [(x / quadratic.scale, mask), (start, started), (centre * plain, plain)]
        )
        if mask is plain:
            refitted = quadratic.refit(quadratic.target * plain, plain, self.refits) / quadratic.scale
            weight, mask = lowest(problem, [(refitted, plain), (weight, plain)])
        return Answer(weight, mask, status, done, start=start)


def _at(quadratic: ScaledQuadratic, x: Array, mask: Array, step: Array) -> _Point:
    return _Point(x, mask, quadratic.matvec(x) - quadratic.pull, step)


def _thresholded(quadratic: ScaledQuadratic, pattern: Pattern, point: _Point) -> tuple[Array, Array, Array]:
    """One gradient step and its projection onto the pattern, in the metric of the diagonal.

    (y, its mask, the rows (m,) whose mask is another than before).
    """
    y, scores = descended(point.x, point.gradient, point.step, quadratic.diagonal)
    mask = pattern.keep(scores)
    y, changed = restricted(y, mask, point.mask)
    return y, mask, changed


def _per_budget(changed: Array, by_row: bool) -> Array:
    """Which rows' budgets hold a change: their own, or the layer's."""
    return changed if by_row else changed | namespace(changed).any(changed)


def _advance(
    quadratic: ScaledQuadratic, pattern: Pattern, point: _Point, steps: int, by_row: bool
) -> tuple[_Point, Array]:
    """Take the step of each budget where it lowers F. Also returns where it would change the support, (m,)."""
    y, mask, changed = _thresholded(quadratic, pattern, point)
    moved = _per_budget(changed, by_row)
    y = quadratic.refit(y, mask, steps)
    gradient, rise = compared(point.x, point.gradient, y, quadratic.matvec(y), quadratic.pull)
    lower = (rise if by_row else namespace(rise).sum(rise) + 0 * rise) < 0
    here, there = (point.x, point.gradient, point.mask), (y, gradient, mask)
    x, gradient, mask, step = taken(lower, moved, here, there, point.step, (_LONGER, _SHORTER))
    return _Point(x, mask, gradient, step), moved


def _refitted(quadratic: ScaledQuadratic, point: _Point, steps: int) -> _Point:
    return _at(quadratic, quadratic.refit(point.x, point.mask, steps), point.mask, point.step)
