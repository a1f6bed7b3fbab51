"""solve: every solver on every kind of problem and pattern, graded by `solve` alone."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import moonshot.solvers as package
from moonshot.certificate import lower_bound
from moonshot.linalg import RowHessian
from moonshot.objectives import Fisher, Reconstruction
from moonshot.patterns import NM, PatternError, Unstructured
from moonshot.problem import Problem, Status
from moonshot.solvers import (
    ADMM,
    Answer,
    Exact,
    Magnitude,
    NotSupportedError,
    Solver,
    SolverError,
    SparseGPT,
    solve,
)
from strategies import DEGENERATE, Layer, random_layer

# Solvers that take arguments, by name; every other solver that the package names is made without any.
ARGUMENTS = {"Swaps": lambda solver: solver(Magnitude()), "Exact": lambda solver: solver(nodes=1000)}
SOLVERS = {
    name: ARGUMENTS.get(name, lambda solver: solver())(getattr(package, name))
    for name in package.__all__
    if isinstance(getattr(package, name), type) and hasattr(getattr(package, name), "compute")
    if getattr(package, name) is not Solver
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())

PATTERNS = [
    *(Unstructured(s, scope) for s in (0, 0.3, 0.5, 0.9, 1) for scope in ("layer", "row")),
    *(NM(n, m) for n, m in ((2, 4), (1, 4), (0, 4), (4, 4), (1, 8))),
]
KINDS = {
    "numpy float64": lambda x: x,
    "numpy float32": lambda x: x.astype(np.float32),
    "numpy float16": lambda x: x.astype(np.float16),
    "torch float64": torch.tensor,
    "torch float32": lambda x: torch.tensor(x, dtype=torch.float32),
    "torch bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
}


def as_float64(array):
    return array.double().numpy() if isinstance(array, torch.Tensor) else array.astype(np.float64)


def explicit_value(layer, V):
    """F(V) from the explicit H_i and nothing of moonshot."""
    difference = as_float64(V) - as_float64(layer.weight)
    return float(np.einsum("ij,ijk,ik->", difference, layer.dense(), difference))


def assert_graded(layer, result, pattern):
    """Everything a Result says, recomputed from its weight."""
    weight, mask = as_float64(result.weight), np.array(result.mask.tolist())
    assert type(result.weight) is type(layer.weight) and result.weight.dtype == layer.weight.dtype
    assert type(result.mask) is type(layer.weight) and mask.dtype == bool
    assert mask.size - mask.sum() == pattern.zeros(mask.shape)
    pattern.check(mask)
    assert np.isfinite(weight).all() and (weight[~mask] == 0).all()
    at_zero = explicit_value(layer, 0 * as_float64(layer.weight))
    assert result.value == pytest.approx(explicit_value(layer, weight), rel=1e-10, abs=1e-13 * at_zero)
    assert result.relative == pytest.approx(result.value / at_zero if at_zero else 0, rel=1e-10, abs=1e-13)
    assert result.sparsity == pytest.approx(1 - mask.mean())
    assert result.pattern == str(pattern) and isinstance(result.status, Status) and result.seconds >= 0


# the grid


@each_solver
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 3, 12])
def test_every_combination(solver, n, kind):
    layer = random_layer(n, 4, 8, n, condition=1e2)
    layer = replace(layer, weight=KINDS[kind](layer.weight))
    convert = torch.tensor if kind.startswith("torch") else np.asarray
    hessian = RowHessian(convert(layer.A), None if layer.U is None else convert(layer.U))
    problem, ran = Problem(layer.weight, hessian), []
    for pattern in PATTERNS:
        result = solve(problem, pattern, solver)
        assert_graded(layer, result, pattern)
        assert result.solver == solver.name
        ran.append(result.pattern)
    assert ran == [str(pattern) for pattern in PATTERNS] and len(set(ran)) == 15


def test_the_grid_holds_every_solver_of_the_package():
    assert {"Magnitude", "Wanda", "SparseGPT"} <= set(SOLVERS)
    assert all(isinstance(solver, Solver) for solver in SOLVERS.values())
    assert len({solver.name for solver in SOLVERS.values()}) == len(SOLVERS)


@each_solver
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_layers(solver, name):
    layer = DEGENERATE[name]
    patterns = [Unstructured(s, scope) for s in (0, 0.5, 1) for scope in ("layer", "row")]
    if layer.weight.shape[1] % 4 == 0:
        patterns.append(NM(2, 4))
    for pattern in patterns:
        assert_graded(layer, solve(layer.problem, pattern, solver), pattern)


@each_solver
@pytest.mark.parametrize("n", [0, 3])
def test_sparsity_zero_gives_the_weight_and_one_gives_zeros(solver, n):
    layer = random_layer(n, 4, 8, n)
    for everything in (0, "0%", "4:4", Unstructured(0, "row")):
        result = solve(layer.problem, everything, solver)
        np.testing.assert_allclose(result.weight, layer.weight, rtol=1e-6)
        assert result.relative == pytest.approx(0, abs=1e-12)
    for nothing in (1, "100%", "0:4", Unstructured(1, "row")):
        result = solve(layer.problem, nothing, solver)
        assert not result.weight.any() and not result.mask.any()
        assert result.relative == 1


@each_solver
def test_inputs_are_not_changed(solver):
    layer = random_layer(0, 4, 8, 3)
    problem = Problem(layer.weight.copy(), RowHessian(layer.A.copy(), layer.U.copy()))
    for pattern in (0.5, "2:4", 0, 1):
        result = solve(problem, pattern, solver)
        result.weight[:] = 99  # and what comes back is nobody else's memory
    np.testing.assert_array_equal(problem.weight, layer.weight)
    np.testing.assert_array_equal(problem.centre, layer.weight)
    np.testing.assert_array_equal(problem.hessian.A, layer.A)
    np.testing.assert_array_equal(problem.hessian.factors.transpose(1, 2, 0), layer.U)


@each_solver
def test_read_only_and_strided_arrays_and_parameters_are_taken(solver):
    layer = random_layer(0, 4, 8, 3)
    expected = solve(layer.problem, "2:4", solver).weight
    for array in (layer.weight, layer.A, layer.U):
        array.flags.writeable = False
    wide = np.zeros((8, 16))
    wide[::2, ::2] = layer.weight
    for weight in (layer.weight, np.asfortranarray(layer.weight), wide[::2, ::2]):
        result = solve(Problem(weight, RowHessian(np.asfortranarray(layer.A), layer.U)), "2:4", solver)
        np.testing.assert_allclose(result.weight, expected, rtol=1e-9, atol=1e-12)
    parameter = torch.nn.Parameter(torch.tensor(layer.weight))
    result = solve(Problem(parameter, RowHessian(torch.tensor(layer.A), torch.tensor(layer.U))), "2:4", solver)
    np.testing.assert_allclose(result.weight.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@each_solver
def test_the_same_problem_gives_the_same_answer(solver):
    layer = random_layer(1, 16, 32, 5, 1e5)
    for pattern in (0.6, "2:4"):
        first, second = (solve(layer.problem, pattern, solver) for _ in range(2))
        np.testing.assert_array_equal(first.weight, second.weight)
        np.testing.assert_array_equal(first.mask, second.mask)
        assert first.value == second.value


@each_solver
def test_one_state_serves_every_pattern(solver):
    problem = random_layer(2, 4, 8, 3).problem
    state = solver.init(problem)
    for pattern in ("2:4", 0.5, "1:4", 0.9, "2:4"):
        shared, fresh = solve(problem, pattern, solver, state=state), solve(problem, pattern, solver)
        np.testing.assert_array_equal(shared.weight, fresh.weight)


def test_a_result_comes_back_in_the_dtype_of_the_weight_and_is_graded_there():
    layer = random_layer(3, 4, 8, 3)
    coarse = replace(layer, weight=torch.tensor(layer.weight, dtype=torch.bfloat16))
    problem = Problem(coarse.weight, RowHessian(torch.tensor(layer.A), torch.tensor(layer.U)))
    result = solve(problem, 0, Magnitude())
    assert result.value == 0
    result = solve(problem, "2:4", SparseGPT())
    unrounded = SparseGPT().compute(SparseGPT().init(problem), NM(2, 4)).weight
    assert result.value == pytest.approx(explicit_value(coarse, result.weight), rel=1e-10)
    assert result.value != pytest.approx(explicit_value(coarse, unrounded), rel=1e-6)


def test_terms_are_reported_without_damping():
    rng = np.random.default_rng(0)
    weight, x, g = rng.normal(size=(3, 8)), rng.normal(size=(30, 8)), rng.normal(size=(5, 3, 8))
    problem = (0.7 * Reconstruction() + 0.3 * Fisher()).problem(weight, inputs=x, gradients=g, dampening_frac=1)
    result = solve(problem, "2:4", SparseGPT())
    moved = result.weight - weight
    terms = {
        "Reconstruction": np.sum((x @ moved.T) ** 2) / np.sum((x @ weight.T) ** 2),
        "Fisher": np.sum(np.einsum("sij,ij->si", g, moved) ** 2)
        / np.sum(np.einsum("sij,ij->si", g, weight) ** 2),
    }
    assert result.terms == pytest.approx(terms, rel=1e-10)
    assert result.value > 0.7 * terms["Reconstruction"] + 0.3 * terms["Fisher"]


def test_a_bound_is_found_where_it_is_asked_for():
    problem = random_layer(0, 4, 8, 3, condition=10).problem
    plain, bounded = solve(problem, "2:4", ADMM()), solve(problem, "2:4", ADMM(), bound=True)
    assert plain.bound is None and plain.gap is None
    assert bounded.bound == lower_bound(problem, "2:4") > 0
    assert bounded.gap == pytest.approx(1 - bounded.bound / bounded.value)
    proven = solve(problem, "2:4", Exact(), bound=True)
    assert proven.bound == solve(problem, "2:4", Exact()).bound > bounded.bound  # the higher of the two


# solvers that are wrong


@dataclass(frozen=True)
class Wrong:
    """Magnitude with its answer spoiled."""

    spoil: object
    name = "wrong"

    def unsupported(self, problem, pattern):
        return None

    def init(self, problem):
        return Magnitude().init(problem)

    def compute(self, state, pattern):
        answer = Magnitude().compute(state, pattern)
        weight, mask = answer.weight.copy(), answer.mask.copy()
        return self.spoil(weight, mask, state[0])


def spoiled(array, cell, value):
    array[cell] = value
    return array


WRONG = {
    "one weight too many": (lambda w, k, c: Answer(c, np.ones_like(k)), "missed its pattern"),
    "one too few": (lambda w, k, c: Answer(0 * w, np.zeros_like(k)), "missed its pattern"),
    "a mask off by one": (
        lambda w, k, c: Answer(w, spoiled(k, tuple(np.argwhere(~k)[0]), True)),
        "missed its pattern",
    ),
    "not zero outside its mask": (
        lambda w, k, c: Answer(spoiled(w, tuple(np.argwhere(~k)[-1]), 1e-30), k),
        "not zero outside its mask",
    ),
    "NaN": (
        lambda w, k, c: Answer(spoiled(w, (0, 0), np.nan), k),
        "returned NaN or infinity: raise dampening_frac",
    ),
    "infinity": (lambda w, k, c: Answer(spoiled(w, (1, 1), np.inf), k), "returned NaN or infinity"),
    "one row": (lambda w, k, c: Answer(w[:1], k[:1]), "returned a weight of shape"),
    "transposed": (lambda w, k, c: Answer(w.T, k.T), "returned a weight of shape"),
    "a mask of another shape": (lambda w, k, c: Answer(w, k[:, :4]), "returned a mask of shape"),
    "worse than its start": (lambda w, k, c: Answer(w, k, start=c), "worse than the .* it started from"),
    "below its bound": (lambda w, k, c: Answer(w, k, bound=1e3), "claims that no value is below 1000"),
    "no number for a bound": (lambda w, k, c: Answer(w, k, bound=np.nan), "claims that no value is below nan"),
}


@pytest.mark.parametrize("pattern", [0.5, Unstructured(0.5, "row"), "2:4"], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_solver_is_caught(name, pattern):
    spoil, message = WRONG[name]
    with pytest.raises(SolverError, match=f"wrong .*{message}"):
        solve(random_layer(0, 4, 8, 3).problem, pattern, Wrong(spoil))


def test_the_same_solver_unspoiled_passes():
    result = solve(random_layer(0, 4, 8, 3).problem, 0.5, Wrong(lambda w, k, c: Answer(w, k, start=w)))
    np.testing.assert_array_equal(
        result.weight, solve(random_layer(0, 4, 8, 3).problem, 0.5, Magnitude()).weight
    )


class Fussy(Wrong):
    def unsupported(self, problem, pattern):
        return "missing a gradient"


def test_what_a_solver_does_not_support_it_says():
    with pytest.raises(
        NotSupportedError, match="wrong is not compatible with this problem: missing a gradient"
    ):
        solve(random_layer(0, 4, 8, 3).problem, 0.5, Fussy(None))


class Anywhere:
    """A pattern that solvers of fixed patterns do not know: no zeros at all."""

    def validate(self, shape):
        pass

    def zeros(self, shape):
        return 0

    def keep(self, scores):
        return np.ones(scores.shape, bool)

    def check(self, mask):
        assert mask.all()


def test_a_pattern_of_ones_own_goes_where_scores_are_all_a_solver_needs():
    layer = random_layer(0, 4, 8, 3)
    np.testing.assert_array_equal(solve(layer.problem, Anywhere(), Magnitude()).weight, layer.weight)
    with pytest.raises(NotSupportedError, match="needs an Unstructured or NM pattern, got Anywhere"):
        solve(layer.problem, Anywhere(), SparseGPT())


# calls that are wrong


def test_arguments_that_are_something_else_are_refused():
    layer = random_layer(0, 4, 8, 3)
    with pytest.raises(TypeError, match=r"problem must be a moonshot\.Problem, got ndarray"):
        solve(layer.weight, 0.5, Magnitude())
    for solver in (Magnitude, "magnitude", None):
        with pytest.raises(TypeError, match="solver must be an instance"):
            solve(layer.problem, 0.5, solver)
    with pytest.raises(TypeError, match="a pattern is"):
        solve(layer.problem, None, Magnitude())


@each_solver
def test_groups_that_do_not_divide_the_inputs_are_refused(solver):
    with pytest.raises(PatternError, match="divisible by 4, this layer has 6"):
        solve(random_layer(0, 2, 6, 0).problem, "2:4", solver)


def test_wanda_is_the_weight_times_the_norm_of_its_input():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(40, 8)) * np.geomspace(1, 100, 8), rng.normal(size=(5, 8))
    layer = Layer(weight, x.T @ x, None)
    mask = solve(layer.problem, Unstructured(0.5, "row"), SOLVERS["Wanda"]).mask
    scores = abs(weight) * np.linalg.norm(x, axis=0)
    np.testing.assert_array_equal(mask, scores >= np.sort(scores, axis=1)[:, 4:5])


def test_magnitude_keeps_the_largest():
    weight = np.array([[3.0, -1.0, 0.5, -4.0]])
    result = solve(Layer(weight, np.eye(4), None).problem, 0.5, Magnitude())
    assert result.weight.tolist() == [[3.0, 0, 0, -4.0]]
