"""lower_bound: never above what enumeration finds, near it where the relaxation is, and exact where it must be."""

from dataclasses import replace
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import moonshot as ms
from moonshot import certificate
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.linalg.minorant import first_minorant, proven_minorant, raised_minorant
from moonshot.patterns import NM, PatternError, Unstructured
from moonshot.problem import Problem
from moonshot.solvers import ADMM, solve
from strategies import DEGENERATE, Layer, layers, random_layer, with_condition

few = settings(max_examples=25)


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
    bound = ms.lower_bound(layer.problem, pattern, iterations=iterations)
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
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 7, 8, 11]), st.floats(1, 8), st.sampled_from([1, 2, 3]))
def test_below_the_optimum_of_groups(seed, n, exponent, kept):
    layer = random_layer(seed, 2, 8, n, 10**exponent)
    assert_below(layer, NM(kept, 4))


@few
@given(layers(max_columns=7, max_rows=3), st.floats(0, 1))
def test_below_the_optimum_where_rows_share_a_minorant(layer, sparsity):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "_AFFORDABLE", 0)
        assert_below(layer, Unstructured(sparsity))


@pytest.mark.parametrize("name", DEGENERATE)
def test_below_the_optimum_of_degenerate_layers(name):
    layer = DEGENERATE[name]
    patterns = [Unstructured(s, scope) for s in (0, 0.5, 1) for scope in ("layer", "row")]
    if layer.weight.shape[1] % 4 == 0:
        patterns.append(NM(2, 4))
    for pattern in patterns:
        assert_below(layer, pattern)


@few
@given(layers(max_columns=7, max_rows=2), st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_true_from_whatever_start(layer, seed, exponent):
    start = np.random.default_rng(seed).normal(size=layer.weight.shape) * 10**exponent
    bound = ms.lower_bound(layer.problem, 0.5, start=start, iterations=1)
    assert bound <= optimum(layer, Unstructured(0.5)) * (1 + 1e-9) + 1e-13 * at_zero(layer)


def test_true_in_float32():
    for seed in range(20):
        layer = random_layer(seed, 2, 8, seed % 4, 10.0 ** (seed % 7 + 1))
        layer = replace(layer, weight=layer.weight.astype(np.float32))
        bound, best = assert_below(replace(layer, weight=layer.weight.astype(np.float32)), NM(2, 4))
        exact = ms.lower_bound(replace(layer, weight=layer.weight.astype(np.float64)).problem, "2:4", iterations=40)
        assert bound > 0.5 * exact


# how near


@cache
def ratios(condition, sparsity, n):
    """The bound over the optimum on six rows of 8 to 13 inputs."""
    out = []
    for seed in range(6):
        layer = random_layer(seed, 1, 8 + seed, n, condition)
        pattern = Unstructured(sparsity)
        best = min(v for zeros, v in row_costs(layer.dense()[0], layer.weight[0]).items()
                   if len(zeros) == pattern.zeros((1, 8 + seed)))
        out.append(ms.lower_bound(layer.problem, pattern) / best)
    return np.array(out)


def test_nothing_pruned_costs_nothing_and_everything_costs_everything():
    layer = random_layer(0, 4, 8, 3, 1e4)
    for everything in (0, "4:4", Unstructured(0, "row")):
        assert ms.lower_bound(layer.problem, everything) == 0
    for nothing in (1, "0:4", Unstructured(1, "row")):
        assert ms.lower_bound(layer.problem, nothing) == pytest.approx(at_zero(layer), rel=1e-6)


def relaxation(hessian, centre, kept, minorant):
    """The perspective relaxation of one row by a general-purpose method over the shares z."""
    b = hessian @ centre

    def value(z):
        v = np.linalg.solve(hessian + np.diag(minorant * (1 / z - 1)), b)
        return centre @ b - b @ v, -minorant * v**2 / z**2

    sum_is_kept = {"type": "eq", "fun": lambda z: z.sum() - kept, "jac": lambda z: np.ones_like(z)}
    start = np.full(len(centre), kept / len(centre))
    return minimize(value, start, jac=True, bounds=[(1e-6, 1)] * len(centre), constraints=sum_is_kept,
                    method="SLSQP", options={"ftol": 1e-12, "maxiter": 200}).fun


@pytest.mark.parametrize("seed", range(4))
def test_reaches_the_semidefinite_relaxation(seed):
    layer = random_layer(seed, 1, 4, 2 * (seed % 2), 30)
    hessian, centre = layer.dense()[0], layer.weight[0]

    def negative(logs):
        minorant = np.exp(logs)
        if np.linalg.eigvalsh(hessian - np.diag(minorant))[0] < 0:
            return 0.0
        return -relaxation(hessian, centre, 2, minorant)

    start = np.log(first_minorant(hessian))
    best = -minimize(negative, start, method="Nelder-Mead", options={"maxfev": 400}).fun
    assert best > -1.05 * negative(start)  # there is something to gain in D
    assert ms.lower_bound(layer.problem, 0.5, iterations=300) >= 0.98 * best
