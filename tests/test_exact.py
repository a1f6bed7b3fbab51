"""Exact is enumeration, only faster: values against all masks, bounds against the optimum."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonshot.bounds import branching
from moonshot.bounds.branching_kernels import _cheapest, _largest_eigenvalue, _relaxed
from moonshot.layer.patterns import NM, Unstructured
from moonshot.layer.problem import Problem, Result, Status
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.solvers import ADMM, Exact, Magnitude, NotSupportedError, SparseGPT, Wanda, solve
from strategies import DEGENERATE, Layer, layers, on_torch, random_layer, with_condition

seeds = st.integers(0, 2**32 - 1)
LIMITS = {Status.NODE_LIMIT, Status.TIME_LIMIT}


def cost(h, c, zeros):
    """The least (v - c)' h (v - c) with these columns of v zero."""
    zeros = list(zeros)
    kept = np.setdiff1d(np.arange(len(c)), zeros)
    x = np.zeros(len(c))
    x[zeros] = -c[zeros]
    if len(kept):
        x[kept] = -np.linalg.solve(h[np.ix_(kept, kept)], h[np.ix_(kept, zeros)] @ x[zeros])
    return x @ h @ x


def best_of_row(h, c, zeros, group=None):
    """The optimum of one row with `zeros` in every group, over all masks."""
    group = group or len(c)
    parts = [combinations(range(start, start + group), zeros) for start in range(0, len(c), group)]
    return min(cost(h, c, sum(choice, ())) for choice in product(*parts))


def best_of_layer(layer, pattern):
    """The optimum of a layer, over all masks; a budget over the layer over all ways to share it too."""
    rows, (m, d) = list(zip(layer.dense(), layer.weight, strict=True)), layer.weight.shape
    if isinstance(pattern, NM):
        return sum(best_of_row(h, c, pattern.m - pattern.n, pattern.m) for h, c in rows)
    if pattern.scope == "row":
        return sum(best_of_row(h, c, pattern.zeros((1, d))) for h, c in rows)
    curves = [[best_of_row(h, c, k) for k in range(d + 1)] for h, c in rows]
    total = pattern.zeros((m, d))
    shares = (share for share in product(range(d + 1), repeat=m) if sum(share) == total)
    return min(sum(curve[k] for curve, k in zip(curves, share, strict=True)) for share in shares)


def assert_optimal(layer, pattern, tolerance=1e-7):
    result, best = solve(layer.problem, pattern, Exact()), best_of_layer(layer, pattern)
    noise = 1e-14 * layer.problem.zero_value()
    assert result.status is Status.OPTIMAL
    assert result.value == pytest.approx(best, rel=tolerance, abs=noise)
    assert result.bound <= best * (1 + 1e-12) + noise and result.gap <= tolerance
    pattern.check(result.mask)
    return result


# the optimum


@settings(max_examples=100)
@given(layers(max_columns=9, max_rows=3, max_condition=1e6), st.floats(0, 1))
def test_budgets_of_rows(layer, sparsity):
    assert_optimal(layer, Unstructured(sparsity, "row"))


@settings(max_examples=60)
@given(layers(max_columns=5, max_rows=3, max_condition=1e6), st.floats(0, 1))
def test_budgets_of_layers(layer, sparsity):
    assert_optimal(layer, Unstructured(sparsity))


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 4), NM(2, 3), NM(4, 8)], ids=str)
@settings(max_examples=20)
@given(seeds, st.floats(1, 6), st.sampled_from([0, 1, 3, 14]))
def test_groups(pattern, seed, logarithm, n):
    columns = {2: 10, 3: 9, 4: 8, 8: 8}[pattern.m]
    assert_optimal(random_layer(seed, 2, columns, n, 10**logarithm), pattern)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("n", [0, 4])
def test_fourteen_columns(condition, n):
    assert_optimal(random_layer(n, 1, 14, n, condition), Unstructured(0.5, "row"))


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_layers(name):
    layer = DEGENERATE[name]
    layer = Layer(layer.weight[:2], layer.A, None if layer.U is None else layer.U[:2])
    patterns = [Unstructured(s, scope) for s in (0, 0.5, 1) for scope in ("row", "layer")]
    for pattern in patterns + [NM(2, 4)] * (layer.weight.shape[1] == 8):
        assert_optimal(layer, pattern, tolerance=1e-5)


def test_columns_that_are_all_alike():
    layer = Layer(np.ones((2, 12)), np.eye(12) + 0.5, None)
    for pattern in (Unstructured(0.5), Unstructured(0.3, "row"), NM(1, 3)):
        if isinstance(pattern, NM) or pattern.scope == "row":
            assert_optimal(layer, pattern)
        else:
            assert solve(layer.problem, pattern, Exact()).status is Status.OPTIMAL


def test_independent_columns_are_pruned_by_score():
    rng = np.random.default_rng(0)
    layer = Layer(rng.normal(size=(5, 40)), np.diag(rng.uniform(0.1, 10, 40)), None)
    result = solve(layer.problem, Unstructured(0.6), Exact())
    expected = np.sort((layer.weight**2 * np.diag(layer.A)).ravel())[:120].sum()
    assert result.value == pytest.approx(expected, rel=1e-12) and result.status is Status.OPTIMAL


@pytest.mark.parametrize("n", [0, 5])
def test_as_good_as_every_other_solver(n):
    problem = random_layer(n, 3, 24, n, 1e3).problem
    for pattern in (Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)):
        exact = solve(problem, pattern, Exact())
        assert exact.status is Status.OPTIMAL
        for solver in (Magnitude(), Wanda(), SparseGPT(), ADMM()):
            assert exact.value <= solve(problem, pattern, solver).value * (1 + 1e-9)
            assert exact.bound <= solve(problem, pattern, solver).value


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_more_zeros_never_cost_less_and_one_budget_over_the_layer_never_more(scope):
    problem, solver = random_layer(1, 3, 12, 2, 1e4).problem, Exact()
    state = solver.init(problem)
    results = [solve(problem, Unstructured(k / 12, scope), solver, state=state) for k in range(13)]
    values = [result.value for result in results]
    assert values == sorted(values) and all(result.status is Status.OPTIMAL for result in results)
    if scope == "layer":
        by_row = [solve(problem, Unstructured(k / 12, "row"), solver, state=state).value for k in range(13)]
        assert all(layer <= row * (1 + 1e-9) + 1e-12 for layer, row in zip(values, by_row, strict=True))


def test_thirty_columns_at_half_are_routine():
    for seed in range(4):
        result = solve(random_layer(seed, 1, 30, 4, 1e3).problem, Unstructured(0.5, "row"), Exact(nodes=20_000))
        assert result.status is Status.OPTIMAL


def test_float32_weights_are_rounded_and_the_bound_is_not():
    layer = random_layer(0, 3, 12, 2, 1e3)
    coarse = Problem(layer.weight.astype(np.float32), layer.hessian)
    result = solve(coarse, "2:4", Exact())
    exact = best_of_layer(Layer(layer.weight.astype(np.float32).astype(float), layer.A, layer.U), NM(2, 4))
    assert result.value == pytest.approx(exact, rel=1e-4)
    assert result.bound == pytest.approx(exact, rel=1e-8) and result.bound <= exact


# limits


@pytest.mark.parametrize("pattern", [Unstructured(0.6), Unstructured(0.6, "row"), NM(2, 4)], ids=str)
def test_stopped_at_any_node_the_bound_holds(pattern):
    problem = random_layer(3, 3, 16, 2, 1e5).problem
    optimum = solve(problem, pattern, Exact())
    stopped = 0
    for nodes in (1, 2, 5, 20, 50, 100, 200):
        result = solve(problem, pattern, Exact(nodes=nodes))
        assert result.bound <= optimum.value <= result.value * (1 + 1e-9)
        assert result.status in (Status.OPTIMAL, Status.NODE_LIMIT)
        stopped += result.status is Status.NODE_LIMIT
        if result.status is Status.OPTIMAL:
            assert result.value == pytest.approx(optimum.value, rel=1e-9)
        else:
            assert result.gap > 1e-6
    assert optimum.status is Status.OPTIMAL and stopped >= 3


@settings(max_examples=60)
@given(seeds, st.floats(3, 6), st.floats(0.4, 0.8))
def test_the_bound_counts_every_branch_that_is_left(seed, logarithm, sparsity):
    problem, pattern = random_layer(seed, 1, 14, 0, 10**logarithm).problem, Unstructured(sparsity, "row")
    optimum = solve(problem, pattern, Exact())
    for nodes in range(1, optimum.iterations, max(optimum.iterations // 30, 1)):
        assert solve(problem, pattern, Exact(nodes=nodes)).bound <= optimum.value


@pytest.mark.parametrize("pattern", [Unstructured(0.7), Unstructured(0.7, "row")], ids=str)
def test_a_limit_of_time(pattern, monkeypatch):
    monkeypatch.setattr(branching, "_SLICE", 1000)
    problem = random_layer(0, 2, 48, 0, 1e6).problem
    result = solve(problem, pattern, Exact(seconds=0.2))
    assert result.status is Status.TIME_LIMIT and 0 < result.gap <= 1
    assert result.bound <= solve(problem, pattern, ADMM()).value


@pytest.mark.parametrize("pattern", [Unstructured(0.6), Unstructured(0.6, "row"), NM(2, 4)], ids=str)
def test_a_search_goes_on_where_it_stopped(pattern, monkeypatch):
    problem = random_layer(4, 3, 16, 2, 1e4).problem
    whole = solve(problem, pattern, Exact())
    monkeypatch.setattr(branching, "_SLICE", 1)
    pieces = solve(problem, pattern, Exact())
    assert pieces.status is Status.OPTIMAL
    np.testing.assert_array_equal(pieces.weight, whole.weight)
    assert pieces.iterations <= 1.5 * whole.iterations


def test_the_same_problem_gives_the_same_answer():
    problem = random_layer(5, 4, 24, 3, 1e5).problem
    for pattern in (Unstructured(0.6), NM(2, 4)):
        first, second = (solve(problem, pattern, Exact(nodes=500)) for _ in range(2))
        np.testing.assert_array_equal(first.weight, second.weight)
        assert (first.value, first.bound, first.iterations) == (second.value, second.bound, second.iterations)


# bounds


@settings(max_examples=200)
@given(seeds, st.integers(2, 8), st.floats(0, 6), st.data())
def test_the_relaxation_is_a_bound_wherever_it_starts(seed, d, logarithm, data):
    rng = np.random.default_rng(seed)
    h, w = with_condition(rng, d, 10**logarithm), rng.normal(size=d)
    zeros = data.draw(st.integers(1, d))
    lower = np.linalg.cholesky(np.linalg.inv(h))
    q = rng.normal(size=d) * 10 ** rng.uniform(-6, 3)
    bound = _relaxed(lower, w, np.zeros(d, np.int64), np.array([zeros]), q, np.inf)
    best = best_of_row(h, w, zeros)
    assert 0 <= bound <= best * (1 + 1e-9)
    if logarithm < 0.1:  # nearly the identity, where it is nearly tight
        q = np.zeros(d)
        bound = _relaxed(lower, w, np.zeros(d, np.int64), np.array([zeros]), q, np.inf)
        assert bound >= 0.4 * best


@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_the_largest_eigenvalue_is_bounded(seed, d, rank):
    x = np.random.default_rng(seed).normal(size=(d, rank))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    largest = np.linalg.eigvalsh(x @ x.T)[-1]
    assert largest <= _largest_eigenvalue(x @ x.T) <= largest * d ** (1 / 8) * 1.001


def test_the_cheapest_of_every_group_ties_included():
    scores, groups = np.array([3.0, 1, 1, 1, 0, 9, 9]), np.array([0, 0, 0, 0, 1, 1, 1])
    chosen = np.empty(7, bool)
    assert _cheapest(scores, groups, np.array([2, 2]), chosen) == 9
    assert chosen.sum() == 4 and chosen[4] and chosen[1:4].sum() == 2 and chosen[5:].sum() == 1
    assert _cheapest(scores, groups, np.array([1, 0]), chosen) == 1 and chosen.sum() == 1


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.data())
def test_the_best_share_of_a_budget(seed, m, d, data):
    curves = np.random.default_rng(seed).uniform(size=(m, d + 1)).cumsum(axis=1)
    total = data.draw(st.integers(0, m * d))
    share = branching._best_share(curves, total)
    every = [s for s in product(range(d + 1), repeat=m) if sum(s) == total]
    value = min(curves[range(m), s].sum() for s in every)
    assert share.sum() == total and curves[range(m), share].sum() == pytest.approx(value, rel=1e-12)


# results


def result_with(value, bound):
    return Result(
        np.zeros((1, 1)), np.zeros((1, 1), bool), value, None, {}, Status.OPTIMAL, 0, "", "", bound=bound
    )


def test_the_gap():
    assert result_with(4.0, 3.0).gap == 0.25
    assert result_with(4.0, 4.0 + 1e-12).gap == 0
    assert result_with(0.0, 0.0).gap == 0
    assert result_with(4.0, None).gap is None
    assert solve(random_layer(0, 2, 4, 0).problem, "2:4", Magnitude()).gap is None


# what is refused


def test_what_is_not_supported_is_said():
    with pytest.raises(NotSupportedError, match="a row has 65 columns.* 64 at most: use ADMM"):
        solve(random_layer(0, 1, 65, 0).problem, 0.5, Exact())
    assert solve(random_layer(0, 1, 64, 0, 2).problem, 0.1, Exact()).status is Status.OPTIMAL


def test_what_is_on_a_device_is_searched_on_the_cpu():
    layer = random_layer(0, 3, 8, 2)
    expected = solve(layer.problem, "2:4", Exact())
    answer = Exact().compute(Exact().init(on_torch(layer.problem)), NM(2, 4))
    assert answer.note == "searched on the CPU" and expected.note == ""
    assert answer.bound == expected.bound and answer.status is Status.OPTIMAL
    np.testing.assert_array_equal(answer.mask.numpy(), expected.mask)
    np.testing.assert_array_equal(answer.weight.numpy(), expected.weight)


def test_a_hessian_without_an_inverse_is_refused():
    hessian = RowHessian(np.ones((3, 3)) + 1e-16 * np.eye(3))
    with pytest.raises(NotPositiveDefiniteError, match="Hessian of row 0.*raise dampening_frac"):
        solve(Problem(np.ones((2, 3)), hessian), 0.5, Exact())


@pytest.mark.parametrize("nodes", [0, -1, 1.5, "9", True])
def test_nodes_are_a_positive_integer(nodes):
    with pytest.raises(ValueError, match="nodes must be a positive integer"):
        Exact(nodes=nodes)


@pytest.mark.parametrize("seconds", [0, -1, "9", float("nan")])
def test_seconds_are_positive_or_none(seconds):
    with pytest.raises(ValueError, match="seconds must be a (positive )?number"):
        Exact(seconds=seconds)
