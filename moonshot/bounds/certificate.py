"""A lower bound of what any weight with a pattern can reach, to hold a solver's answer against."""

from moonshot.bounds.branching import COLUMNS, Rows, branch
from moonshot.bounds.relaxation import relaxation_bound, row_by_row
from moonshot.errors import ArgumentTypeError, check_count
from moonshot.layer.patterns import Pattern, as_pattern
from moonshot.layer.problem import Problem, Status
from moonshot.linalg import NotPositiveDefiniteError
from moonshot.linalg.backend import computing_on

_WORK = 2**28  # nodes times d^2 that the searches of a layer may take
_WORTHWHILE = 100  # nodes of one search


def lower_bound(problem: Problem, pattern: Pattern | str | float, *, iterations: int = 60) -> float:
    """A lower bound of F(V) over every V with the pattern, in the units of `Result.value`.

    problem: made by `Objective.problem`, or from a Hessian of one's own.
    pattern: such as "2:4", 0.5, "50%", or a pattern object.
    iterations: steps of the relaxation, where that is what proves it.

    Rows of at most 64 inputs are searched by branch and bound, some seconds long: up to some 30 inputs that is often
    the optimum. Where the search does not come to its end, and in large layers, there is the perspective
    relaxation; the higher bound counts. All this is many small steps for small layers, which are copied to the CPU for
    it, wherever they are.

    Raises TypeError for a pattern without `groups`, PatternError, NotPositiveDefiniteError. docs/certificate.md has
    the proofs.
    """
    if not isinstance(problem, Problem):
        raise ArgumentTypeError(f"problem must be a moonshot.Problem, got {type(problem).__name__}")
    check_count("iterations", iterations)
    pattern = as_pattern(pattern)
    pattern.validate(problem.shape)
    if not hasattr(pattern, "groups"):
        raise ArgumentTypeError(
            f"{type(pattern).__name__} is missing `groups(shape) -> (size, zeros)`: a lower bound is for patterns "
            "with exactly `zeros` zeros in every `size` consecutive weights"
        )
    size, zeros = pattern.groups(problem.shape)
    if zeros == 0:
        return problem.constant
    with computing_on(problem.weight):
        if problem.shape[1] <= COLUMNS or row_by_row(problem.shape):
            problem = problem.on_cpu()
        searched, optimal = _searched(problem, size, zeros)
        return searched if optimal else max(searched, relaxation_bound(problem, size, zeros, iterations))


def _searched(problem: Problem, size: int, zeros: int) -> tuple[float, bool]:
    """What branch and bound proves within its limits, and whether it is the optimum."""
    m, d = problem.shape
    searches = m * d if size > d else m  # a budget over the layer takes rows with every number of zeros
    nodes = _WORK // (searches * d**2)
    divides = d % size == 0 or size == m * d
    if d > COLUMNS or nodes < _WORTHWHILE or not divides:
        return problem.constant, False
    try:
        found = branch(Rows.of(problem), size, zeros, nodes)
    except NotPositiveDefiniteError:  # within rounding: the relaxation says which are beyond it
        return problem.constant, False
    return problem.constant + found.bound, found.status is Status.OPTIMAL
