"""A weighting sweep's problems against their definition, their answers against problems alone, and what is shared."""

import gc
import importlib
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moonshot as ms
from moonshot.layer.objectives import quadratics_of
from moonshot.linalg import hessian as hessian_module
from moonshot.linalg.backend import like
from moonshot.linalg.weighted import WeightedHessians
from strategies import layers, random_layer
from test_objectives import Pulled
from tests.every_solver import each_solver
from tests.examples.weightings import trade_off

sweep_module = importlib.import_module(
    "moonshot.layer.weighting_sweep"
)  # moonshot.layer.weighting_sweep is the function
R, F, T = ms.Reconstruction(), ms.Fisher(), ms.TokenFisher()
M, D = 4, 8
LINE = [(1 - b) * R + b * F for b in (0.0, 0.3, 0.9)]
PATTERNS = [ms.NM(2, 4), ms.Unstructured(0.5), ms.Unstructured(0.6, scope="row")]


def observed(seed=0, *, m=M, d=D, samples=3, tokens=40, decay=1.0, dead=()):
    """Observations of a layer whose inputs have singular values from 1 to `decay`."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    seen = {
        "inputs": rng.normal(size=(tokens, d)) @ (np.geomspace(1, decay, d)[:, None] * basis),
        "gradients": rng.normal(size=(samples, m, d)),
        "output_gradients": rng.normal(size=(tokens, m)),
    }
    for name in ("inputs", "gradients"):
        seen[name][..., list(dead)] = 0
    return rng.normal(size=(m, d)), seen


layers_seen = st.builds(
    observed,
    st.integers(0, 2**32 - 1),
    m=st.integers(1, 5),
    samples=st.sampled_from([1, D - 1, D, D + 3]),
    tokens=st.sampled_from([3, 40]),
    decay=st.sampled_from([1.0, 1e-3, 1e-5]),
    dead=st.sampled_from([(), (0, 5)]),
)
weights = st.floats(0, 0.99)


def explicit(weight, seen, reconstruction, fisher, tokens, fraction):
    """Every H_i of the sweep's definition, formed here, and the ridge."""
    x, g, s = seen["inputs"], seen["gradients"], np.mean(seen["output_gradients"] ** 2, axis=1)
    relative = {}
    for name, h in {
        "R": np.stack([x.T @ x] * len(weight)),
        "T": np.stack([x.T @ (s[:, None] * x)] * len(weight)),
        "F": np.einsum("sij,sik->ijk", g, g) / len(g),
    }.items():
        relative[name] = h / np.einsum("ij,ijk,ik->", weight, h, weight)
    shared = reconstruction * relative["R"] + tokens * relative["T"]
    ridge = fraction * np.trace(shared[0]) / weight.shape[1]
    return shared + fisher * relative["F"], ridge


def alone(problem):
    """A problem with the same Hessian that shares nothing."""
    hessian = problem.hessian
    U = None if hessian.factors is None else hessian.factors.transpose(1, 2, 0)
    return ms.Problem(problem.weight, ms.RowHessian(hessian.A, U))


# the definition


@given(layers_seen, weights, st.floats(0, 1), st.sampled_from([1e-3, 0.1]))
def test_problems_are_as_defined(layer, b, mix, fraction):
    weight, seen = layer
    a = 1 - b
    objectives = [0.5 * ((1 - mix) * R + mix * T) + 0.5 * F, a * ((1 - mix) * R + mix * T) + b * F]
    problem = list(ms.weighting_sweep(objectives, weight, **seen, dampening_frac=fraction))[1]
    hessians, ridge = explicit(weight, seen, a * (1 - mix), b, a * mix, fraction)
    hessians = hessians + ridge * np.eye(D)
    size = np.max(abs(hessians))
    V = np.random.default_rng(1).normal(size=weight.shape)
    moved = V - weight
    products = np.einsum("ijk,ik->ij", hessians, moved)
    assert problem.value(V) == pytest.approx(np.sum(products * moved), rel=1e-9)
    np.testing.assert_allclose(problem.hessian.matvec(moved), products, rtol=1e-9, atol=1e-11 * size)
    for i, dense in enumerate(hessians):
        np.testing.assert_allclose(problem.hessian.row(i), dense, rtol=1e-9, atol=1e-13 * size)
    losses = sum(term.weight * term.loss(V) for term in problem.terms)
    assert losses + ridge * np.sum(moved**2) == pytest.approx(problem.value(V), rel=1e-9)
    assert problem.damping == fraction


def test_a_front_has_one_problem_for_each_objective_in_their_order():
    weight, seen = observed()
    problems = list(ms.weighting_sweep(iter(LINE), weight, **seen))
    assert [problem.hessian.rank for problem in problems] == [0, 3, 3]
    shares = [{term.name: term.weight for term in problem.terms} for problem in problems]
    assert [share["Fisher"] for share in shares] == pytest.approx([0.0, 0.3, 0.9])
    assert [share["Reconstruction"] for share in shares] == pytest.approx([1.0, 0.7, 0.1])


def test_every_result_has_every_term():
    weight, seen = observed()
    for problem in ms.weighting_sweep(LINE, weight, **seen):
        result = ms.solve(problem, "2:4", ms.SparseGPT())
        for term in (R, F):
            expected = term.problem(weight, **seen).terms[0].loss(result.weight)
            assert result.terms[term.name] == pytest.approx(expected, rel=1e-9)


def test_a_front_of_reconstruction_alone_is_its_own_problem():
    weight, seen = observed()
    (problem,) = ms.weighting_sweep([R], weight, inputs=seen["inputs"])
    expected = R.problem(weight, inputs=seen["inputs"])
    assert problem.value(0 * weight) == pytest.approx(expected.value(0 * weight), rel=1e-12)
    assert problem.hessian.factors is None


def test_terms_with_a_centre_of_their_own():
    weight, seen = observed()
    V = np.random.default_rng(2).normal(size=weight.shape)
    factored = Pulled(offset=0.5, factored=True)
    for pulled, other in ((Pulled(offset=0.5), F), (factored, R), (0.3 * factored + 0.7 * F, R)):
        objectives = [(1 - b) * pulled + b * other for b in (0.2, 0.7)]
        for problem in ms.weighting_sweep(objectives, weight, **seen):
            (x, (term,)) = seen["inputs"], [term for term in problem.terms if term.shared is not None]
            ridge = term.weight * 0.01 * np.sum(x**2) / term.at_zero / D
            expected = sum(term.weight * term.loss(V) for term in problem.terms)
            assert problem.value(V) == pytest.approx(expected + ridge * np.sum((V - weight) ** 2), rel=1e-9)
            at_centre = problem.value(problem.centre)
            assert all(problem.value(problem.centre + 0.01 * V * sign) > at_centre for sign in (1, -1))


@settings(max_examples=25)
@given(layers(max_condition=1e6), st.floats(1e-3, 1e3), st.floats(0, 1e3))
def test_a_weighted_hessian_is_that_of_its_parts(layer, a, b):
    weighted = WeightedHessians(layer.hessian).weighted(a, b)
    direct = ms.RowHessian(a * layer.A, None if layer.U is None or b == 0 else np.sqrt(b) * layer.U)
    for i in range(len(layer.weight)):
        np.testing.assert_allclose(weighted.row(i), direct.row(i), rtol=1e-12, atol=1e-12 * a)
    np.testing.assert_allclose(weighted.inverse_factor, direct.inverse_factor, rtol=1e-6, atol=1e-9 / a**0.5)
    np.testing.assert_allclose(weighted.saliency_scale, direct.saliency_scale, rtol=1e-6)
    assert (direct.factors is None) == (weighted.factors is None)
    joint = weighted.factors is not None
    (inverse, grams), (other, expected) = (h.shifted_inverse(0.7, "float64", joint) for h in (weighted, direct))
    np.testing.assert_allclose(inverse, other, rtol=1e-6, atol=1e-9)
    if joint:
        np.testing.assert_allclose(grams, expected, rtol=1e-6, atol=1e-9 * np.max(abs(expected)))
        tiles, share = weighted.half_product("float64", 2)
        for i, u in enumerate(np.sqrt(b) * layer.U):
            expected = direct.inverse_factor @ u
            np.testing.assert_allclose(
                np.sqrt(share) * tiles[:, i // 2, :, i % 2],
                expected,
                rtol=1e-6,
                atol=1e-9 * np.max(abs(expected)),
            )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kind_of_array(backend, dtype):
    weight, seen = observed()
    expected = list(ms.weighting_sweep(LINE, weight, **seen))
    arrays = {name: backend.array(value, dtype) for name, value in seen.items()}
    found = list(ms.weighting_sweep(LINE, backend.array(weight, dtype), **arrays))
    for one, other in zip(found, expected, strict=True):
        assert one.zero_value() == pytest.approx(other.zero_value(), rel=1e-4)
        assert one.terms[0].centre is one.terms[1].centre and one.constant == 0
        np.testing.assert_array_equal(like(one.centre, one.weight).tolist(), one.weight.tolist())
        result = ms.solve(one, "2:4", ms.SparseGPT())
        assert backend.numpy(result.weight).dtype == dtype
        assert result.value == pytest.approx(ms.solve(other, "2:4", ms.SparseGPT()).value, rel=1e-2)


# sweeps among any objectives


def test_neighbours_with_a_factorisation_in_common_are_a_sweep(monkeypatch):
    weight, seen = observed()
    observation = ms.Observation(**seen)
    terms = [R, F, T]
    quadratics = quadratics_of(terms, weight, [term.accumulate(None, observation) for term in terms])
    both = 0.75 * R + 0.25 * T
    runs = [[0.8 * both + 0.2 * F, both], [F], [R, 0.5 * R + 0.5 * F, 0.9 * R + 0.1 * F], [R + T]]
    made = []

    def counted(hessian):
        made.append(hessian)
        return WeightedHessians(hessian)

    monkeypatch.setattr(sweep_module, "WeightedHessians", counted)
    problems = sweep_module.weighting_sweeps(
        [objective for run in runs for objective in run], weight, quadratics, 0.1
    )
    V = np.random.default_rng(1).normal(size=weight.shape)
    for run in runs:
        if len(run) == 1:
            expected = [run[0].problem(weight, **seen, dampening_frac=0.1)]
        else:
            expected = list(ms.weighting_sweep(run, weight, **seen, dampening_frac=0.1))
        for one in expected:
            problem = next(problems)
            assert problem.value(V) == pytest.approx(one.value(V), rel=1e-12)
            assert {term.name for term in problem.terms} == {term.name for term in one.terms}
    assert next(problems, None) is None
    assert len(made) == 2 + 2  # two sweeps among them, and the two they are compared to


def test_objectives_alone_are_no_sweep():
    weight, seen = observed()
    term = R.accumulate(None, ms.Observation(**seen))
    (problem,) = sweep_module.weighting_sweeps([R], weight, {R: R.quadratic(term, weight)})
    V = 0.3 * weight
    assert problem.value(V) == R.problem(weight, **seen).value(V)
    assert list(sweep_module.weighting_sweeps([], weight, {})) == []


# solvers


@settings(max_examples=12)
@given(layers_seen, st.sampled_from(PATTERNS))
@each_solver
def test_answers_are_those_of_problems_built_alone(solver, layer, pattern):
    weight, seen = layer
    for problem in ms.weighting_sweep(LINE, weight, **seen, dampening_frac=1e-3):
        ours, theirs = ms.solve(problem, pattern, solver), ms.solve(alone(problem), pattern, solver)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert ours.value == pytest.approx(theirs.value, rel=1e-6, abs=1e-9 * problem.zero_value())


# what is shared, and what is not kept


@pytest.fixture
def calls(monkeypatch):
    """How often each factorisation was computed, and each product with the factors."""
    counts = dict.fromkeys(("inverse_factor", "half_product", "half_product_grams"), 0)

    def watch(name):
        compute = getattr(hessian_module, name)

        def counted(*arguments, **keywords):
            counts[name] += 1
            return compute(*arguments, **keywords)

        monkeypatch.setattr(hessian_module, name, counted)

    for name in counts:
        watch(name)
    return counts


@pytest.fixture
def shifts(monkeypatch):
    """What the shifted inverse was asked for of a Hessian with factorisations of its own, in turn."""
    asked, compute = [], ms.RowHessian.shifted_inverse

    def recorded(hessian, *arguments):
        asked.append(arguments)
        return compute(hessian, *arguments)

    monkeypatch.setattr(ms.RowHessian, "shifted_inverse", recorded)
    return asked


def assert_the_first_are_asked_once(asked):
    assert asked and all(asked.count(arguments) == 1 for arguments in list(dict.fromkeys(asked))[:4])


def solve_along_a_sweep(solver, shares):
    """Every weighting with these shares of Fisher, for two patterns, each with a state of its own."""
    weight, seen = observed()
    objectives = [(1 - b) * (0.3 * R + 0.1 * T) + b * F for b in shares]
    for problem in ms.weighting_sweep(objectives, weight, **seen):
        for pattern in ("2:4", 0.5):
            ms.solve(problem, pattern, solver, state=solver.init(problem))


def test_a_product_of_all_factors_is_computed_once(calls):
    solve_along_a_sweep(ms.SparseGPT(), np.linspace(0, 0.9, 10))
    assert calls == {"inverse_factor": 1, "half_product": 1, "half_product_grams": 0}


def test_the_first_shifted_inverses_are_computed_once(calls, shifts):
    solve_along_a_sweep(ms.ADMM(), np.linspace(0.1, 0.9, 9))
    assert_the_first_are_asked_once(shifts)
    with_grams = sum(grams for _, _, grams in shifts)
    assert calls == {"inverse_factor": 1 + len(shifts), "half_product": 0, "half_product_grams": with_grams}


def test_patterns_of_one_state_share_its_inverses(shifts):
    problem, solver = random_layer(0, M, D, 2).problem, ms.ADMM()
    state = solver.init(problem)
    found = ms.solve(problem, "2:4", solver, state=state)
    again = ms.solve(problem, "2:4", solver, state=state)
    assert_the_first_are_asked_once(shifts)
    np.testing.assert_array_equal(again.weight, found.weight)


def test_a_hessian_of_its_own_keeps_nothing_but_its_inverse_factor():
    weight, seen = observed()
    problem = (R + F).problem(weight, **seen)
    before = set(vars(problem.hessian))
    kept = [
        problem.hessian.half_product("float64", 2)[0],
        *problem.hessian.shifted_inverse(0.7, "float64", True),
    ]
    references = [weakref.ref(array) for array in kept]
    del kept
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert set(vars(problem.hessian)) == before


def test_what_a_front_keeps_goes_with_it():
    layer = random_layer(0, M, D, 3)
    hessians = WeightedHessians(layer.hessian)
    one = hessians.weighted(0.5, 0.5)
    one.half_product("float64", 2)
    kept = weakref.ref(hessians.half_product("float64", 2)[0])
    del hessians
    gc.collect()
    assert kept() is not None
    del one
    gc.collect()
    assert kept() is None


def test_problems_are_made_as_they_are_asked_for():
    weight, seen = observed()
    problems = ms.weighting_sweep(LINE, weight, **seen)
    factors = weakref.ref(next(problems).hessian)
    next(problems)
    gc.collect()
    assert factors() is None


# what is refused


@pytest.mark.parametrize(
    ("objectives", "error", "message"),
    [
        ([], ValueError, "at least one objective"),
        (R + F, TypeError, "pass a list"),
        (0.5, TypeError, "pass a list"),
        ([R, 0.5], TypeError, "a weighting sweep is made of objectives .* got 0.5"),
        ([0.5 * R + 0.5 * F, F], ValueError, "Fisher alone .* give Reconstruction a small weight"),
        (
            [R + T + F, R + 2 * T + F],
            ValueError,
            "ratio of Reconstruction to TokenFisher .* call weighting_sweep once for",
        ),
        ([R, T], ValueError, "ratio of Reconstruction to TokenFisher"),
        ([0 * R], ValueError, "give one a positive weight"),
    ],
)
def test_objectives_without_a_common_factorisation_are_refused(objectives, error, message):
    weight, seen = observed()
    with pytest.raises(error, match=message):
        ms.weighting_sweep(objectives, weight, **seen)


def test_weights_beyond_one_are_refused():
    with pytest.raises(ValueError, match="must be finite and not negative, got -0.5"):
        [(1 - b) * R + b * F for b in (0.5, 1.5)]


def test_bad_layers_are_refused_before_the_first_problem():
    weight, seen = observed()
    with pytest.raises(ValueError, match="Fisher needs gradients"):
        ms.weighting_sweep(LINE, weight, inputs=seen["inputs"])
    with pytest.raises(ValueError, match="dampening_frac must be"):
        ms.weighting_sweep(LINE, weight, **seen, dampening_frac=-1)
    with pytest.raises(ValueError, match="weight holds NaN"):
        ms.weighting_sweep(LINE, weight * np.nan, **seen)


@pytest.mark.parametrize("shared", [0, -1, np.inf, np.nan])
def test_weights_of_the_shared_matrix_must_be_positive(shared):
    with pytest.raises(ValueError, match="weight of the shared matrix must be positive"):
        WeightedHessians(random_layer(0, M, D, 3).hessian).weighted(shared, 1)


@pytest.mark.parametrize("factors", [-1, np.inf, np.nan])
def test_weights_of_the_factors_must_not_be_negative(factors):
    with pytest.raises(ValueError, match="weight of the factors must be 0 or more"):
        WeightedHessians(random_layer(0, M, D, 3).hessian).weighted(1, factors)


# the example of the docs


def test_a_trade_off_is_a_sweep():
    weight, seen = observed(1, m=32, d=32, samples=4, tokens=100)
    points = trade_off(weight, seen["inputs"], seen["gradients"], "2:4")
    assert points.shape == (10, 2) and np.all(points > 0)
    assert points[0, 0] < points[5, 0] < points[-1, 0] and points[0, 1] > points[5, 1] > points[-1, 1]
