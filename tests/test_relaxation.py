"""The relaxation: never above what enumeration finds, near it where theory says so, and exact where it must be."""

from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from moonshot.bounds import relaxation
from moonshot.bounds.minorant import first_minorant, proven_minorant, raised_minorant
from moonshot.layer.patterns import NM, Unstructured, as_pattern
from moonshot.layer.problem import Problem
from moonshot.linalg import RowHessian
from moonshot.solvers.base import solve
from moonshot.solvers.exact import Exact
from strategies import DEGENERATE, Layer, layers, on_torch, random_layer

few = settings(max_examples=25)


def relaxed(problem, pattern, iterations=60):
    return relaxation.relaxation_bound(problem, *as_pattern(pattern).groups(problem.shape), iterations)


def row_costs(hessian, centre):
    """{zeros: value} over every set of zeros of one row: `c_S' ([H^-1]_SS)^-1 c_S`, as a Schur complement."""
    columns, costs = range(len(centre)), {}
    for count in range(len(centre) + 1):
        for zeros in combinations(columns, count):
            pruned, kept = list(zeros), [j for j in columns if j not in zeros]
            schur = hessian[np.ix_(pruned, pruned)]
            if kept and pruned:
                cross = hessian[np.ix_(kept, pruned)]
                schur = schur - cross.T @ np.linalg.solve(hessian[np.ix_(kept, kept)], cross)
            costs[zeros] = float(centre[pruned] @ schur @ centre[pruned])
    return costs


def optimum(layer, pattern):
    """min F over the pattern, by enumeration of every row's sets of zeros."""
    m, d = layer.weight.shape
    rows = [row_costs(h, c) for h, c in zip(layer.dense(), layer.weight, strict=True)]
    if isinstance(pattern, NM):
        groups = [combinations(range(s, s + pattern.m), pattern.m - pattern.n) for s in range(0, d, pattern.m)]
        masks = [sum(parts, ()) for parts in product(*(list(g) for g in groups))]
        return sum(min(row[mask] for mask in masks) for row in rows)
    best = [[min(v for zeros, v in row.items() if len(zeros) == k) for k in range(d + 1)] for row in rows]
    if pattern.scope == "row":
        return sum(row[pattern.zeros((1, d))] for row in best)
    total = {0: 0.0}  # zeros so far: least value
    for row in best:
        longer = {}
        for (used, value), k in product(total.items(), range(d + 1)):
            longer[used + k] = min(longer.get(used + k, np.inf), value + row[k])
        total = longer
    return total[pattern.zeros((m, d))]


def at_zero(layer):
    return layer.problem.zero_value()


def assert_below(layer, pattern, iterations=40):
    bound = relaxed(layer.problem, pattern, iterations=iterations)
    best = optimum(layer, pattern)
    assert 0 <= bound <= best * (1 + 1e-9) + 1e-13 * at_zero(layer)
    return bound, best


# never above the optimum


@few
@given(layers(max_columns=7, max_rows=3), st.floats(0, 1))
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_below_the_optimum_of_a_budget(scope, layer, sparsity):
    assert_below(layer, Unstructured(sparsity, scope))


@few
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 7, 8, 11]), st.floats(1, 8), st.sampled_from([1, 2, 3])
)
def test_below_the_optimum_of_groups(seed, n, exponent, kept):
    layer = random_layer(seed, 2, 8, n, 10**exponent)
    assert_below(layer, NM(kept, 4))


@few
@given(layers(max_columns=7, max_rows=3), st.floats(0, 1))
def test_below_the_optimum_where_rows_share_a_minorant(layer, sparsity):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relaxation, "_AFFORDABLE", 0)
        assert_below(layer, Unstructured(sparsity))


@pytest.mark.parametrize("name", DEGENERATE)
def test_below_the_optimum_of_degenerate_layers(name):
    layer = DEGENERATE[name]
    patterns = [Unstructured(s, scope) for s in (0, 0.5, 1) for scope in ("layer", "row")]
    if layer.weight.shape[1] % 4 == 0:
        patterns.append(NM(2, 4))
    for pattern in patterns:
        assert_below(layer, pattern)


@pytest.mark.parametrize("seed", range(8))
def test_float32_is_true_and_as_good(seed, monkeypatch):
    monkeypatch.setattr(relaxation, "_AFFORDABLE", 0)
    wide = random_layer(seed, 2, 8, seed % 4, 10.0 ** (seed % 4 + 1))
    narrow = replace(wide, weight=wide.weight.astype(np.float32))
    bound, _ = assert_below(narrow, NM(2, 4))
    assert bound == pytest.approx(relaxed(wide.problem, "2:4", iterations=40), rel=0.05)


# how near


def row_ratio(seed, condition, sparsity, n):
    """The bound over the optimum on one row of 8 to 12 inputs."""
    layer, pattern = random_layer(seed, 1, 8 + seed % 5, n, condition), Unstructured(sparsity)
    return relaxed(layer.problem, pattern) / optimum(layer, pattern)


@pytest.mark.parametrize(
    ("condition", "n", "least"),
    [(1e1, 0, 0.8), (1e1, 3, 0.7), (1e2, 0, 0.6), (1e3, 0, 0.35), (1e3, 3, 0.15)],
)
def test_median_of_a_fixed_set(condition, n, least):
    ratios = [row_ratio(seed, condition, sparsity, n) for seed in range(5) for sparsity in (0.5, 0.7)]
    assert max(ratios) <= 1 + 1e-9
    assert np.median(ratios) >= least


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 3), st.floats(0, 1))
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_exact_where_the_hessian_is_diagonal(scope, seed, d, m, sparsity):
    rng = np.random.default_rng(seed)
    layer = Layer(rng.normal(size=(m, d)), np.diag(10 ** rng.uniform(-4, 4, size=d)), None)
    pattern = Unstructured(sparsity, scope)
    costs = np.diag(layer.A) * layer.weight**2
    size, zeros = pattern.groups((m, d))
    best = np.sort(costs.reshape(-1, size))[:, :zeros].sum()
    assert relaxed(layer.problem, pattern, iterations=300) == pytest.approx(best, rel=1e-3)


def test_nothing_pruned_costs_nothing_and_everything_costs_everything():
    layer = random_layer(0, 4, 8, 3, 1e4)
    for everything in (0, "4:4", Unstructured(0, "row")):
        assert relaxed(layer.problem, everything) == 0
    for nothing in (1, "0:4", Unstructured(1, "row")):
        assert relaxed(layer.problem, nothing) == pytest.approx(at_zero(layer), rel=1e-6)


def perspective(hessian, centre, kept, minorant):
    """The perspective relaxation of one row by a general-purpose method over the shares z."""
    b = hessian @ centre

    def value(z):
        v = np.linalg.solve(hessian + np.diag(minorant * (1 / z - 1)), b)
        return centre @ b - b @ v, -minorant * v**2 / z**2

    sum_is_kept = {"type": "eq", "fun": lambda z: z.sum() - kept, "jac": lambda z: np.ones_like(z)}
    start = np.full(len(centre), kept / len(centre))
    return minimize(
        value,
        start,
        jac=True,
        bounds=[(1e-6, 1)] * len(centre),
        constraints=sum_is_kept,
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 200},
    ).fun


@pytest.mark.parametrize("seed", range(4))
def test_reaches_the_semidefinite_relaxation(seed):
    layer = random_layer(seed, 1, 4, 2 * (seed % 2), 30)
    hessian, centre = layer.dense()[0], layer.weight[0]

    def negative(logs):
        minorant = np.exp(logs)
        if np.linalg.eigvalsh(hessian - np.diag(minorant))[0] < 0:
            return 0.0
        return -perspective(hessian, centre, 2, minorant)

    start = np.log(first_minorant(hessian))
    best = -minimize(negative, start, method="Nelder-Mead", options={"maxfev": 400}).fun
    assert best > -1.05 * negative(start)  # there is something to gain in D
    assert relaxed(layer.problem, 0.5, iterations=300) >= 0.98 * best


# laws


@pytest.mark.parametrize("n", [0, 3])
def test_more_zeros_never_cost_less(n):
    layer = random_layer(n, 2, 8, n, 1e2)
    bounds = [relaxed(layer.problem, Unstructured(k / 16)) for k in range(17)]
    for fewer, more in pairwise(bounds):
        assert fewer <= more * 1.01
    assert bounds[0] == 0 and bounds[16] == pytest.approx(at_zero(layer), rel=1e-6)


@pytest.mark.parametrize("n", [0, 3])
def test_more_iterations_are_never_worse(n):
    layer = random_layer(n, 2, 8, n, 1e3)
    bounds = [relaxed(layer.problem, "2:4", iterations=k) for k in (1, 3, 10, 30, 100, 300)]
    for fewer, more in pairwise(bounds):
        assert fewer <= more * (1 + 1e-5)
    assert bounds[-1] > 1.2 * bounds[1]


def test_scales_as_the_loss_does():
    layer = random_layer(0, 3, 8, 2, 1e3)
    bound = relaxed(layer.problem, "2:4")
    for of_hessian, of_weight in ((4.0**10, 1), (4.0**-10, 1), (1, 2.0**16), (1, 2.0**-16), (4.0**-7, 2.0**9)):
        scaled = Layer(layer.weight * of_weight, layer.A * of_hessian, layer.U * of_hessian**0.5)
        assert relaxed(scaled.problem, "2:4") == pytest.approx(bound * of_hessian * of_weight**2, rel=1e-6)


def test_the_order_of_rows_and_of_inputs_within_groups_does_not_matter():
    layer = random_layer(0, 3, 8, 2, 1e2)
    rows, columns = [2, 0, 1], [3, 1, 0, 2, 5, 7, 6, 4]
    other = Layer(layer.weight[rows][:, columns], layer.A[columns][:, columns], layer.U[rows][:, columns])
    for pattern in ("2:4", 0.6, Unstructured(0.6, "row")):
        bounds = [relaxed(x.problem, pattern, iterations=300) for x in (layer, other)]
        assert bounds[0] == pytest.approx(bounds[1], rel=2e-2)


def test_the_constant_is_part_of_it():
    layer = random_layer(0, 3, 8, 2, 1e2)
    plain, lifted = (Problem(layer.weight, layer.hessian, constant=x) for x in (0.0, 5.0))
    for pattern in ("2:4", 0, 1):
        assert relaxed(lifted, pattern) == pytest.approx(relaxed(plain, pattern) + 5, rel=1e-14)


def test_the_centre_need_not_be_the_weight():
    layer, rng = random_layer(0, 3, 8, 2, 1e2), np.random.default_rng(0)
    centre = rng.normal(size=(3, 8))
    moved = Problem(layer.weight, layer.hessian, centre=centre)
    assert relaxed(moved, "2:4") == relaxed(replace(layer, weight=centre).problem, "2:4")


def test_inputs_are_not_changed_and_the_same_call_gives_the_same_bound():
    layer = random_layer(0, 3, 8, 2, 1e2)
    problem = Problem(layer.weight.copy(), RowHessian(layer.A.copy(), layer.U.copy()))
    assert relaxed(problem, "2:4") == relaxed(problem, "2:4")
    np.testing.assert_array_equal(problem.centre, layer.weight)
    np.testing.assert_array_equal(problem.hessian.A, layer.A)
    np.testing.assert_array_equal(problem.hessian.factors.transpose(1, 2, 0), layer.U)


def test_arrays_of_other_kinds(backend):
    layer = random_layer(0, 3, 8, 2, 1e2)
    hessian = RowHessian(backend.array(layer.A), backend.array(layer.U))
    bound = relaxed(Problem(backend.array(layer.weight), hessian), 0.5, iterations=300)
    assert isinstance(bound, float)
    optimum = solve(layer.problem, Unstructured(0.5), Exact()).value
    assert (
        0.97 * relaxed(layer.problem, 0.5, iterations=300) < bound <= optimum
    )  # rounding decides which way it takes


@pytest.mark.parametrize("n", [0, 2])
def test_the_path_of_arrays_on_a_device_gives_the_same(n, monkeypatch):
    monkeypatch.setattr(relaxation, "_AFFORDABLE", 0)
    layer = random_layer(0, 3, 8, n, 1e2)
    tensors = on_torch(layer.problem)
    for pattern in ("2:4", 0.6):
        bound = relaxed(layer.problem, pattern, iterations=300)
        assert relaxed(tensors, pattern, iterations=300) == pytest.approx(bound, rel=3e-3)


# minorants


@few
@given(layers(max_rows=1), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 0.1, 1e-3]))
def test_minorants_stay_below_and_gain(layer, seed, barrier):
    a = layer.dense()[0]
    slope = np.random.default_rng(seed).uniform(size=len(a)) / np.diag(a)
    scale = 1 / np.sqrt(np.diag(a))
    minorant = first_minorant(a)
    for _ in range(5):
        minorant = raised_minorant(a, minorant, slope, barrier)
        assert (minorant > 0).all()
        assert np.linalg.eigvalsh(scale[:, None] * (a - np.diag(minorant)) * scale)[0] > -1e-13
    proven = proven_minorant(a, minorant, rank=20)
    assert ((proven > 0) & (proven < minorant)).all()


def test_newton_steps_reach_the_largest_minorant():
    a = np.array(
        [[2.0, 1.0], [1.0, 5.0]]
    )  # (2 - x)(5 - y) >= 1: x + 2 y is largest at 2 - x = 2 (5 - y) = sqrt(2)
    minorant = first_minorant(a)
    for k in range(60):
        minorant = raised_minorant(a, minorant, np.array([1.0, 2.0]), max(0.8**k, 1e-6))
    np.testing.assert_allclose(minorant, [2 - np.sqrt(2), 5 - np.sqrt(0.5)], rtol=1e-4)


def test_a_matrix_too_close_to_singular_proves_nothing():
    a = np.array([[1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_array_equal(proven_minorant(a, np.array([1e-17, 1e-17])), 0)
    hessian = RowHessian(np.array([[1.0, 1.0], [1.0, 1 + 4e-16]]))
    assert relaxed(Problem(np.array([[1.0, 2.0]]), hessian), 0.5) == 0
