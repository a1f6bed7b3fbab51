"""check_solver: does a solver keep what the protocol promises?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from moonshot.checks.exhaustive import optimum
from moonshot.checks.faults import Faults, Unchanged, is_instance
from moonshot.checks.pieces import solved_in_pieces
from moonshot.errors import ArgumentTypeError
from moonshot.layer.patterns import NM, Pattern, PatternError, Unstructured, as_pattern, is_by_row
from moonshot.layer.problem import Problem, Result, Status
from moonshot.linalg.hessian import RowHessian
from moonshot.solvers.base import NotSupportedError, Solver, SolverError, row_work, solve

PATTERNS: tuple[Pattern, ...] = (
    Unstructured(0.5),
    Unstructured(0.7, scope="row"),
    NM(2, 4),
    Unstructured(0.0),
    Unstructured(1.0),
)
_ROUNDING = 1e-6  # relative to F(0): what only rounding may change


@dataclass(frozen=True)
class _Layer:
    """The arrays of a problem, which is made of copies for every run."""

    weight: np.ndarray
    A: np.ndarray
    U: np.ndarray | None = None
    centre: np.ndarray | None = None
    constant: float = 0.0

    @property
    def problem(self) -> Problem:
        weight, A, U, centre = (
            None if x is None else x.copy() for x in (self.weight, self.A, self.U, self.centre)
        )
        return Problem(weight, RowHessian(A, U), centre=centre, constant=self.constant)


def check_solver(solver: Solver, patterns: Sequence[Pattern | str | float] = PATTERNS) -> tuple[str, ...]:
    """Raise CheckError, with every fault in words, unless a solver keeps its promises.

    patterns: what to prune to; those that a layer cannot have are left out there.

    On layers with and without factors, ill-conditioned, rank-deficient, with dead inputs, zero weights, one row, one
    column, a centre other than the weight, in float64, float32 and float16, a solver either says in words
    why it is not for them or gives an answer that `solve` accepts: the pattern's zeros, finite, no worse than its
    start, no better than its bound. It changes nothing it is given, gives the same answer again and from a state that
    has served other patterns, leaves the centre alone where nothing is to be pruned, looks at the factors if it looks
    at A, treats rows alike where the pattern does, and each by itself if it says so (row_work), and does not depend on
    the units of F or of the weights. On layers of twelve weights "optimal" and bounds are held against every mask
    there is.

    Returns what the solver refused, each as "layer, pattern: reason". Raises TypeError for what is no solver.
    """
    is_instance(solver, Solver, "moonshot.ADMM()")
    faults = Faults(str(solver.name))
    if not isinstance(solver.name, str) or not solver.name:
        faults.add(f"name must be a text, it is {solver.name!r}", "name")
    if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not patterns:
        raise ArgumentTypeError(f'patterns are one or more to prune to, such as ["2:4", 0.5], got {patterns!r}')
    chosen = [as_pattern(pattern) for pattern in patterns]
    check = _Check(solver, faults)
    for where, layer in _layers().items():
        for pattern in chosen:
            check.runs(layer, pattern, f"{where}, {pattern}")
        check.state_serves_every_pattern(layer, chosen, where)
    for pattern in chosen:
        check.looks_at_the_problem(pattern)
        check.units(pattern)
        check.rows(pattern)
        check.pieces(pattern)
        check.proofs(pattern)
    if not check.answers and not faults:
        faults.add("refuses every problem: " + "; ".join(sorted(set(check.refusals.values()))), "unsupported")
    faults.raise_if_any()
    return tuple(f"{where}: {reason}" for where, reason in check.refusals.items())


@cache
def _layers() -> dict[str, _Layer]:
    rng = np.random.default_rng(0)
    m, d, n = 4, 8, 3
    weight, factors = rng.normal(size=(m, d)), rng.normal(size=(m, d, n))
    shared = _with_condition(rng, d, 1e2)
    few = rng.normal(size=(3, d))
    alive = np.arange(d) % 5 > 0
    joint = _Layer(weight, shared, factors)
    return {
        "a shared Hessian": _Layer(weight, shared),
        "factors": joint,
        "more factors than inputs": replace(joint, U=rng.normal(size=(m, d, d + 3))),
        "condition 1e8": replace(joint, A=_with_condition(rng, d, 1e8), U=1e-3 * factors),
        "fewer tokens than inputs": replace(joint, A=few.T @ few + 1e-6 * np.eye(d)),
        "dead inputs": replace(
            joint, A=shared * np.outer(alive, alive) + 1e-6 * np.eye(d), U=factors * alive[:, None]
        ),
        "zero weights": replace(joint, weight=0 * weight),
        "equal weights and inputs": _Layer(np.ones((m, d)), np.eye(d)),
        "a centre of its own": replace(joint, centre=rng.normal(size=(m, d)), constant=1.0),
        "float32": replace(joint, weight=weight.astype(np.float32)),
        "float16": replace(joint, weight=weight.astype(np.float16)),
        "one row": replace(joint, weight=weight[:1], U=factors[:1]),
        "one column": _Layer(weight[:, :1], shared[:1, :1], factors[:, :1]),
    }


def _with_condition(rng: np.random.Generator, d: int, condition: float) -> np.ndarray:
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    a = (basis * np.geomspace(1, 1 / condition, d)) @ basis.T
    return (a + a.T) / 2


class _Check:
    """Runs of one solver; every promise that breaks goes to `faults`."""

    def __init__(self, solver: Solver, faults: Faults):
        self.solver, self.faults = solver, faults
        self.refusals: dict[str, str] = {}
        self.answers = 0

    def solve(self, layer: _Layer, pattern: Pattern, where: str, state: Any = None) -> Result | None:
        """The graded answer, or None where there is none."""
        problem = layer.problem
        before = Unchanged(
            **{"problem.weight": problem.weight, "problem.centre": problem.centre},
            **{"problem.hessian.A": problem.hessian.A, "problem.hessian.factors": problem.hessian.factors},
        )

        def run() -> Result:
            pattern.validate(problem.shape)
            reason = self.solver.unsupported(problem, pattern)
            if reason is not None and (not isinstance(reason, str) or not reason):
                raise ArgumentTypeError(f"unsupported must give a reason in words or None, it gives {reason!r}")
            return solve(problem, pattern, self.solver, state=state)

        try:
            result = self.faults.run("a run", where, run, PatternError, NotSupportedError, SolverError)
        except PatternError:
            return None
        except NotSupportedError as error:
            self.refusals[where] = str(error).split(": ", 1)[1]
            return None
        except SolverError as error:
            self.faults.add(str(error), where)
            return None
        for name in before.changed():
            self.faults.add(f"changes its input: {name} is written to; work on a copy", where)
        self.answers += result is not None
        return result

    def runs(self, layer: _Layer, pattern: Pattern, where: str) -> None:
        """It gives an answer, the same one again, and the centre where nothing is to be pruned."""
        result = self.solve(layer, pattern, where)
        if result is None:
            return
        again = self.solve(layer, pattern, where)
        if again is not None and not _same(result, again):
            self.faults.add(
                "is not deterministic: a second run gave another answer; take a seed, and do not keep state",
                where,
            )
        if not isinstance(result.status, Status):
            self.faults.add(f"the status must be a moonshot.Status, it is {result.status!r}", where)
        unpruned = pattern.zeros(layer.problem.shape) == 0 and layer.weight.dtype == np.float64
        if unpruned and result.value > layer.constant + _ROUNDING * layer.problem.zero_value():
            self.faults.add("moves the weights away from problem.centre though nothing is to be pruned", where)

    def state_serves_every_pattern(self, layer: _Layer, patterns: list[Pattern], where: str) -> None:
        problem = layer.problem
        supported = [p for p in patterns if _fits(p, problem) and not self.solver.unsupported(problem, p)]
        state = self.faults.run("init", where, lambda: self.solver.init(problem)) if supported else None
        if state is None or self.faults:  # what is broken already need not be named twice
            return
        for pattern in [*supported, supported[0]]:
            served = self.solve(layer, pattern, f"{where}, {pattern}", state)
            fresh = self.solve(layer, pattern, f"{where}, {pattern}")
            if served and fresh and not _same(served, fresh):
                self.faults.add(
                    "gives another answer from a state that has served another pattern: compute may not change "
                    "the state",
                    f"{where}, {pattern}",
                )

    def looks_at_the_problem(self, pattern: Pattern) -> None:
        """If the answer depends on A, it depends on the factors too; and on the centre, not on the weight."""
        rng = np.random.default_rng(1)
        base = replace(_layers()["factors"], A=_with_condition(rng, 8, 1e2))
        others = [
            base,
            replace(base, A=_with_condition(rng, 8, 1e2)),
            replace(base, U=3 * rng.normal(size=(4, 8, 3))),
        ]
        first, other_shared, other_factors = (
            self.solve(layer, pattern, f"factors, {pattern}") for layer in others
        )
        if not (first and other_shared and other_factors and 0 < first.sparsity < 1):
            return
        if _same(first, other_factors) and not _same(first, other_shared):
            self.faults.add(
                "ignores U: the answer depends on A but not on the factors of the rows; use problem.hessian, or say "
                "in `unsupported` that factors are not",
                f"factors, {pattern}",
            )
        elsewhere = replace(base, centre=base.weight, weight=rng.normal(size=(4, 8)))
        centred = self.solve(elsewhere, pattern, f"a centre of its own, {pattern}")
        if centred is not None and not _same(first, centred):
            self.faults.add(
                "depends on problem.weight: F is least at problem.centre, which need not be the weight",
                f"a centre of its own, {pattern}",
            )

    def units(self, pattern: Pattern) -> None:
        """Powers of two change no digit of a computation, so nothing but absolute constants can matter."""
        for kind in ("a shared Hessian", "factors"):
            layer, where = _layers()[kind], f"{kind}, {pattern}"
            smaller = replace(layer, A=layer.A * 2.0**-20, U=None if layer.U is None else layer.U * 2.0**-10)
            larger = replace(layer, weight=layer.weight * 2.0**12)
            first = self.solve(layer, pattern, where)
            for other, what in ((smaller, "the objective"), (larger, "the weights")):
                result = self.solve(other, pattern, where)
                if first and result and abs(first.relative - result.relative) > _ROUNDING:
                    self.faults.add(
                        f"depends on the units of {what}: in other units F(V) / F(0) is {result.relative:.6g}, not "
                        f"{first.relative:.6g}; make tolerances relative",
                        where,
                    )

    def rows(self, pattern: Pattern) -> None:
        """Rows in another order have the same answer, in that order, where the pattern treats rows alike."""
        layer, order, where = _layers()["factors"], [2, 0, 3, 1], f"factors, {pattern}"
        assert layer.U is not None
        first = self.solve(layer, pattern, where)
        if first is None or not _treats_rows_alike(pattern, order):
            return
        other = self.solve(replace(layer, weight=layer.weight[order], U=layer.U[order]), pattern, where)
        if other and abs(first.relative - other.relative) > _ROUNDING:
            self.faults.add(
                "depends on the order of the rows: row i has the Hessian A + U[i] U[i]', and no other", where
            )

    def pieces(self, pattern: Pattern) -> None:
        """Pieces of a layer have the answer of the whole, if the solver says that it treats each row by itself."""
        rng, (m, d, n), where = np.random.default_rng(2), (24, 64, 1), f"24 rows, {pattern}"
        layer = _Layer(rng.normal(size=(m, d)), _with_condition(rng, d, 1e4), rng.normal(size=(m, d, n)))
        work = self.faults.run("row_work", where, lambda: row_work(self.solver, d, n))
        if work is None or not _fits(pattern, layer.problem) or not is_by_row(pattern, (m, d)):
            return
        if not (isinstance(work, int | float) and 0 < work < np.inf):
            self.faults.add(f"row_work must be positive, or None, it is {work!r}", where)
        whole = self.solve(layer, pattern, where)
        if whole is None:
            return
        found = self.faults.run(
            "a piece",
            where,
            lambda: solved_in_pieces(layer.problem, pattern, self.solver, [5, 6, m]),
        )
        if found and not np.allclose(found[0], whole.weight, rtol=0, atol=_ROUNDING * abs(layer.weight).max()):
            self.faults.add(
                "gives another answer for some rows alone than in the layer: without row_work it always has them all; "
                "or add up by problem.total what it asks of all rows together",
                where,
            )

    def proofs(self, pattern: Pattern) -> None:
        """Nothing better than "optimal", nothing below a bound: on layers of 3 x 4 weights."""
        for seed in range(6):
            rng = np.random.default_rng(seed)
            factors = rng.normal(size=(3, 4, 2)) if seed % 2 else None
            layer = _Layer(rng.normal(size=(3, 4)), _with_condition(rng, 4, 10.0 ** (1 + seed)), factors)
            where = f"3 x 4 weights, {pattern}"
            result = self.solve(layer, pattern, where)
            if result is None or (result.bound is None and result.status is not Status.OPTIMAL):
                continue
            least, slack = optimum(layer.problem, pattern), _ROUNDING * layer.problem.zero_value()
            if result.status is Status.OPTIMAL and result.value > least + slack:
                self.faults.add("calls an answer optimal, and a better one exists", where)
            if result.bound is not None and result.bound > least + slack:
                self.faults.add("proves a bound that an answer falls below", where)


def _fits(pattern: Pattern, problem: Problem) -> bool:
    try:
        pattern.validate(problem.shape)
    except PatternError:
        return False
    return True


def _treats_rows_alike(pattern: Pattern, order: list[int]) -> bool:
    """Whether the mask of rows in this order is that of the rows, in this order: it is not where blocks span rows."""
    scores = np.random.default_rng(0).random((len(order), 8))
    return np.array_equal(pattern.keep(scores[order]), pattern.keep(scores)[order])


def _same(first: Result, second: Result) -> bool:
    return np.array_equal(first.weight, second.weight) and np.array_equal(first.mask, second.mask)
