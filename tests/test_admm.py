"""ADMM's parameters and its end."""

from math import inf, isfinite, nan

import pytest

from moonshot.layer.problem import Problem, Status
from moonshot.solvers import ADMM, solve
from strategies import random_layer


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("rho", 0, "rho must be positive and finite"),
        ("rho", nan, "rho must be positive and finite"),
        ("rho", inf, "rho must be positive and finite"),
        ("growth", 1, "growth must be above 1"),
        ("growth", nan, "growth must be above 1"),
        ("tolerance", -1e-3, "tolerance must be a share of the weights, 0 or more"),
        ("tolerance", nan, "tolerance must be a share of the weights, 0 or more"),
        ("rho", "a", "rho must be a number, got 'a'"),
        ("iterations", 0, "iterations must be a positive integer"),
        ("refits", 2.5, "refits must be a positive integer"),
    ],
)
def test_bad_parameters(parameter, value, words):
    with pytest.raises(ValueError, match=words):
        ADMM(**{parameter: value})


def problem() -> Problem:
    return random_layer(0, 8, 32, 2, condition=1e4).problem


def test_a_larger_tolerance_ends_sooner():
    loose, exact = (solve(problem(), "2:4", ADMM(tolerance=tolerance)) for tolerance in (0.1, 0.0))
    assert loose.status == exact.status == Status.CONVERGED
    assert 0 < loose.iterations < exact.iterations


def test_the_limit_is_said():
    result = solve(problem(), "2:4", ADMM(iterations=3))
    assert (result.status, result.iterations) == (Status.ITERATION_LIMIT, 3)


def test_a_penalty_beyond_what_numbers_hold_does_no_harm():
    result = solve(problem(), "2:4", ADMM(growth=1e30, tolerance=0.0))
    assert result.status == Status.CONVERGED
    assert isfinite(result.value)
