"""solve: every solver on every kind of problem and pattern, graded by `solve` alone."""

import gc
import weakref
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch

import moonshot as ms
from conftest import Backend
from moonshot.bounds import certificate
from moonshot.bounds.certificate import lower_bound
from moonshot.layer.objectives import Fisher, Reconstruction
from moonshot.layer.patterns import NM, PatternError, Unstructured
from moonshot.layer.problem import Deviation, Problem, Status
from moonshot.linalg import RowHessian
from moonshot.solvers import (
    ADMM,
    IHT,
    OBS,
    Answer,
    Exact,
    Magnitude,
    NotSupportedError,
    Solver,
    SolverError,
    SparseGPT,
    Wanda,
    solve,
)
from strategies import Layer, random_layer
from tests.every_solver import SOLVERS, each_solver

PATTERNS = [
    *(Unstructured(s, scope) for s in (0, 0.3, 0.5, 0.9, 1) for scope in ("layer", "row")),
    *(NM(n, m) for n, m in ((2, 4), (1, 4), (0, 4), (4, 4), (1, 8))),
]


class Anywhere:
    """A pattern that solvers of fixed patterns do not know: no zeros at all."""

    def validate(self, shape):
        pass

    def zeros(self, shape):
        return 0

    def keep(self, scores):
        return scores == scores

    def check(self, mask):
        assert bool(mask.all())

    def __str__(self):
        return "one's own"


def explicit_value(layer, V):
    """F(V) from the explicit H_i and nothing of moonshot."""
    difference = V.astype(np.float64) - layer.weight.astype(np.float64)
    return float(np.einsum("ij,ijk,ik->", difference, layer.dense(), difference))


def assert_graded(layer, result, pattern, backend=None, dtype="float64"):
    """Everything a Result says, recomputed from its weight; layer.weight: as it was given, in NumPy."""
    backend = backend or Backend("numpy")
    weight, mask = backend.numpy(backend.widened(result.weight)), backend.numpy(result.mask)
    assert str(result.weight.dtype).removeprefix("torch.") == dtype and mask.dtype == bool
    assert mask.size - mask.sum() == pattern.zeros(mask.shape)
    pattern.check(mask)
    assert np.isfinite(weight).all() and (weight[~mask] == 0).all()
    at_zero = explicit_value(layer, 0 * layer.weight)
    assert result.value == pytest.approx(explicit_value(layer, weight), rel=1e-10, abs=1e-13 * at_zero)
    assert result.relative == pytest.approx(result.value / at_zero if at_zero else 0, rel=1e-10, abs=1e-13)
    assert result.sparsity == pytest.approx(1 - mask.mean())
    assert result.pattern == str(pattern) and isinstance(result.status, Status) and result.seconds >= 0


# the grid

OWN_CENTRE = "a centre of its own"
LAYERS = {
    "shared": random_layer(0, 4, 8, 0, 1e2),
    "fewer factors than inputs": random_layer(1, 4, 8, 3, 1e2),
    "more factors than inputs": random_layer(2, 4, 8, 12, 1e2),
    "zero factors": replace(random_layer(3, 4, 8, 3, 1e2), U=np.zeros((4, 8, 3))),
    "wide": random_layer(4, 2, 72, 3, 1e2),
    OWN_CENTRE: random_layer(5, 4, 8, 3, 1e2),
}

MOVED = {"Swaps", "Exact"}  # what computes on the CPU wherever the layer is

# Everything that is refused, with the words: (solver, what it is refused for).
REFUSED = {
    (
        "SparseGPT",
        "one's own",
    ): "a sweep prunes equal groups of consecutive weights, and one's own has no",
    (
        "OBS",
        "one's own",
    ): "a trace of removals prunes equal groups of consecutive weights, and one's own has no",
    (
        "Swaps",
        "one's own",
    ): "exchanging weights prunes equal groups of consecutive weights, and one's own has no",
    ("Exact", "one's own"): "branch and bound prunes equal groups of consecutive weights, and one's own has no",
    ("Exact", "wide"): "a row has 72 columns, and branch and bound searches 64 at most",
}


def refusals(name, kind):
    """{pattern: words} of what REFUSED says of a solver on one kind of layer."""
    words = {}
    for pattern in (*PATTERNS, Anywhere()):
        for reason in (str(pattern), kind):
            if (name, reason) in REFUSED:
                words.setdefault(str(pattern), REFUSED[name, reason])
    return words


@pytest.mark.parametrize("name", SOLVERS)
def test_every_combination(name, backend):
    """Each is graded or refused in words, and what is refused is what REFUSED says."""
    solver = SOLVERS[name]
    dtypes = [dtype for dtype in ("float64", "float32", "float16", "bfloat16") if backend.has(dtype)]
    assert len(dtypes) >= 3
    for dtype, (kind, layer) in product(dtypes, LAYERS.items()):
        hessian = RowHessian(backend.array(layer.A), None if layer.U is None else backend.array(layer.U))
        centre = backend.array(layer.weight, dtype)
        if kind == OWN_CENTRE:
            problem = Problem(backend.array(layer.weight[::-1].copy(), dtype), hessian, centre=centre)
        else:
            problem = Problem(centre, hessian)
        given = replace(layer, weight=backend.numpy(backend.widened(centre)))
        refused, graded = {}, []
        for pattern in (*PATTERNS, Anywhere()):
            try:
                result = solve(problem, pattern, solver)
            except NotSupportedError as error:
                refused[str(pattern)] = str(error)
                continue
            assert_graded(given, result, pattern, backend, dtype)
            assert result.solver == solver.name
            moved = name in MOVED and backend.device == "cuda"
            assert result.note.endswith("on the CPU") == moved
            graded.append(str(pattern))
        expected = refusals(name, kind)
        assert refused.keys() == expected.keys(), (kind, dtype)
        assert all(expected[pattern] in said for pattern, said in refused.items())
        assert len(graded) + len(refused) == len({*graded, *refused}) == 16


def test_the_grid_holds_every_solver_of_the_package():
    assert {"Magnitude", "Wanda", "SparseGPT"} <= set(SOLVERS)
    assert all(isinstance(solver, Solver) for solver in SOLVERS.values())
    assert {name for name, _ in REFUSED} <= set(SOLVERS)
    assert {reason for _, reason in REFUSED} <= {"one's own", *LAYERS}
    assert len({solver.name for solver in SOLVERS.values()}) == len(SOLVERS)


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
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sparsity_zero_gives_the_weight_where_inputs_span_less_than_the_columns(solver, dtype):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weight, inputs = rng.normal(size=(5, 12)).astype(dtype), rng.normal(size=(1, 12))
        problem = Reconstruction().problem(weight, inputs=inputs, dampening_frac=0)
        result = solve(problem, "4:4", solver)
        np.testing.assert_allclose(result.weight, weight, atol=1e-5)
        assert result.relative < 1e-12


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
def test_one_state_serves_every_pattern(solver):
    problem = random_layer(2, 4, 8, 3).problem
    state = solver.init(problem)
    for pattern in ("2:4", 0.5, "1:4", 0.9, "2:4"):
        shared, fresh = solve(problem, pattern, solver, state=state), solve(problem, pattern, solver)
        np.testing.assert_array_equal(shared.weight, fresh.weight)


def test_what_is_graded_is_the_weight_as_it_comes_back():
    layer = random_layer(3, 4, 8, 3)
    coarse = replace(layer, weight=layer.weight.astype(np.float16))
    assert solve(coarse.problem, 0, Magnitude()).value == 0
    result = solve(coarse.problem, "2:4", SparseGPT())
    unrounded = SparseGPT().compute(SparseGPT().init(coarse.problem), NM(2, 4)).weight
    assert result.value == pytest.approx(explicit_value(coarse, result.weight), rel=1e-10)
    assert result.value != pytest.approx(explicit_value(coarse, unrounded), rel=1e-6)


@pytest.mark.parametrize("solver", [ADMM(), SparseGPT()], ids=lambda solver: solver.name)
def test_what_float16_cannot_hold_is_an_error(solver):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(20, 1)) + 0.1 * rng.normal(size=(20, 16))
    weight = 6e4 * rng.uniform(0.5, 1, (8, 16))
    for dtype, fits in (("float16", False), ("float32", True)):
        problem = Reconstruction().problem(weight.astype(dtype), inputs=shared)
        if fits:
            assert abs(solve(problem, "1:4", solver).weight).max() > 65504
        else:
            with pytest.raises(SolverError, match="beyond the largest float16: convert the model to bfloat16"):
                solve(problem, "1:4", solver)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_of_numpy_is_an_array_and_a_masked_one_is_refused():
    layer = random_layer(0, 4, 8, 3)
    expected = solve(layer.problem, "2:4", Magnitude())
    matrix = Problem(np.matrix(layer.problem.weight), layer.problem.hessian)
    np.testing.assert_array_equal(solve(matrix, "2:4", Magnitude()).weight, expected.weight)
    with pytest.raises(ms.MoonshotError, match=r"weight is a masked array: fill it first"):
        Problem(np.ma.masked_array(layer.problem.weight), layer.problem.hessian)


def mapped(array, folder):
    on_disk = np.memmap(folder / str(array.shape), dtype=array.dtype, mode="w+", shape=array.shape)
    on_disk[:] = array
    return on_disk


@pytest.mark.parametrize(
    "kind",
    [
        mapped,
        lambda array, folder: array.astype(">f4"),
        lambda array, folder: array.astype(">f8"),
        lambda array, folder: array.astype(np.longdouble),
    ],
    ids=["on disk", "big-endian floats", "big-endian", "long double"],
)
def test_arrays_of_every_kind_are_computed_on(kind, tmp_path):
    layer = random_layer(0, 4, 8, 3)
    weight, *observed = (kind(np.asarray(x, np.float32), tmp_path) for x in (layer.weight, layer.A, layer.U))
    plain = layer.weight.astype(np.float32).astype("float32" if weight.dtype.itemsize == 4 else "float64")
    expected = solve(Problem(plain, RowHessian(*(np.float64(x) for x in observed))), "2:4", ADMM())
    found = solve(Problem(weight, RowHessian(*observed)), "2:4", ADMM())
    assert found.weight.dtype == weight.dtype
    np.testing.assert_allclose(np.float64(found.weight), expected.weight, rtol=1e-3)
    assert found.value == pytest.approx(expected.value, rel=1e-4)


def test_a_sparse_tensor_is_refused():
    layer = random_layer(0, 4, 8, 3)
    with pytest.raises(TypeError, match=r"weight is a sparse tensor: call weight.to_dense\(\) first"):
        Problem(torch.tensor(layer.weight).to_sparse(), layer.problem.hessian)


def test_a_weight_too_large_to_square_is_an_error():
    x = np.random.default_rng(0).normal(size=(20, 8))
    with pytest.raises(ms.MoonshotError, match="limits of float64: scale the weight"):
        solve(Reconstruction().problem(np.full((4, 8), 1e200), inputs=x), "2:4", Magnitude())


def test_a_value_is_that_of_the_hessian_where_a_sum_in_float32_is_not_semidefinite():
    x = np.random.default_rng(1).normal(size=(2, 12)).astype(np.float32)
    weight = np.random.default_rng(0).normal(size=(6, 12))
    problem = Reconstruction().problem(weight, inputs=x, dampening_frac=1e-12)
    assert np.linalg.eigvalsh(problem.terms[0].shared.astype(float))[0] < 0
    result = solve(problem, "1:2", SparseGPT(block=1))
    difference = result.weight - weight
    np.testing.assert_allclose(result.value, np.sum((difference @ problem.hessian.A) * difference), rtol=1e-6)


def test_the_difference_of_float32_weights_is_not_rounded():
    weight = np.float32([[1 + 2**-20, 2**-20]])
    problem = Reconstruction().problem(weight, inputs=np.float32([[1, -1]]), dampening_frac=0.0)
    moved = np.float32([[3.1e-8, 1 + 2**-20]])
    exact = float(np.sum((np.float64(moved) - np.float64(weight)) @ [[1], [-1]]) ** 2)
    assert problem.graded(moved)[1][0] * problem.terms[0].at_zero == pytest.approx(exact, rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize(
    "solver", [ADMM(), IHT(), Magnitude(), OBS(), SparseGPT(), Wanda()], ids=lambda s: s.name
)
def test_weights_whose_squares_are_beyond_float32(solver, scale):
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    here, there = (
        solve(Reconstruction().problem(w, inputs=x), "2:4", solver)
        for w in (weight, weight * np.float32(scale))
    )
    np.testing.assert_array_equal(there.mask, here.mask)
    assert there.value == pytest.approx(here.value, rel=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("of_weight", [1.0, 1e-137, 1e126])
@pytest.mark.parametrize("of_inputs", [1.0, 1e-160, 1e160])
def test_what_is_beyond_the_range_of_numbers_is_said(of_weight, of_inputs):
    rng = np.random.default_rng(0)
    weight, x = of_weight * rng.normal(size=(4, 8)), of_inputs * rng.normal(size=(20, 8))
    if of_weight == of_inputs == 1:
        assert lower_bound(Reconstruction().problem(weight, inputs=x), "2:4") > 0
    else:
        with pytest.raises(ms.MoonshotError, match="limits of float64"):
            lower_bound(Reconstruction().problem(weight, inputs=x), "2:4")


@pytest.mark.filterwarnings("error")
def test_admm_is_no_worse_than_magnitude_where_float32_is_too_short():
    rng = np.random.default_rng(0)
    weight, gradients = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 7), (3, 4, 7)))
    repeated = np.concatenate([gradients, gradients, gradients])
    problem = Fisher().problem(weight, gradients=repeated, dampening_frac=1e-8)
    for sparsity in (0.0, 0.5):
        pattern = Unstructured(sparsity, "row")
        assert solve(problem, pattern, ADMM()).value <= solve(problem, pattern, Magnitude()).value + 1e-12


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


def test_a_bound_is_found_where_it_is_asked_for(monkeypatch):
    problem = random_layer(0, 4, 8, 3, condition=10).problem
    plain, bounded = solve(problem, "2:4", ADMM()), solve(problem, "2:4", ADMM(), bound=True)
    assert plain.bound is None and plain.gap is None
    assert bounded.bound == lower_bound(problem, "2:4") > 0
    assert bounded.gap == pytest.approx(1 - bounded.bound / bounded.value)

    monkeypatch.setattr(certificate, "_WORK", 0)  # the relaxation alone: now the solver's own bound is higher
    proven = solve(problem, "2:4", Exact(), bound=True)
    assert proven.bound == solve(problem, "2:4", Exact()).bound > lower_bound(problem, "2:4")


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
    "too large to square": (
        lambda w, k, c: Answer(spoiled(w, tuple(np.argwhere(k)[0]), 1e200), k),
        r"ended at F = (inf|nan): its weights are too large for float64",
    ),
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


@each_solver
def test_what_a_solver_held_is_gone_at_once(solver):
    """And not when cycles are looked for: a layer's arrays may leave no room for the next one's."""
    layer = random_layer(0, 3, 8, 2)

    def run():
        problem = Problem(layer.weight, RowHessian(layer.A, layer.U))
        for pattern in (NM(2, 4), Unstructured(0.5), Unstructured(0.5, "row")):
            solve(problem, pattern, replace(solver, block=4) if hasattr(solver, "block") else solver)

    run()  # what is imported and compiled
    gc.disable()
    gc.freeze()  # so that nothing but what comes now is collected
    try:
        run()
        assert gc.collect() == 0
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("m", [1, 4, 5, 40])
def test_values_of_few_rows_and_of_many(m, n):
    layer = random_layer(m, m, 32, n, condition=100.0)
    V = np.random.default_rng(n).normal(size=layer.weight.shape)
    assert layer.problem.value(V) == pytest.approx(explicit_value(layer, V), rel=1e-13)
    assert layer.problem.zero_value() == pytest.approx(explicit_value(layer, 0 * V), rel=1e-13)


def test_the_value_at_zero_is_found_when_it_is_asked_for(monkeypatch):
    layer, asked = random_layer(3, 4, 8, 2), []
    loss = Deviation.loss
    monkeypatch.setattr(
        Deviation, "loss", lambda self, shared, factors: asked.append(shared) or loss(self, shared, factors)
    )
    problem = layer.problem
    results = [solve(problem, pattern, SparseGPT()) for pattern in ("2:4", 0.5)]
    graded = [shared is not None for shared in asked]
    assert sum(graded) == 2  # F(V) of each, and no F(0)
    values = [result.value / explicit_value(layer, 0 * layer.weight) for result in results]
    assert [result.relative for result in results] == pytest.approx(values, rel=1e-12)
    assert sum(shared is not None for shared in asked) == 3  # one serves both


def test_a_result_lets_go_of_the_hessian_when_its_relative_value_is_known():
    problem = random_layer(3, 4, 8, 0).problem
    shared = weakref.ref(problem.hessian.A)
    result = solve(problem, "2:4", SparseGPT())
    del problem
    gc.collect()
    relative = result.relative
    gc.collect()
    assert shared() is None and result.relative == relative


def test_values_are_not_negative_by_rounding():
    A = np.ones((6, 6))  # nothing but rounding in directions whose sum is zero
    weight = np.random.default_rng(0).normal(size=(40, 6))
    values = []
    for seed in range(20):
        change = np.random.default_rng(seed).normal(size=weight.shape)
        change -= change.mean(axis=1, keepdims=True)
        values.append(Problem(weight, RowHessian(A)).value(weight + change))
    assert min(values) == 0
