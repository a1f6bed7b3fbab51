"""The Solver protocol, and `solve`, which runs a solver and grades its answer."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from moonshot.bounds.certificate import lower_bound
from moonshot.errors import ArgumentError, ArgumentTypeError, MoonshotError
from moonshot.layer.patterns import Pattern, PatternMismatchError, as_pattern
from moonshot.layer.problem import Problem, Result, Status
from moonshot.linalg.backend import (
    Array,
    all_finite,
    cast_like,
    computing_on,
    dtype_name,
    like,
    namespace,
    native,
)


class SolverError(MoonshotError):
    """A solver broke a promise: its answer is not finite, misses the pattern, or is worse than its start."""


class NotSupportedError(MoonshotError):
    """A solver does not handle this problem or pattern; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What a solver returns.

    weight: (m, d), zero outside the mask.
    mask: (m, d) booleans, False where a weight is pruned.
    status, iterations: how the method ended, and after how many iterations.
    start: (m, d), where the method began, if it promises never to do worse.
    bound: a lower bound of F over all weights with the pattern, if the method proves one.
    note: what is to be said of how it was found, such as where.
    """

    weight: Array
    mask: Array
    status: Status = Status.COMPLETED
    iterations: int = 1
    start: Array | None = None
    bound: float | None = None
    note: str = ""


@runtime_checkable
class Solver(Protocol):
    """`init` does what depends on the problem alone, `compute` what depends on the pattern.

    Both see arrays that are computed on (NumPy, or CuPy or torch on a device), never change them, and give the
    same answer every time.
    """

    @property
    def name(self) -> str:
        """The solver's name in results and reports."""

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        """Why the solver cannot take this problem with this pattern, or None if it can."""

    def init(self, problem: Problem) -> Any:
        """The state that serves every pattern on this problem."""

    def compute(self, state: Any, pattern: Pattern) -> Answer:
        """The answer for one pattern."""


def row_work(solver: Solver, columns: int, factors: int) -> float | None:
    """About how many float32 multiply-adds `compute` takes for a row with so many factors; None if it does not say.

    Only a solver that treats each row by itself says so, by a method `row_work(columns, factors)`: where the pattern is
    by row (patterns.is_by_row), the answers for the pieces of a problem (Problem.of_rows), found at the same time, are
    those for the whole. What it asks of all rows together, such as whether enough of them have settled, it adds up by
    `problem.total`, as often in every piece.
    """
    return solver.row_work(columns, factors) if hasattr(solver, "row_work") else None


def lowest(problem: Problem, answers: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Of weights and their masks, both (m, d), the pair with the lowest F in float64, the first of equals.

    Where the problem is a piece of a layer, that of the layer counts. F of what is not finite counts as infinite.
    """

    def value(answer: tuple[Array, Array]) -> float:
        found = problem.total(problem.value(answer[0]))
        return found if math.isfinite(found) else math.inf

    return min(answers, key=value)


def solve(
    problem: Problem, pattern: Pattern | str | float, solver: Solver, *, state: Any = None, bound: bool = False
) -> Result:
    """Prune one layer to a pattern and say how good the answer is.

    problem: made by `Objective.problem`, or from a Hessian of one's own.
    pattern: such as "2:4", 0.5, "50%", or a pattern object.
    solver: such as `ADMM()`.
    state: what `solver.init(problem)` returned, to share one factorisation among patterns.
    bound: whether to find a lower bound too (`lower_bound`, or the solver's own where that is higher), from which
    `Result.gap` follows. Its time is not in `seconds`.

    The mask is checked against the pattern and every figure is recomputed in float64 from the weight as it is
    returned, in the dtype of `problem.weight`. Raises NotSupportedError, PatternError, or SolverError where the
    solver's answer is unusable.
    """
    if not isinstance(problem, Problem):
        raise ArgumentTypeError(f"problem must be a moonshot.Problem, got {type(problem).__name__}")
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise ArgumentTypeError(f"solver must be an instance such as moonshot.ADMM(), got {solver!r}")
    pattern = as_pattern(pattern)
    pattern.validate(problem.shape)
    if reason := solver.unsupported(problem, pattern):
        raise NotSupportedError(f"{solver.name} is not compatible with this problem: {reason}")
    with computing_on(problem.weight):
        return _graded(problem, pattern, solver, state, bound)


def _graded(problem: Problem, pattern: Pattern, solver: Solver, state: Any, bound: bool) -> Result:
    if not math.isfinite(problem.at_zero.limit) and not math.isfinite(problem.zero_value()):
        raise ArgumentError(
            f"F(0) is {problem.zero_value()}, beyond the largest float64: "
            "scale the weight, or what the Hessian is made of, down"
        )
    begin = time.perf_counter()
    if state is None:
        state = solver.init(problem)
    answer = solver.compute(state, pattern)
    seconds = time.perf_counter() - begin

    check_answer(answer, problem, pattern, solver)
    weight, mask = answer.weight, answer.mask
    returned = cast_like(weight, problem.weight)
    graded = native(returned)
    if not all_finite(graded):
        raise SolverError(
            f"{solver.name} compensates with weights beyond the largest {dtype_name(returned)}: "
            "convert the model to bfloat16 or float32 first"
        )
    value, losses = problem.graded(graded)
    if not math.isfinite(value):
        raise SolverError(
            f"{solver.name} ended at F = {value}: its weights are too large for float64; look at its parameters"
        )
    if answer.start is not None:
        start_value = problem.value(answer.start)
        rounded = bool(namespace(weight).any(graded != weight))
        reached = problem.value(weight) if rounded else value
        allowed = start_value * (1 + 1e-3)
        if reached > allowed and reached > allowed + 1e-12 * problem.zero_value():
            raise SolverError(
                f"{solver.name} ended at {reached:.6g}, worse than the {start_value:.6g} it started from: "
                "please report this with the problem"
            )
    allowed = value + 1e-8 * abs(value)
    if answer.bound is not None and not (
        answer.bound <= allowed or answer.bound <= allowed + 1e-12 * problem.zero_value()
    ):
        raise SolverError(
            f"{solver.name} claims that no value is below {answer.bound:.6g}, its own is {value:.6g}: "
            "please report this with the problem"
        )
    proven = answer.bound
    if bound:
        proven = max(lower_bound(problem, pattern), -math.inf if proven is None else proven)
    return Result(
        weight=returned,
        mask=like(mask, problem.weight),
        value=value,
        at_zero=problem.at_zero,
        terms={term.name: loss for term, loss in zip(problem.terms, losses, strict=True)},
        status=answer.status,
        seconds=seconds,
        solver=solver.name,
        pattern=str(pattern),
        iterations=answer.iterations,
        bound=proven,
        note=answer.note,
    )


def check_answer(answer: Any, problem: Problem, pattern: Pattern, solver: Solver) -> None:
    """Raises SolverError for what is no answer to a problem with this pattern."""
    if not isinstance(answer, Answer):
        raise SolverError(
            f"{solver.name} returned {type(answer).__name__}: compute must return a moonshot.Answer"
        )
    weight, mask = answer.weight, answer.mask
    for name, array in (("weight", weight), ("mask", mask)):
        if tuple(array.shape) != problem.shape:
            raise SolverError(
                f"{solver.name} returned a {name} of shape {tuple(array.shape)}, the layer is {problem.shape}"
            )
    xp = namespace(weight)
    if mask.dtype != xp.bool:
        raise SolverError(f"{solver.name} returned a mask of {mask.dtype}, it must be of booleans")
    if not all_finite(weight):
        raise SolverError(f"{solver.name} returned NaN or infinity: raise dampening_frac, or use float64")
    try:
        pattern.check(mask)
    except PatternMismatchError as error:
        raise SolverError(f"{solver.name} missed its pattern: {error}") from error
    if bool(xp.any((weight != 0) & ~mask)):
        raise SolverError(f"{solver.name} returned weights that are not zero outside its mask")
