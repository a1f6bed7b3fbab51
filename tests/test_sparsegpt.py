"""SparseGPT with per-row Hessians is SparseGPT on every row's explicit Hessian, in extended precision."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonshot.layer.patterns import NM, Unstructured
from moonshot.solvers import SparseGPT, solve
from strategies import DEGENERATE, Layer, random_layer


def inverse_factor(hessian):
    """R, upper triangular, with H^-1 = R'R: H = M M' with M upper triangular, R = M^-1. Plain loops."""
    d = len(hessian)
    m, r = np.zeros_like(hessian), np.zeros_like(hessian)
    for j in reversed(range(d)):
        m[j, j] = np.sqrt(hessian[j, j] - m[j, j + 1 :] @ m[j, j + 1 :])
        for i in range(j):
            m[i, j] = (hessian[i, j] - m[i, j + 1 :] @ m[j, j + 1 :]) / m[j, j]
    for j in range(d):
        r[j, j] = 1 / m[j, j]
        for i in reversed(range(j)):
            r[i, j] = -(m[i, i + 1 : j + 1] @ r[i + 1 : j + 1, j]) / m[i, i]
    return r


def smallest(scores, k):
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(scores, axis=None)[:k]] = True
    return mask.reshape(scores.shape)


def explicit_sparsegpt(layer, pattern, block):
    """Algorithm 1 of arXiv 2301.00774 with one factor R_i for each row: (weight, mask)."""
    m, d = layer.weight.shape
    weight, keep = layer.weight.astype(np.longdouble), np.ones((m, d), bool)
    factors = np.stack([inverse_factor(h) for h in layer.dense(np.longdouble)])
    pivots = np.diagonal(factors, axis1=1, axis2=2)
    for j in range(d):
        if isinstance(pattern, NM):
            width, scope, zeros = pattern.m, "row", pattern.m - pattern.n
        else:
            width, scope = min(block, d - j // block * block), pattern.scope
            cells = 1 if scope == "row" else m
            first = j // block * block
            budget = round(pattern.sparsity * cells * d)
            zeros = round(budget * (first + width) / d) - round(budget * first / d)
        if j % (pattern.m if isinstance(pattern, NM) else block) == 0:
            scores = (weight[:, j : j + width] / pivots[:, j : j + width]) ** 2
            for rows in [slice(i, i + 1) for i in range(m)] if scope == "row" else [slice(m)]:
                keep[rows, j : j + width] = ~smallest(scores[rows], zeros)
        error = np.where(keep[:, j], 0, weight[:, j] / pivots[:, j])
        weight[:, j:] -= error[:, None] * factors[:, j, j:]
        weight[~keep[:, j], j] = 0
    return weight, keep


def assert_is_sparsegpt(layer, pattern, block, tolerance=1e-8):
    result = solve(layer.problem, pattern, SparseGPT(block=block))
    weight, keep = explicit_sparsegpt(layer, pattern, block)
    np.testing.assert_array_equal(result.mask, keep)
    largest = float(np.max(abs(weight)))
    np.testing.assert_allclose(result.weight, weight.astype(float), rtol=0, atol=tolerance * largest)


def factor_counts(d):
    """None, fewer than inputs, as many, and more."""
    return st.sampled_from([0, 1, d // 2, d, d + 4])


conditions = st.floats(1, 8).map(lambda exponent: 10**exponent)
seeds = st.integers(0, 2**32 - 1)


@given(seeds, conditions, st.integers(1, 4), st.sampled_from([8, 12, 16]), st.data())
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4)], ids=str)
def test_groups(pattern, seed, condition, m, d, data):
    layer = random_layer(seed, m, d, data.draw(factor_counts(d)), condition)
    assert_is_sparsegpt(layer, pattern, data.draw(st.integers(1, d + 3)))


@given(seeds, conditions, st.integers(1, 4), st.integers(1, 16), st.floats(0, 1), st.data())
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_budgets(scope, seed, condition, m, d, sparsity, data):
    layer = random_layer(seed, m, d, data.draw(factor_counts(d)), condition)
    assert_is_sparsegpt(layer, Unstructured(sparsity, scope), data.draw(st.integers(1, d + 3)))


@pytest.mark.parametrize("n", [0, 5, 70])
def test_several_whole_blocks_and_a_rest(n):
    layer = random_layer(n, 3, 70, n, 1e4)
    for pattern in (Unstructured(0.5), Unstructured(0.7, "row")):
        assert_is_sparsegpt(layer, pattern, 32)


@pytest.mark.parametrize("name", ["fewer tokens than inputs", "duplicate inputs", "one row"])
def test_degenerate_layers(name):
    assert_is_sparsegpt(DEGENERATE[name], Unstructured(0.5), 3, tolerance=1e-6)


def test_factors_of_zeros_change_nothing():
    layer = random_layer(0, 4, 16, 0)
    padded = Layer(layer.weight, layer.A, np.zeros((4, 16, 2)))
    plain, joint = (solve(x.problem, "2:4", SparseGPT()) for x in (layer, padded))
    np.testing.assert_allclose(joint.weight, plain.weight, rtol=1e-13, atol=1e-13)


def test_float32_is_as_good_as_float64():
    layer = random_layer(0, 32, 64, 8, 1e4)
    narrow = Layer(layer.weight.astype(np.float32), layer.A, layer.U)
    values = [solve(x.problem, 0.5, SparseGPT()).value for x in (layer, narrow)]
    assert values[1] == pytest.approx(values[0], rel=1e-2)


@pytest.mark.parametrize("block", [0, -1, 1.5, "128"])
def test_a_block_is_a_positive_integer(block):
    with pytest.raises(ValueError, match="block must be a positive integer"):
        SparseGPT(block=block)
