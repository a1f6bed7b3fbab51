"""OBS is the greedy removal with explicit inverses, row by row, in extended precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_on_host
from moonshot.layer.columns import Columns
from moonshot.layer.patterns import NM, Unstructured
from moonshot.linalg.backend import on_host
from moonshot.solvers import OBS, NotSupportedError, obs_batched, obs_columns, obs_cuda, obs_kernels, solve
from moonshot.solvers.obs import _refit, _share_out, _Trace
from strategies import DEGENERATE, Layer, layers, random_layer

KERNELS = [obs_kernels, obs_batched]


def inverse(matrix):
    """Gauss-Jordan without pivoting, which positive definite matrices do not need; any precision."""
    a, out = matrix.copy(), np.eye(len(matrix), dtype=matrix.dtype)
    for j in range(len(a)):
        out[j], a[j] = out[j] / a[j, j], a[j] / a[j, j]
        for i in set(range(len(a))) - {j}:
            out[i], a[i] = out[i] - a[i, j] * out[j], a[i] - a[i, j] * a[j]
    return out


def explicit_trace(hessian, centre, groups, quotas):
    """Order and increments of one row's removals, the inverse and the weights anew at every step."""
    hessian, centre = hessian.astype(np.longdouble), centre.astype(np.longdouble)
    support, left, order, increments = np.arange(len(centre)), quotas.copy(), [], []
    for _ in range(quotas.sum()):
        g = inverse(hessian[np.ix_(support, support)])
        gone = np.array(order, dtype=int)
        w = centre[support] + g @ hessian[np.ix_(support, gone)] @ centre[gone]
        cost = np.where(left[groups[support]] > 0, w**2 / np.diag(g), np.inf)
        j = support[np.argmin(cost)]
        order.append(j)
        increments.append(cost.min())
        left[groups[j]] -= 1
        support = support[support != j]
    return np.array(order, dtype=int), np.array(increments, dtype=float)


def explicit_traces(layer, groups=None, quotas=None):
    d = layer.weight.shape[1]
    groups = np.zeros(d, int) if groups is None else groups
    quotas = np.array([d]) if quotas is None else quotas
    rows = [explicit_trace(h, w, groups, quotas) for h, w in zip(layer.dense(), layer.weight, strict=True)]
    return tuple(np.array(x) for x in zip(*rows, strict=True))


def assert_optimal_on_support(layer, result, tolerance=1e-7):
    for h, v, c, keep in zip(layer.dense(), result.weight, layer.weight, result.mask, strict=True):
        scale = abs(h) @ (abs(v) + abs(c))
        assert (abs(h @ (v - c)) <= tolerance * scale)[keep].all()


def assert_is_greedy(layer, pattern, order, increments):
    """The pruned weights of each row are the first of its order, and cost what the increments add up to."""
    result = solve(layer.problem, pattern, OBS())
    counts = np.sum(~result.mask, axis=1)
    for keep, row, count in zip(result.mask, order, counts, strict=True):
        assert set(np.flatnonzero(~keep)) == set(row[:count])
    added = sum(row[:count].sum() for row, count in zip(increments, counts, strict=True))
    assert result.value == pytest.approx(added, rel=1e-6, abs=1e-12 * layer.problem.zero_value())
    assert_optimal_on_support(layer, result)
    return counts


sparsities = st.floats(0, 1)


@given(layers(max_columns=12, max_condition=1e6), st.lists(sparsities, min_size=3, max_size=3))
def test_budgets(layer, fractions):
    traces = explicit_traces(layer)
    for sparsity in fractions:
        pattern = Unstructured(sparsity, "row")
        assert set(assert_is_greedy(layer, pattern, *traces)) == {pattern.zeros((1, layer.weight.shape[1]))}
        assert_is_greedy(layer, Unstructured(sparsity), *traces)


@given(
    st.integers(0, 999),
    st.sampled_from([0, 1, 7, 8, 11]),
    st.floats(1, 6),
    st.sampled_from([NM(2, 4), NM(1, 4)]),
)
def test_groups(seed, n, exponent, pattern):
    layer = random_layer(seed, 3, 8, n, 10**exponent)
    traces = explicit_traces(layer, np.arange(8) // pattern.m, np.full(8 // pattern.m, pattern.m - pattern.n))
    assert_is_greedy(layer, pattern, *traces)


@pytest.mark.parametrize(
    "name", ["fewer tokens than inputs", "dead inputs", "zero factors", "one row", "one column"]
)
def test_degenerate_layers(name):
    layer = DEGENERATE[name]
    traces = explicit_traces(layer)
    for sparsity in (0.3, 0.5, 0.8):
        assert_is_greedy(layer, Unstructured(sparsity), *traces)


@pytest.mark.parametrize("pattern", [Unstructured(0.7, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("n", [0, 5, 60])
def test_several_blocks(n, pattern):
    """More removals than are kept waiting, and more factors."""
    layer = random_layer(n, 2, 64, n, 1e4)
    groups, quotas = np.zeros(64, int), np.array([64])
    if isinstance(pattern, NM):
        groups, quotas = np.arange(64) // 4, np.full(16, 2)
    assert_is_greedy(layer, pattern, *explicit_traces(layer, groups, quotas))


def test_larger_budgets_prune_what_smaller_ones_do_and_more():
    problem = random_layer(3, 6, 40, 4, 1e5).problem
    state, before = OBS().init(problem), np.ones((6, 40), bool)
    for sparsity in np.linspace(0, 1, 41):
        mask = solve(problem, Unstructured(float(sparsity), "row"), OBS(), state=state).mask
        assert not (mask & ~before).any()
        before = mask


class Counting:
    """Kernels that count their traces."""

    def __init__(self):
        self.traces = 0
        self.solve_restricted = obs_kernels.solve_restricted

    def trace(self, *arguments):
        self.traces += 1
        return obs_kernels.trace(*arguments)


def test_one_trace_serves_every_budget():
    problem, kernels = random_layer(4, 4, 16, 3).problem, Counting()
    state = replace(OBS().init(problem), kernels=kernels)
    assert kernels.traces == 0
    for pattern in (0.5, Unstructured(0.3, "row"), 0.9, 0.5, Unstructured(1.0)):
        shared, fresh = solve(problem, pattern, OBS(), state=state), solve(problem, pattern, OBS())
        np.testing.assert_array_equal(shared.weight, fresh.weight)
    assert kernels.traces == 1


# budgets over the layer


def least_loss(increments, zeros):
    """The cheapest way to take `zeros` increments in all, each row's in order: dynamic programming."""
    best = np.full(zeros + 1, np.inf)
    best[0] = 0
    for row in increments:
        loss = np.concatenate([[0], np.cumsum(row)])
        best = np.array(
            [min(best[k - j] + loss[j] for j in range(min(k, len(row)) + 1)) for k in range(zeros + 1)]
        )
    return best[zeros]


def explicit_slopes(row):
    """Slope of the lower convex hull over each step: the largest over starts of the least mean over ends."""
    d = len(row)
    means = np.array([[row[a : b + 1].mean() if a <= b else np.nan for b in range(d)] for a in range(d)])
    return np.array([max(np.nanmin(means[a, k:]) for a in range(k + 1)) for k in range(d)])


increments = st.integers(0, 999).map(
    lambda seed: np.random.default_rng(seed).gamma(0.5, size=(1 + seed % 4, 1 + seed % 7)).round(seed % 3)
)


@given(increments)
def test_budgets_are_shared_out_along_the_convex_hulls(added):
    m, d = added.shape
    slopes = obs_kernels.hull_slopes(added)
    np.testing.assert_allclose(slopes, [explicit_slopes(row) for row in added], rtol=1e-12, atol=1e-14)
    along = np.concatenate([[0], np.cumsum(np.sort(slopes, axis=None))])  # no allocation is below
    for zeros in range(m * d + 1):
        counts = _share_out(_Trace(None, added, slopes), zeros)
        assert counts.sum() == zeros and (counts >= 0).all() and (counts <= d).all()
        loss = sum(row[:count].sum() for row, count in zip(added, counts, strict=True))
        least = least_loss(added, zeros)
        assert along[zeros] - 1e-9 <= least <= loss + 1e-9
        assert loss <= one_row_makes_up(added, slopes, zeros) + 1e-9


def one_row_makes_up(added, slopes, zeros):
    """The least loss if one row takes more than whole parts or less; infinite where several parts tie."""
    m, d = added.shape
    limit = np.sort(slopes, axis=None)[max(zeros - 1, 0)]
    below, above = np.sum(slopes < limit, axis=1), np.sum(slopes <= limit, axis=1)
    losses = [np.inf]
    for counts in (below, above) if np.sum(above > below) == 1 else ():
        for i in range(m):
            moved = counts + (zeros - counts.sum()) * (np.arange(m) == i)
            if 0 <= moved[i] <= d:
                losses.append(sum(row[:count].sum() for row, count in zip(added, moved, strict=True)))
    return min(losses)


# numerical stability


def drifting_layer():
    """Six pairs of inputs equal to 1e-6: once one of a pair has gone, the other's inverse keeps 12 digits fewer."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 6))
    x = np.concatenate([x, x + 1e-6 * rng.normal(size=x.shape)], axis=1)
    return Layer(rng.normal(size=(2, 12)), x.T @ x, None)


def largest_error(layer, kernels, first=0):
    """Of the increments from `first` on, relative to the explicit ones."""
    state = replace(OBS().init(layer.problem), kernels=kernels)
    order, added = explicit_traces(layer)
    np.testing.assert_array_equal(state.trace.order, order)
    return np.max(abs(state.trace.increments / added - 1)[:, first:])


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_inverse_that_has_lost_its_digits_is_refreshed(kernels, monkeypatch):
    layer = drifting_layer()
    state = OBS().init(layer.problem)
    arguments = (state.inverse, state.columns, state.centre, np.zeros(12, int), np.array([12]))
    assert (kernels.trace(*arguments)[2] < 12).all()
    refreshed = largest_error(layer, kernels, first=6)
    monkeypatch.setattr(obs_batched, "LOST", 0.0)
    drifted = largest_error(layer, obs_batched, first=6)
    assert refreshed < 1e-8 and drifted > 1e-6


def test_an_ill_conditioned_trace_does_not_drift():
    """At condition 1e6 the last of 60 removals is as good as the first."""
    layer = random_layer(6, 2, 60, 3, 1e6)
    error = largest_error(layer, obs_kernels)
    assert error < 1e-7


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_refit_that_loses_digits_takes_the_other_side(kernels):
    layer = drifting_layer()
    keep = np.ones((2, 12), bool)
    keep[:, [0, 6]] = False
    state = replace(OBS().init(layer.problem), kernels=kernels)
    weight = _refit(state, keep)
    for h, v, c in zip(layer.dense(), weight, layer.weight, strict=True):
        s = keep[0]
        slope = (h.astype(np.longdouble) @ (v - c))[s]
        assert np.max(abs(slope)) < 1e-13 * np.max(abs(h) @ (abs(v) + abs(c)))


# kernels for devices


def both_kernels(function, arrays, *numbers):
    """What the kernels for the CPU return, and those for devices on NumPy arrays and on torch tensors."""
    expected = getattr(obs_kernels, function)(*arrays, *numbers)
    for convert in (np.asarray, torch.from_numpy):
        moved = [convert(x) if isinstance(x, np.ndarray) else x for x in arrays]
        yield expected, getattr(obs_batched, function)(*moved, *numbers)


@pytest.mark.parametrize("bytes_", [1, 2**30])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("n", [0, 3, 80])
def test_batched_trace(n, group, bytes_, monkeypatch):
    monkeypatch.setattr(obs_batched, "_BYTES", bytes_)
    state = OBS().init(random_layer(n, 3, 150 if not group else 160, n, 1e3).problem)
    d = state.centre.shape[1]
    groups, quotas = (np.arange(d) // 4, np.full(d // 4, 3)) if group else (np.zeros(d, int), np.array([d]))
    arrays = (state.inverse, state.columns, state.centre)
    for expected, computed in both_kernels("trace", arrays, groups, quotas):
        np.testing.assert_array_equal(computed[0], expected[0])
        np.testing.assert_allclose(computed[1], expected[1], rtol=1e-7)
        assert (np.asarray(computed[2]) == quotas.sum()).all() and (expected[2] == quotas.sum()).all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("n", [0, 3, 60])
def test_batched_restricted_solutions(n, sign):
    layer = random_layer(n, 3, 70, n, 1e3)
    state = OBS().init(layer.problem)
    shared, factors = (state.inverse, state.columns) if sign < 0 else (layer.A, state.factors)
    chosen = np.random.default_rng(0).random((3, 70)) < [[0.9], [0.4], [0]]
    for expected, computed in both_kernels("solve_restricted", (shared, factors, sign, layer.weight, chosen)):
        for i, (x, s) in enumerate(zip(expected[0], chosen, strict=True)):
            matrix = (shared + sign * factors[:, i].T @ factors[:, i])[np.ix_(s, s)]
            np.testing.assert_allclose(x[s], np.linalg.solve(matrix, layer.weight[i, s]), rtol=1e-8, atol=1e-9)
            assert not x[~s].any()
        for left, right in zip(expected, computed, strict=True):
            np.testing.assert_allclose(right, left, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), Unstructured(0.3, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("n", [0, 3])
def test_the_solver_on_the_kernels_for_devices(n, pattern):
    problem = random_layer(1, 4, 16, n, 1e4).problem
    state = replace(OBS().init(problem), kernels=obs_batched)
    batched, plain = solve(problem, pattern, OBS(), state=state), solve(problem, pattern, OBS())
    np.testing.assert_array_equal(batched.mask, plain.mask)
    np.testing.assert_allclose(batched.weight, plain.weight, rtol=1e-8, atol=1e-10)


@pytest.fixture(params=cuda_on_host.PLACES)
def on_cuda(request, monkeypatch):
    """What a function of obs_cuda returns, in NumPy arrays: on the CPU with so many threads in a block, or on a device.

    Its blocks are small, and its work space is for two rows at a time.
    """
    convert = cuda_on_host.arrays_at(request.param, monkeypatch)
    monkeypatch.setattr(obs_cuda, "_BLOCK", 8)
    monkeypatch.setattr(obs_cuda, "_TILE", 16)
    monkeypatch.setattr(obs_cuda, "_ROWS", 2)
    monkeypatch.setattr("moonshot.linalg.cuda.free_memory", lambda array: 2**30)

    def run(function, arrays, *numbers):
        moved = [convert(x) if isinstance(x, np.ndarray) else x for x in arrays]
        return [on_host(x) for x in getattr(obs_cuda, function)(*moved, *numbers)]

    return run


@pytest.mark.parametrize("quota", [0, 1, 3])
@pytest.mark.parametrize("n", [0, 3, 11])
def test_trace_on_cuda(on_cuda, n, quota):
    """All weights go, or so many of every four."""
    state = OBS().init(random_layer(n, 3, 28 if quota else 27, n, 1e3).problem)
    d = state.centre.shape[1]
    groups, quotas = (np.arange(d) // 4, np.full(d // 4, quota)) if quota else (np.zeros(d, int), np.array([d]))
    arrays = (state.inverse, state.columns, state.centre)
    expected = obs_kernels.trace(*arrays, groups, quotas)
    order, increments, done = on_cuda("trace", arrays, groups, quotas)
    np.testing.assert_array_equal(order, expected[0])
    np.testing.assert_allclose(increments, expected[1], rtol=1e-7)
    np.testing.assert_array_equal(done, expected[2])


def test_a_trace_on_cuda_says_where_it_lost_digits(on_cuda):
    state = OBS().init(drifting_layer().problem)
    arrays = (state.inverse, state.columns, state.centre, np.zeros(12, int), np.array([12]))
    expected = obs_kernels.trace(*arrays)
    order, _, done = on_cuda("trace", arrays[:3], *arrays[3:])
    assert (done == expected[2]).all() and (done < 12).all()
    for row, trusted in enumerate(done):
        np.testing.assert_array_equal(order[row, :trusted], expected[0][row, :trusted])


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("n", [0, 3, 11])
def test_restricted_solutions_on_cuda(on_cuda, n, sign):
    layer = random_layer(n, 4, 22, n, 1e3)
    state = OBS().init(layer.problem)
    shared, factors = (state.inverse, state.columns) if sign < 0 else (layer.A, state.factors)
    chosen = np.random.default_rng(0).random((4, 22)) < [[0.9], [0.4], [0], [1]]
    arrays = (shared, factors, sign, layer.weight, chosen)
    expected = obs_kernels.solve_restricted(*arrays)
    for left, right in zip(expected, on_cuda("solve_restricted", arrays), strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-8, atol=1e-9)
    indefinite = shared - 2 * np.diag(np.diag(shared)) * (np.arange(22) == 7)
    x, pivots = on_cuda("solve_restricted", (indefinite, factors[:0], sign, layer.weight, chosen))
    np.testing.assert_array_equal(pivots <= 0, chosen[:, 7])
    assert not x[chosen[:, 7]].any()


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
def test_the_solver_on_cuda(pattern, monkeypatch):
    cuda_on_host.arrays_at(3, monkeypatch)
    monkeypatch.setattr("moonshot.linalg.cuda.free_memory", lambda array: 2**30)
    problem = random_layer(1, 4, 16, 3, 1e4).problem
    state = replace(OBS().init(problem), kernels=obs_cuda)
    found, plain = solve(problem, pattern, OBS(), state=state), solve(problem, pattern, OBS())
    np.testing.assert_array_equal(found.mask, plain.mask)
    np.testing.assert_allclose(found.weight, plain.weight, rtol=1e-8, atol=1e-10)


@settings(max_examples=10)
@given(layers(max_columns=8, max_condition=1e3))
def test_float32_chooses_what_float64_does(layer):
    coarse = replace(layer, weight=layer.weight.astype(np.float32))
    wide = replace(layer, weight=coarse.weight.astype(np.float64))
    narrow, exact = (solve(x.problem, 0.5, OBS()) for x in (coarse, wide))
    assert narrow.weight.dtype == np.float32
    np.testing.assert_array_equal(narrow.mask, exact.mask)
    np.testing.assert_array_equal(narrow.weight, exact.weight.astype(np.float32))


def test_other_patterns_are_refused():
    class Anywhere:
        def validate(self, shape): ...
        def zeros(self, shape): ...
        def keep(self, scores): ...
        def check(self, mask): ...

    with pytest.raises(NotSupportedError, match="has no `groups.shape.*ADMM, IHT, .* take any pattern"):
        solve(random_layer(0, 2, 8, 0).problem, Anywhere(), OBS())


# whole columns


def explicit_columns(layer, size, count):
    """The columns that are left, and what is lost, with every row's inverse anew for every choice."""
    inverses = np.linalg.inv(layer.dense())

    def loss(gone):
        """Of every row at its minimiser without these columns."""
        c = layer.weight[:, gone, None]
        return np.sum(c * np.linalg.solve(inverses[:, gone][:, :, gone], c))

    gone, groups = [], {k: list(range(k, k + size)) for k in range(0, layer.weight.shape[1], size)}
    for _ in range(count):
        k = min(groups, key=lambda k: loss(gone + groups[k]))
        gone += groups.pop(k)
    return sorted(j for group in groups.values() for j in group), loss(gone)


@pytest.mark.parametrize("lost", [obs_batched.LOST, 2.0], ids=["updated", "afresh"])
@pytest.mark.parametrize("size", [1, 3])
@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 5, 14]), st.floats(1, 5), st.integers(0, 12))
def test_whole_columns(size, lost, seed, n, exponent, zeros):
    layer = random_layer(seed, 3, 12, n, 10**exponent)
    pattern = Columns(zeros // size * size / 12, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs_columns, "LOST", lost)
        result = solve(layer.problem, pattern, OBS())
    left, loss = explicit_columns(layer, size, zeros // size)
    np.testing.assert_array_equal(np.flatnonzero(result.mask.all(axis=0)), left)
    assert result.value == pytest.approx(loss, rel=1e-6, abs=1e-12 * layer.problem.zero_value())
    assert_optimal_on_support(layer, result)


@pytest.mark.parametrize("name", DEGENERATE)
def test_columns_of_degenerate_layers(name):
    layer = DEGENERATE[name]
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        assert_optimal_on_support(layer, solve(layer.problem, Columns(sparsity), OBS()))


def test_columns_that_repeat_one_another_do_not_drift(monkeypatch):
    layer, made = drifting_layer(), []
    restricted = obs_columns._restricted
    monkeypatch.setattr(obs_columns, "_restricted", lambda *a: made.append(a) or restricted(*a))
    found = solve(layer.problem, Columns(8 / 12), OBS())
    assert 2 < len(made) < 10  # at the start, at the end, and where digits were lost
    monkeypatch.setattr(obs_columns, "LOST", 2.0)
    afresh = solve(layer.problem, Columns(8 / 12), OBS())
    np.testing.assert_array_equal(found.mask, afresh.mask)
    assert found.value == pytest.approx(afresh.value, rel=1e-9)
    assert_optimal_on_support(layer, found)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_columns_on_torch(n, size):
    layer = random_layer(2, 4, 16, n, 1e3)
    pull = layer.hessian.matvec(layer.weight)
    plain, moved = (obs_columns._Rest(layer.hessian, pull, np.arange(16)) for _ in range(2))
    for name, array in vars(moved).items():
        setattr(moved, name, torch.from_numpy(np.ascontiguousarray(array)))
    for _ in range(3):
        np.testing.assert_allclose(moved.costs(size), plain.costs(size), rtol=1e-9)
        first = int(np.argmin(plain.costs(size))) * size
        assert plain.remove(first, size) and moved.remove(first, size)
    np.testing.assert_allclose(moved.weight, plain.weight, rtol=1e-9)
