"""The solver benchmark: it grades by itself, refuses what misses its pattern, and leaves no solver out."""

import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import moonshot as ms
from benchmarks.solvers.benchmark_utils.references import torch_alps, torch_obc, torch_sparsegpt, torch_wanda
from moonshot import solvers
from strategies import random_layer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FOLDER = BENCHMARKS / "solvers"
PATTERNS = [ms.NM(2, 4), ms.Unstructured(0.7), ms.Unstructured(0.5, scope="row")]


@pytest.fixture
def grading(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "benchmark_utils", raising=False)
    from benchmark_utils import grading

    return grading


def benchmark_layer(grading, factors, columns=12):
    layer = random_layer(3, 5, columns, factors)
    return grading.Layer(layer.weight, layer.A, layer.U), layer.problem


@pytest.mark.parametrize("factors", [0, 3])
def test_regrading_agrees_with_the_problem(grading, factors):
    layer, problem = benchmark_layer(grading, factors)
    v = np.random.default_rng(0).normal(size=layer.weight.shape)
    assert grading.row_values(layer, v).sum() == pytest.approx(problem.value(v), rel=1e-12)


@pytest.mark.parametrize("factors", [0, 3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_an_answer_without_its_pattern_is_refused(grading, factors, pattern):
    layer, problem = benchmark_layer(grading, factors)
    weight = ms.solve(problem, pattern, ms.ADMM()).weight
    grading.check(layer, weight, pattern)
    one_more = weight.copy()
    one_more[np.unravel_index(np.argmin(abs(weight)), weight.shape)] = 1.0
    with pytest.raises(ValueError, match="asks for"):
        grading.check(layer, one_more, pattern)
    with pytest.raises(ValueError, match="NaN"):
        grading.check(layer, weight * np.nan, pattern)
    with pytest.raises(ValueError, match="the layer"):
        grading.check(layer, weight[:1], pattern)


@pytest.mark.parametrize("factors", [0, 3])
@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[2]], ids=str)
def test_the_enumerated_optimum_is_the_exact_solver_s(grading, factors, pattern):
    layer, problem = benchmark_layer(grading, factors, columns=8)
    exact = ms.solve(problem, pattern, ms.Exact())
    optima = grading.row_optima(layer, pattern)
    np.testing.assert_allclose(grading.row_values(layer, exact.weight), optima, rtol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_references_meet_the_pattern_and_obc_is_obs(grading, pattern):
    layer, problem = benchmark_layer(grading, 3)
    size, zeros = grading.budget(pattern, layer.weight.shape)
    weight, a, u = (torch.tensor(array) for array in (layer.weight, layer.A, layer.U))
    grading.check(layer, torch_alps(weight, a, size, zeros).numpy(), pattern)
    if size > weight.shape[1]:
        return
    pruned, order, losses = torch_obc(weight, a + u @ u.mT, size, zeros)
    result = ms.solve(problem, pattern, ms.OBS())
    gone = torch.zeros_like(weight, dtype=torch.bool).scatter(1, order, True)
    np.testing.assert_array_equal(~gone.numpy(), result.mask)
    np.testing.assert_allclose(pruned, result.weight, rtol=1e-8, atol=1e-10)
    assert losses.sum() == pytest.approx(result.value, rel=1e-9)


@given(st.integers(0, 2**32 - 1), st.floats(0, 4), st.sampled_from([4, 8, 128]))
def test_the_reference_s_sweep_is_ours(seed, exponent, block):
    layer = random_layer(seed, 5, 20, 0, 10**exponent)
    theirs = torch_sparsegpt(torch.tensor(layer.weight), torch.tensor(layer.A), block).numpy()
    result = ms.solve(layer.problem, "2:4", ms.SparseGPT(block=block))
    np.testing.assert_array_equal(theirs != 0, result.mask)
    np.testing.assert_allclose(theirs, result.weight, rtol=1e-8, atol=1e-10)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 2), (20, 7)]))
def test_the_reference_s_wanda_is_ours(seed, budget):
    layer, (size, zeros) = random_layer(seed, 5, 20, 0), budget
    theirs = torch_wanda(torch.tensor(layer.weight), torch.tensor(layer.A), size, zeros)
    pattern = ms.NM(size - zeros, size)
    np.testing.assert_array_equal(theirs, ms.solve(layer.problem, pattern, ms.Wanda()).weight)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("pattern", [ms.NM(2, 4), ms.Unstructured(0.7)], ids=str)
def test_admm_is_no_worse_than_the_reference_s_alps(grading, pattern, condition):
    for seed in range(3):
        layer = random_layer(seed, 24, 64, 0, condition)
        size, zeros = grading.budget(pattern, layer.weight.shape)
        theirs = torch_alps(torch.tensor(layer.weight), torch.tensor(layer.A), size, zeros).numpy()
        assert ms.solve(layer.problem, pattern, ms.ADMM()).value <= layer.problem.value(theirs)


def test_every_public_solver_is_benchmarked():
    sources = [path.read_text("utf-8") for path in (FOLDER / "solvers").glob("*.py")]
    public = [getattr(solvers, name) for name in solvers.__all__]
    names = [item.__name__ for item in public if hasattr(item, "compute") and item is not ms.Solver]
    assert len(names) >= 8
    assert not [name for name in names if not any(f"ms.{name}(" in source for source in sources)]


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    import models

    yield models
    del sys.modules["models"]


def test_the_models_tried_are_compared_on_the_same_layers(tried):
    name = "convolutions, batch norm, one Linear"
    (cut, *cells), better = tried.measured(tried.MODELS[name], 32, seed=0)
    numbers = [float(cell) for cell in cells]
    assert cut == "graph" and len(numbers) == 8 and better
    for _, zeros, magnitude, admm in (numbers[:4], numbers[4:]):
        assert zeros == 50 and 0 < admm < magnitude < 1
    assert (numbers[0], numbers[4]) == (4, 3)  # 2:4 has no room along three input channels


def test_the_models_tried_have_batch_norms_that_know_their_data(tried):
    model, calibration, held_out = tried.built(tried.MODELS["ResNet"], 16, 0)
    seen = []
    norm = model.resnet.embedder.embedder.normalization
    norm.register_forward_pre_hook(lambda _norm, arguments: seen.append(arguments[0]))
    dense = tried.logits(model, calibration)
    assert dense.shape == (16, tried.CLASSES) and not dense.equal(tried.logits(model, held_out))
    np.testing.assert_allclose(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_benchopt_s_objective_gives_the_figures(monkeypatch):
    pytest.importorskip("benchopt")
    from benchopt.benchmark import Benchmark

    benchmark = Benchmark(FOLDER)
    (small,) = [dataset for dataset in benchmark.get_datasets() if dataset.name == "small"]
    data = small.get_instance(condition=10.0, factors=3, pattern="2:4").get_data()
    objective = benchmark.get_benchmark_objective().get_instance()
    objective.set_data(**data)
    results = [
        ms.solve(ms.Problem(layer.weight, ms.RowHessian(layer.A, layer.U)), data["pattern"], ms.Exact())
        for layer in data["layers"]
    ]
    figures = objective.evaluate_result([result.weight for result in results])
    assert figures["solved"] == 1 and figures["gap"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="asks for"):
        objective.evaluate_result([layer.weight for layer in data["layers"]])
