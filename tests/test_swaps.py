"""Swaps: every change is what it says, none is left that helps, and the answer is never worse than its start."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moonshot.layer.patterns import NM, Unstructured
from moonshot.layer.problem import Problem, Status
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.solvers import ADMM, Answer, Magnitude, SparseGPT, Swaps, solve, swaps, swaps_kernels
from strategies import DEGENERATE, Layer, layers, on_torch, random_layer

INNERS = [Magnitude(), SparseGPT(), ADMM()]
each_inner = pytest.mark.parametrize("inner", INNERS, ids=lambda inner: inner.name)


def best_loss(h, centre, support):
    """The least `(v - c)' H (v - c)` over v on the support, from its own Schur complement."""
    inside, outside = np.flatnonzero(support), np.flatnonzero(~support)
    c = centre[outside]
    left = h[np.ix_(outside, outside)]
    if len(inside) and len(outside):
        across = h[np.ix_(inside, outside)]
        left = left - across.T @ np.linalg.solve(h[np.ix_(inside, inside)], across)
    return float(c @ left @ c)


def flipped(support, *columns):
    other = support.copy()
    other[list(columns)] ^= True
    return other


def single_swaps(support, pattern):
    groups = np.arange(len(support)) // (pattern.m if isinstance(pattern, NM) else len(support))
    pairs = itertools.product(np.flatnonzero(support), np.flatnonzero(~support))
    return [(i, j) for i, j in pairs if groups[i] == groups[j]]


def assert_no_swap_is_better(layer, result, pattern, slack=1e-6):
    """By brute force: within every row, and between any two rows where the budget is the layer's."""
    dense = layer.dense()
    at_zero = [w @ h @ w for w, h in zip(layer.weight, dense, strict=True)]
    cheapest, dearest = [], []
    for i, (h, w, support) in enumerate(zip(dense, layer.weight, result.mask, strict=True)):
        loss = best_loss(h, w, support)
        reached = (result.weight[i] - w) @ h @ (result.weight[i] - w)
        assert reached <= loss * (1 + slack) + 1e-9 * at_zero[i]  # the weights are refitted
        for pair in single_swaps(support, pattern):
            other = best_loss(h, w, flipped(support, *pair))
            assert other >= loss * (1 - slack) - 1e-9 * at_zero[i], f"row {i}: {pair} lowers the loss"
        changes = [best_loss(h, w, flipped(support, k)) - loss for k in range(len(w))]
        cheapest.append(min((x for x, kept in zip(changes, support, strict=True) if kept), default=np.inf))
        dearest.append(min((x for x, kept in zip(changes, support, strict=True) if not kept), default=np.inf))
    if isinstance(pattern, Unstructured) and pattern.scope == "layer":
        for i, j in itertools.permutations(range(len(dense)), 2):
            assert cheapest[i] + dearest[j] >= -slack * result.value - 1e-9 * sum(at_zero), f"from {i} to {j}"


# what it ends with


@given(layers(max_condition=1e6), st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from(["row", "layer"]))
@each_inner
def test_no_single_swap_is_left(inner, layer, sparsity, scope):
    pattern = Unstructured(sparsity, scope)
    result = solve(layer.problem, pattern, Swaps(inner))
    assert_no_swap_is_better(layer, result, pattern)
    assert result.status is Status.CONVERGED
    assert result.value <= solve(layer.problem, pattern, inner).value * (1 + 1e-9)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 12, 15]), st.floats(1, 6))
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2)], ids=str)
def test_no_single_swap_is_left_within_groups(pattern, seed, n, exponent):
    layer = random_layer(seed, 3, 12, n, 10**exponent)
    result = solve(layer.problem, pattern, Swaps(Magnitude()))
    pattern.check(result.mask)
    assert_no_swap_is_better(layer, result, pattern)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_layers(name, pattern):
    layer = DEGENERATE[name]
    if isinstance(pattern, NM) and layer.weight.shape[1] % pattern.m:
        return
    for inner in INNERS:
        result = solve(layer.problem, pattern, Swaps(inner))
        assert_no_swap_is_better(layer, result, pattern, slack=1e-4)
        assert result.value <= solve(layer.problem, pattern, inner).value + 1e-12


@given(layers(max_condition=1e10, max_columns=12), st.floats(0, 1), st.sampled_from(["row", "layer"]))
@each_inner
def test_never_worse_however_ill_conditioned(inner, layer, sparsity, scope):
    pattern = Unstructured(sparsity, scope)
    before = solve(layer.problem, pattern, inner)
    after = solve(layer.problem, pattern, Swaps(inner))
    assert after.value <= before.value
    zeros = (after.mask == 0).sum(axis=1)
    assert scope == "layer" or len(set(zeros.tolist())) == 1


def test_a_layer_larger_than_the_log_and_its_exchanges():
    layer = random_layer(0, 6, 96, 4, 1e4)
    for pattern in (Unstructured(0.6), NM(2, 4)):
        result = solve(layer.problem, pattern, Swaps(Magnitude()))
        assert result.iterations > 6 * 16
        assert_no_swap_is_better(layer, result, pattern)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_most_small_rows_are_solved_to_optimality(sparsity):
    pattern, solved, tried = Unstructured(sparsity, "row"), 0, 0
    for seed, condition in itertools.product(range(2), (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)):
        layer = random_layer(seed, 6, 12, 0, condition)
        weight = solve(layer.problem, pattern, Swaps(ADMM())).weight
        for h, w, v in zip(layer.dense(), layer.weight, weight, strict=True):
            sets = itertools.combinations(range(12), int((v != 0).sum()))
            optimum = min(best_loss(h, w, np.isin(np.arange(12), s)) for s in sets)
            solved, tried = solved + ((v - w) @ h @ (v - w) <= optimum * (1 + 1e-6)), tried + 1
    assert solved >= 0.85 * tried


def test_chains_leave_supports_that_no_single_swap_betters():
    layer, pattern = random_layer(0, 12, 12, 0, 1e4), Unstructured(0.5, "row")
    stuck = pattern.keep(abs(layer.weight))
    for i, (h, w) in enumerate(zip(layer.dense(), layer.weight, strict=True)):
        better = True
        while better:
            options = [flipped(stuck[i], *pair) for pair in single_swaps(stuck[i], pattern)]
            option = min(options, key=lambda support: best_loss(h, w, support))
            better = best_loss(h, w, option) < best_loss(h, w, stuck[i]) * (1 - 1e-9)
            stuck[i] = option if better else stuck[i]
    result = solve(layer.problem, pattern, Swaps(Fixed(stuck)))
    losses = zip(
        layer.hessian.quadratic(result.weight - layer.weight), layer.dense(), layer.weight, stuck, strict=True
    )
    ratios = [reached / best_loss(h, w, support) for reached, h, w, support in losses]
    assert max(ratios) < 1 + 1e-6 and sum(ratio < 0.99 for ratio in ratios) >= 3


# budgets over the layer


def test_rows_trade_when_one_needs_more_than_another():
    layer = Layer(np.array([[1.0, 2, 3, 4], [10, 20, 30, 40]]), np.eye(4), None)
    start = Unstructured(0.5, "row").keep(abs(layer.weight))
    result = solve(layer.problem, Unstructured(0.5), Swaps(Fixed(start)))
    assert result.mask.tolist() == [[False] * 4, [True] * 4]
    assert result.value == pytest.approx(1 + 4 + 9 + 16)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 3]), st.integers(2, 30))
def test_rows_trade_from_a_budget_spread_evenly(seed, n, rows):
    layer = random_layer(seed, rows, 8, n, 1e3)
    layer = Layer(layer.weight * np.geomspace(1, 100, rows)[:, None], layer.A, layer.U)
    pattern = Unstructured(0.5)
    start = Unstructured(0.5, "row").keep(abs(layer.weight))
    result = solve(layer.problem, pattern, Swaps(Fixed(start), moves=100))
    assert result.status is Status.CONVERGED
    assert_no_swap_is_better(layer, result, pattern)
    assert len(set(result.mask.sum(axis=1).tolist())) > 1


# that changes are exact


def exchanged(layer, mask, *, limit, offers, groups=1):
    """What the kernel makes of every row, with the tableaus as it left them; columns in their own order again."""
    m, d = mask.shape
    order = np.argsort(~mask, axis=1, kind="stable")
    factors = np.zeros((0, m, d)) if layer.U is None else np.ascontiguousarray(layer.U.transpose(2, 0, 1))
    rows = np.arange(m)
    tableaus = swaps_kernels.gather(np.ascontiguousarray(layer.A), factors, rows, order)
    for tableau, kept in zip(tableaus, mask.sum(axis=1), strict=True):
        swaps.sweep_leading(tableau, kept)
    here = rows[:, None], order
    inside, diagonals = mask[here], np.diagonal(layer.dense(), axis1=1, axis2=2)[here]
    group = (np.arange(d) * groups // d)[order]
    outcome = swaps_kernels.exchange(
        tableaus, inside, layer.weight[here], diagonals, group, np.full(m, 1e-9), np.full(m, limit), offers
    )
    u, moves, settled, columns, rises = outcome
    back = np.argsort(order, axis=1)
    return SimpleNamespace(
        tableaus=np.stack([t[np.ix_(b, b)] for t, b in zip(tableaus, back, strict=True)]),
        u=np.take_along_axis(u, back, axis=1),
        mask=np.take_along_axis(inside, back, axis=1),
        moves=moves,
        settled=settled,
        columns=np.where(columns < 0, -1, np.take_along_axis(order[None], columns, axis=2)),
        rises=rises,
    )


def tableau(h, support):
    """The tableau by its definition: explicit inverse, block by block."""
    s, n = np.flatnonzero(support), np.flatnonzero(~support)
    out, inverse = np.zeros_like(h), np.linalg.inv(h[np.ix_(s, s)])
    across = inverse @ h[np.ix_(s, n)]
    out[np.ix_(s, s)], out[np.ix_(s, n)], out[np.ix_(n, s)] = -inverse, across, across.T
    out[np.ix_(n, n)] = h[np.ix_(n, n)] - h[np.ix_(n, s)] @ across
    return out


@given(
    layers(max_condition=1e4), st.integers(0, 99), st.sampled_from([0, 1, 4, 10**6]), st.sampled_from([1, 3])
)
def test_the_tableau_is_that_of_the_support_after_any_number_of_exchanges(layer, seed, limit, groups):
    mask = np.random.default_rng(seed).random(layer.weight.shape) < 0.5
    out = exchanged(layer, mask, limit=limit, offers=2, groups=groups)
    assert limit == 0 or out.moves.max() < limit + 4
    for h, w, support, t, u in zip(layer.dense(), layer.weight, out.mask, out.tableaus, out.u, strict=True):
        scale = abs(tableau(h, support)).max()
        np.testing.assert_allclose(t, tableau(h, support), rtol=0, atol=1e-8 * scale)
        s, c = support, np.where(support, 0, w)
        refit = w[s] + np.linalg.solve(h[np.ix_(s, s)], h[s] @ c) if s.any() else w[s]
        np.testing.assert_allclose(u[s], refit, rtol=1e-7, atol=1e-7)
        moved = np.where(s, u, 0)
        np.testing.assert_allclose(u[~s], (h @ (w - moved))[~s], rtol=1e-7, atol=1e-7)


@given(layers(max_condition=1e4), st.integers(0, 99))
def test_offers_cost_what_they_say(layer, seed):
    mask = np.random.default_rng(seed).random(layer.weight.shape) < 0.5
    out = exchanged(layer, mask, limit=0, offers=6)
    np.testing.assert_array_equal(out.mask, mask)
    for i, (h, w) in enumerate(zip(layer.dense(), layer.weight, strict=True)):
        for way in range(2):
            support, loss = mask[i].copy(), best_loss(h, w, mask[i])
            for column, rise in zip(out.columns[way, i], out.rises[way, i], strict=True):
                left = np.flatnonzero(support != (way == 1))
                if len(left) == 0:
                    assert rise == np.inf
                    break
                others = {k: best_loss(h, w, flipped(support, k)) - loss for k in left}
                assert rise == pytest.approx(others[column], rel=1e-6, abs=1e-9 * (w @ h @ w))
                assert rise <= min(others.values()) + 1e-6 * abs(rise) + 1e-9 * (w @ h @ w)
                support[column], loss = way == 1, loss + rise


# how it is asked


@dataclass(frozen=True)
class Fixed:
    """The weight on a mask that is given: a start of one's choice."""

    mask: object
    name = "fixed"
    reason: str | None = None

    def unsupported(self, problem, pattern):
        return self.reason

    def init(self, problem):
        return problem.centre

    def compute(self, state, pattern):
        return Answer(np.where(self.mask, state, 0), self.mask.copy())


def test_the_start_is_the_inner_solvers_answer_and_kept_if_nothing_is_better():
    layer = random_layer(0, 3, 8, 2)
    problem, pattern = layer.problem, Unstructured(0.5, "row")
    solver = Swaps(ADMM())
    inner = ADMM().compute(ADMM().init(problem), pattern)
    outer = solver.compute(solver.init(problem), pattern)
    np.testing.assert_array_equal(outer.start, inner.weight)
    again = Swaps(Fixed(outer.mask))
    answer = again.compute(again.init(problem), pattern)
    np.testing.assert_array_equal(answer.mask, outer.mask)
    np.testing.assert_allclose(answer.weight, outer.weight, rtol=1e-9)
    assert answer.iterations == 0


def test_few_moves_are_a_limit():
    layer = random_layer(3, 2, 64, 0, 1e4)
    for pattern in (Unstructured(0.5, "row"), Unstructured(0.5), NM(2, 4)):
        few, many = (solve(layer.problem, pattern, Swaps(Magnitude(), moves=x)) for x in (0.01, 2))
        assert few.status is Status.ITERATION_LIMIT and many.status is Status.CONVERGED
        assert few.iterations < many.iterations
        assert many.value <= few.value <= solve(layer.problem, pattern, Magnitude()).value


def test_the_limit_holds_over_several_tableaus(monkeypatch):
    monkeypatch.setattr(swaps, "_FRESH", 20)
    layer = random_layer(3, 1, 64, 0, 1e4)
    result = solve(layer.problem, "2:4", Swaps(Magnitude(), moves=24 / 64))
    assert 24 <= result.iterations < 24 + 4  # the last chain is finished
    assert result.status is Status.ITERATION_LIMIT


def test_what_rounding_spoils_is_not_returned(monkeypatch):
    exchange, layer = swaps_kernels.exchange, random_layer(0, 3, 8, 2)

    def spoiled(*arguments):
        u, *rest = exchange(*arguments)
        return u + 10, *rest

    monkeypatch.setattr(swaps_kernels, "exchange", spoiled)
    for pattern in (0.5, "2:4"):
        expected = solve(layer.problem, pattern, ADMM())
        np.testing.assert_array_equal(solve(layer.problem, pattern, Swaps(ADMM())).weight, expected.weight)


def test_tableaus_made_anew_end_as_well(monkeypatch):
    layer = random_layer(3, 3, 48, 5, 1e4)
    monkeypatch.setattr(swaps, "_FRESH", 2)
    for pattern in (Unstructured(0.5), NM(2, 4)):
        result = solve(layer.problem, pattern, Swaps(Magnitude()))
        assert result.status is Status.CONVERGED
        assert_no_swap_is_better(layer, result, pattern)


@pytest.mark.parametrize("together", [1, 2, 5])
def test_how_many_rows_are_worked_on_together_changes_nothing(monkeypatch, together):
    layer = random_layer(1, 7, 32, 3, 1e5)
    patterns = (Unstructured(0.6), NM(2, 4))
    all_at_once = [solve(layer.problem, pattern, Swaps(ADMM())) for pattern in patterns]
    monkeypatch.setattr(swaps_kernels, "rows_at_once", lambda d: together)
    for pattern, expected in zip(patterns, all_at_once, strict=True):
        result = solve(layer.problem, pattern, Swaps(ADMM()))
        np.testing.assert_array_equal(result.weight, expected.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights(dtype):
    layer = random_layer(2, 16, 32, 4, 1e4)
    weight = torch.tensor(layer.weight, dtype=dtype)
    problem = Problem(weight, RowHessian(torch.tensor(layer.A), torch.tensor(layer.U)))
    for pattern in (0.3, 0.7, "2:4"):
        inner, outer = solve(problem, pattern, SparseGPT()), solve(problem, pattern, Swaps(SparseGPT()))
        assert outer.weight.dtype == dtype and outer.value < inner.value


def test_its_name_holds_the_inner_solvers():
    assert Swaps(ADMM()).name == "Swaps(ADMM)"
    assert Swaps(Swaps(SparseGPT())).name == "Swaps(Swaps(SparseGPT))"


def test_what_is_not_supported_is_said_in_words():
    problem, pattern = random_layer(0, 2, 8, 0).problem, Unstructured(0.5)
    assert Swaps(ADMM()).unsupported(problem, pattern) is None
    refusing = Fixed(None, reason="missing a mask")
    assert Swaps(refusing).unsupported(problem, pattern) == "missing a mask"
    assert "prunes equal groups of consecutive weights" in Swaps(Magnitude()).unsupported(problem, object())


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_what_is_on_a_device_is_exchanged_on_the_cpu(pattern):
    layer = random_layer(0, 3, 8, 2)
    expected = solve(layer.problem, pattern, Swaps(Magnitude()))
    problem = on_torch(layer.problem)
    solver = Swaps(Magnitude())
    answer = solver.compute(solver.init(problem), pattern)
    assert answer.note == "exchanged on the CPU" and expected.note == ""
    np.testing.assert_array_equal(answer.mask.numpy(), expected.mask)
    np.testing.assert_array_equal(answer.weight.numpy(), expected.weight)


@pytest.mark.parametrize("inner", [ADMM, "ADMM", None])
def test_the_inner_solver_is_an_instance(inner):
    with pytest.raises(TypeError, match="inner must be a solver's instance such as moonshot.ADMM()"):
        Swaps(inner)


@pytest.mark.parametrize("moves", [0, -1, float("nan")])
def test_moves_are_positive(moves):
    with pytest.raises(ValueError, match="moves must be positive"):
        Swaps(ADMM(), moves=moves)


def test_a_hessian_that_is_not_positive_definite_is_named():
    problem = Problem(np.ones((1, 4)), RowHessian(np.diag([1.0, 1, -1, -1])))
    with pytest.raises(NotPositiveDefiniteError, match="Hessian of a row .* raise dampening_frac"):
        solve(problem, Unstructured(0.25, "row"), Swaps(Magnitude()))
