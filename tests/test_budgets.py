"""Budgets shared among layers, against brute force over all answers."""

from itertools import product
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonshot.pruning import budgets

finite = st.floats(0, 100, allow_nan=False)


@st.composite
def curves(draw, least=1, layers=4):
    """(zeros, costs) of a few layers; costs need be neither convex nor monotone."""
    zeros, costs = [], []
    for _ in range(draw(st.integers(1, layers))):
        counts = sorted(draw(st.sets(st.integers(0, 20), min_size=least, max_size=5)))
        zeros.append(counts)
        costs.append([draw(finite) for _ in counts])
    return zeros, costs


def answers(zeros):
    return product(*(range(len(counts)) for counts in zeros))


def cost_of(answer, costs):
    return sum(cost[k] for cost, k in zip(costs, answer, strict=True))


def largest_step(zeros):
    return max((counts[-1] - counts[0] for counts in zeros), default=0)


@given(curves(), st.data())
def test_handed_out_budgets_have_the_zeros_and_nothing_beats_them_by_more_than_a_step(problem, data):
    zeros, costs = problem
    total = data.draw(st.integers(0, sum(counts[-1] for counts in zeros)))
    found = budgets.hand_out(zeros, costs, total)
    assert budgets.zeros_of(found, zeros) >= total
    others = [a for a in answers(zeros) if budgets.zeros_of(a, zeros) >= total + largest_step(zeros)]
    assert all(cost_of(found, costs) <= cost_of(a, costs) + 1e-9 for a in others)


@given(st.lists(st.lists(finite, max_size=5), min_size=1, max_size=4), st.data())
def test_convex_curves_of_equal_steps_are_handed_out_optimally(steps, data):
    costs = [[sum(sorted(layer)[:k]) for k in range(len(layer) + 1)] for layer in steps]
    zeros = [list(range(len(cost))) for cost in costs]
    total = data.draw(st.integers(0, sum(counts[-1] for counts in zeros)))
    found = budgets.hand_out(zeros, costs, total)
    least = min(cost_of(a, costs) for a in answers(zeros) if budgets.zeros_of(a, zeros) >= total)
    assert cost_of(found, costs) == pytest.approx(least, abs=1e-9)


def test_what_the_last_step_has_too_many_goes_back():
    zeros = [[0, 2], [0, 10]]
    costs = [[0.0, 1.0], [0.0, 6.0]]
    assert budgets.hand_out(zeros, costs, 10) == [0, 1]


@given(curves(), st.data())
def test_the_even_budget_is_the_least_common_sparsity(problem, data):
    zeros, _ = problem
    sizes = [counts[-1] + data.draw(st.integers(1, 5)) for counts in zeros]
    total = data.draw(st.integers(0, sum(counts[-1] for counts in zeros)))
    found = budgets.even(zeros, sizes, total)

    def at(sparsity):
        return [
            min([k for k, z in enumerate(counts) if z >= sparsity * size], default=len(counts) - 1)
            for counts, size in zip(zeros, sizes, strict=True)
        ]

    assert budgets.zeros_of(found, zeros) >= total
    levels = [0.0, *(z / size for counts, size in zip(zeros, sizes, strict=True) for z in counts)]
    enough = [s for s in levels if budgets.zeros_of(at(s), zeros) >= total]
    assert found == at(min(enough))


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0, 1))
def test_exact_budgets_grow_what_is_kept_by_one_factor(layers, share):
    sizes = [size for size, _ in layers]
    kept = [round(size * part) for size, part in layers]
    zeros = [size - k for size, k in zip(sizes, kept, strict=True)]
    total = round(share * sum(zeros))
    found = budgets.exact(zeros, sizes, total)
    assert sum(found) == total
    assert all(0 <= z <= size for z, size in zip(found, sizes, strict=True))
    grown = [size - z for z, size in zip(found, sizes, strict=True)]
    factors = [
        ((new - 1) / old, (new + 1) / old)
        for new, old, size in zip(grown, kept, sizes, strict=True)
        if old and new < size
    ]
    assert max((low for low, _ in factors), default=0) <= min((high for _, high in factors), default=inf)


def additive(truth):
    calls = []

    def loss(answer):
        calls.append(tuple(answer))
        return cost_of(answer, truth)

    return loss, calls


def test_measuring_finds_how_much_each_layer_matters():
    shape = [0.0, 1.0, 3.0, 7.0, 15.0]
    zeros = [[0, 1, 2, 3, 4]] * 3
    truth = [[weight * c for c in shape] for weight in (1.0, 0.25, 4.0)]
    loss, calls = additive(truth)
    start = [2, 2, 2]
    found = budgets.measured(loss(start), start, zeros, [[shape] * 3], 6, loss, rounds=2)
    assert cost_of(found, truth) == pytest.approx(cost_of(budgets.hand_out(zeros, truth, 6), truth))
    assert cost_of(found, truth) < cost_of(start, truth)
    assert len(calls) == 1 + 2 * (2 * 3 + 3)


def test_layers_measured_in_groups_get_the_product_of_their_weights():
    shape = [0.0, 1.0, 3.0, 7.0, 15.0]
    blocks, roles = (1.0, 4.0), (0.5, 2.0, 1.0)
    zeros = [[0, 1, 2, 3, 4]] * 6
    truth = [[block * role * c for c in shape] for block in blocks for role in roles]
    groupings = [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]]
    loss, calls = additive(truth)
    start = [2] * 6
    found = budgets.measured(loss(start), start, zeros, [[shape] * 6], 12, loss, 2, groupings)
    assert cost_of(found, truth) == pytest.approx(cost_of(budgets.hand_out(zeros, truth, 12), truth))
    assert len(calls) == 1 + 2 * (2 * 5 + 3)


@given(curves(least=2), st.data())
def test_measured_budgets_are_never_worse_than_where_they_begin(problem, data):
    zeros, costs = problem
    truth = [[data.draw(finite) for _ in counts] for counts in zeros]
    total = data.draw(st.integers(0, sum(counts[-1] for counts in zeros)))
    start = budgets.hand_out(zeros, costs, total)
    loss, _ = additive(truth)
    found = budgets.measured(loss(start), start, zeros, [costs, truth], total, loss, rounds=3)
    assert budgets.zeros_of(found, zeros) >= total
    assert loss(found) <= loss(start)


def test_a_loss_that_is_infinite_everywhere_else_changes_nothing():
    zeros, costs = [[0, 1], [0, 1]], [[0.0, 1.0], [0.0, 2.0]]
    found = budgets.measured(
        1.0, [1, 0], zeros, [costs], 1, lambda answer: 1.0 if answer == [1, 0] else inf, rounds=3
    )
    assert found == [1, 0]


def test_no_rounds_measure_nothing():
    assert budgets.measured(1.0, [1], [[0, 1]], [[[0.0, 1.0]]], 1, lambda answer: 1 / 0, rounds=0) == [1]


@pytest.mark.parametrize("share", [budgets.even, budgets.hand_out])
def test_too_many_zeros_are_refused(share):
    with pytest.raises(budgets.BudgetError, match="add a sparser pattern"):
        share([[0, 5]], [[0.0, 1.0]] if share is budgets.hand_out else [10], 6)
