"""lower_bound: the optimum where branch and bound reaches it, true everywhere, elsewhere the relaxation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moonshot as ms
from moonshot.bounds import certificate, relaxation
from moonshot.bounds.relaxation import relaxation_bound
from moonshot.layer.patterns import NM, PatternError, Unstructured, as_pattern
from moonshot.layer.problem import Problem
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from strategies import DEGENERATE, layers, on_torch, random_layer
from test_relaxation import optimum

few = settings(max_examples=25)


@few
@given(layers(max_columns=7, max_rows=3), st.floats(0, 1))
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_the_optimum_of_a_budget_on_small_rows(scope, layer, sparsity):
    pattern = Unstructured(sparsity, scope)
    best, noise = optimum(layer, pattern), 1e-13 * layer.problem.zero_value()
    bound = ms.lower_bound(layer.problem, pattern)
    assert best * (1 - 1e-6) - noise <= bound <= best * (1 + 1e-9) + noise


@few
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 7, 8, 11]), st.floats(1, 8), st.sampled_from([1, 2, 3])
)
def test_the_optimum_of_groups_on_small_rows(seed, n, exponent, kept):
    layer = random_layer(seed, 2, 8, n, 10**exponent)
    best, noise = optimum(layer, NM(kept, 4)), 1e-13 * layer.problem.zero_value()
    assert best * (1 - 1e-6) - noise <= ms.lower_bound(layer.problem, NM(kept, 4)) <= best * (1 + 1e-9) + noise


@pytest.mark.parametrize("name", DEGENERATE)
def test_true_on_degenerate_layers(name):
    layer = DEGENERATE[name]
    patterns = [Unstructured(s, scope) for s in (0, 0.5, 1) for scope in ("layer", "row")]
    if layer.weight.shape[1] % 4 == 0:
        patterns.append(NM(2, 4))
    for pattern in patterns:
        best, noise = optimum(layer, pattern), 1e-13 * layer.problem.zero_value()
        assert 0 <= ms.lower_bound(layer.problem, pattern) <= best * (1 + 1e-9) + noise


@pytest.mark.parametrize("pattern", ["2:4", 0.5, Unstructured(0.5, "row")], ids=str)
def test_the_higher_bound_counts_where_the_search_is_stopped(pattern, monkeypatch):
    problem = random_layer(0, 4, 24, 2, 1e4).problem
    size, zeros = as_pattern(pattern).groups(problem.shape)
    relaxed = relaxation_bound(problem, size, zeros, 60)
    best = ms.solve(problem, pattern, ms.Exact()).value
    monkeypatch.setattr(certificate, "_WORTHWHILE", 1)
    for nodes in (1, 10, 100, 1000):
        searches = 4 * 24 if size > 24 else 4
        monkeypatch.setattr(certificate, "_WORK", nodes * searches * 24**2)
        assert relaxed <= ms.lower_bound(problem, pattern) <= best * (1 + 1e-9)
    monkeypatch.setattr(certificate, "_WORK", 0)
    assert ms.lower_bound(problem, pattern) == relaxed < 0.9 * best


@pytest.mark.parametrize(("shape", "pattern"), [((2, 68), "2:4"), ((1000, 16), "50%")])
def test_layers_that_are_too_large_to_search_have_the_relaxation(shape, pattern):
    problem = random_layer(0, *shape, 0, 1e2).problem
    size, zeros = as_pattern(pattern).groups(shape)
    assert ms.lower_bound(problem, pattern, iterations=2) == relaxation_bound(problem, size, zeros, 2)


def test_tensors_are_not_searched_and_their_bound_is_true_too():
    layer = random_layer(0, 3, 8, 2, 1e2)
    tensors = Problem(torch.tensor(layer.weight), RowHessian(torch.tensor(layer.A), torch.tensor(layer.U)))
    for pattern in ("2:4", 0.5):
        best = optimum(layer, as_pattern(pattern))
        assert 0.1 * best < ms.lower_bound(tensors, pattern) <= best * (1 + 1e-9)


@pytest.mark.parametrize(("columns", "moved"), [(8, True), (72, False)])
def test_what_is_on_a_device_is_bounded_there_if_it_is_large_and_as_on_the_cpu_if_it_is_small(
    columns, moved, monkeypatch
):
    monkeypatch.setattr(relaxation, "_AFFORDABLE", 0)
    layer = random_layer(0, 3, columns, 2, 1e2)
    expected = ms.lower_bound(layer.problem, "2:4")
    problem, seen = on_torch(layer.problem), []
    monkeypatch.setattr(
        certificate,
        "relaxation_bound",
        lambda problem, *rest: seen.append(type(problem.centre)) or relaxation_bound(problem, *rest),
    )
    assert ms.lower_bound(problem, "2:4") == pytest.approx(expected, rel=1e-9 if moved else 1e-2)
    assert seen == ([] if moved else [torch.Tensor])


def test_arrays_of_other_kinds(backend):
    layer = random_layer(0, 3, 8, 2, 1e2)
    hessian = RowHessian(backend.array(layer.A), backend.array(layer.U))
    bound = ms.lower_bound(Problem(backend.array(layer.weight), hessian), 0.5)
    assert isinstance(bound, float)
    assert 0 < bound <= optimum(layer, Unstructured(0.5)) * (1 + 1e-9)


def test_nothing_pruned_costs_nothing_and_everything_costs_everything():
    layer = random_layer(0, 4, 8, 3, 1e4)
    for everything in (0, "4:4", Unstructured(0, "row")):
        assert ms.lower_bound(layer.problem, everything) == 0
    for nothing in (1, "0:4", Unstructured(1, "row")):
        assert ms.lower_bound(layer.problem, nothing) == pytest.approx(layer.problem.zero_value(), rel=1e-6)


@pytest.mark.parametrize("columns", [8, 68])
def test_the_constant_is_part_of_it(columns):
    layer = random_layer(0, 3, columns, 2, 1e2)
    plain, lifted = (Problem(layer.weight, layer.hessian, constant=x) for x in (0.0, 5.0))
    for pattern in ("2:4", 0, 1):
        bound = ms.lower_bound(plain, pattern, iterations=3)
        assert ms.lower_bound(lifted, pattern, iterations=3) == pytest.approx(bound + 5, rel=1e-14)


@pytest.mark.parametrize("columns", [8, 68])
def test_inputs_are_not_changed_and_the_same_call_gives_the_same_bound(columns):
    layer = random_layer(0, 3, columns, 2, 1e2)
    problem = Problem(layer.weight.copy(), RowHessian(layer.A.copy(), layer.U.copy()))
    assert ms.lower_bound(problem, "2:4", iterations=3) == ms.lower_bound(problem, "2:4", iterations=3)
    np.testing.assert_array_equal(problem.centre, layer.weight)
    np.testing.assert_array_equal(problem.hessian.A, layer.A)
    np.testing.assert_array_equal(problem.hessian.factors.transpose(1, 2, 0), layer.U)


def test_a_matrix_too_close_to_singular_proves_nothing():
    hessian = RowHessian(np.array([[1.0, 1.0], [1.0, 1 + 4e-16]]))
    assert ms.lower_bound(Problem(np.array([[1.0, 2.0]]), hessian), 0.5) == 0


# calls that are wrong


class Anywhere:
    def validate(self, shape):
        pass

    def zeros(self, shape):
        return 3

    def keep(self, scores):
        return scores != 0

    def check(self, mask):
        pass


class Pairs(Anywhere):
    def groups(self, shape):
        return 2, 1


def test_a_pattern_of_ones_own_needs_groups():
    problem = random_layer(0, 2, 8, 0).problem
    with pytest.raises(TypeError, match=r"Anywhere is missing `groups\(shape\) -> \(size, zeros\)`"):
        ms.lower_bound(problem, Anywhere())
    assert ms.lower_bound(problem, Pairs()) == ms.lower_bound(problem, "1:2")


def test_wrong_arguments_are_refused():
    layer = random_layer(0, 2, 6, 0)
    with pytest.raises(TypeError, match=r"problem must be a moonshot\.Problem, got ndarray"):
        ms.lower_bound(layer.weight, 0.5)
    with pytest.raises(PatternError, match="divisible by 4"):
        ms.lower_bound(layer.problem, "2:4")
    for iterations in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="iterations must be a positive integer"):
            ms.lower_bound(layer.problem, 0.5, iterations=iterations)
    with pytest.raises(NotPositiveDefiniteError, match="raise dampening_frac"):
        ms.lower_bound(Problem(layer.weight, RowHessian(-np.eye(6))), 0.5)
