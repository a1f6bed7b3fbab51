"""Factorisations against their definitions."""

import numpy as np
import pytest
from hypothesis import given

from moonshot.linalg import factor
from moonshot.linalg.factor import (
    NotPositiveDefiniteError,
    capacitance,
    capacitance_solve,
    cholesky,
    eigenbasis,
    gram,
    inverse,
    inverse_factor,
    inverses,
    is_positive_definite,
    rescaled,
    smallest_pivot,
    solve,
)
from strategies import layers, random_layer, with_condition


@given(layers(max_condition=1e8))
def test_inverse_factor_is_upper_triangular_and_factors_the_inverse(layer):
    r, d = inverse_factor(layer.A), len(layer.A)
    assert r.dtype == np.float64
    np.testing.assert_array_equal(r, np.triu(r))
    assert (np.diag(r) > 0).all()
    np.testing.assert_allclose(r @ layer.A @ r.T, np.eye(d), atol=d * 1e-15 * np.linalg.cond(layer.A))


def test_inverse_factor_on_every_backend(backend):
    a = with_condition(np.random.default_rng(0), 9, 1e3)
    np.testing.assert_allclose(backend.numpy(inverse_factor(backend.array(a))), inverse_factor(a), atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_grams_and_capacitance_matrices(backend, n):
    p = np.random.default_rng(0).normal(size=(n, 4, 6))
    expected = np.stack([p[:, i] @ p[:, i].T for i in range(4)])
    np.testing.assert_allclose(backend.numpy(gram(backend.array(p))), expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(
        backend.numpy(capacitance(backend.array(p))), expected + np.eye(n), rtol=1e-13, atol=1e-14
    )


def test_inverses_of_capacitance_matrices(backend):
    for n in (1, 2, 9):  # n > d too
        matrices = capacitance(30 * np.random.default_rng(n).normal(size=(n, 4, 6)))
        computed = backend.numpy(inverses(backend.array(matrices.copy())))
        np.testing.assert_allclose(computed @ matrices, [np.eye(n)] * 4, atol=1e-10)


def test_capacitance_solve(backend):
    rng = np.random.default_rng(0)
    b, matrices = rng.normal(size=(3, 4)), capacitance(rng.normal(size=(3, 4, 6)))
    computed = capacitance_solve(backend.array(np.linalg.cholesky(matrices)), backend.array(b))
    expected = np.stack([np.linalg.solve(matrices[i], b[:, i]) for i in range(4)], axis=1)
    np.testing.assert_allclose(backend.numpy(computed), expected, rtol=1e-12)


def test_rescaled(backend):
    rng = np.random.default_rng(0)
    a, scale = with_condition(rng, 7, 1e2), rng.uniform(1, 2, size=7)
    given_a = backend.array(a)
    for matrix in (given_a, given_a.T):
        found = backend.numpy(rescaled(matrix, backend.array(scale)))
        np.testing.assert_allclose(found, a / np.outer(scale, scale), rtol=1e-14)
        assert found.flags.c_contiguous
    np.testing.assert_array_equal(backend.numpy(given_a), a)


def test_eigenbasis(backend):
    a = with_condition(np.random.default_rng(0), 7, 1e4)
    values, vectors = (backend.numpy(x) for x in eigenbasis(backend.array(a, "float32")))
    np.testing.assert_allclose((vectors * values) @ vectors.T, a.astype(np.float32), atol=1e-14)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(7), atol=1e-13)


def test_inverse_of_a_positive_definite_matrix(backend):
    a = with_condition(np.random.default_rng(1), 9, 1e3)
    given_a = backend.array(a)
    found = backend.numpy(inverse(given_a))
    np.testing.assert_allclose(found, np.linalg.inv(a), rtol=1e-10)
    np.testing.assert_allclose(found, found.T, rtol=1e-12)
    np.testing.assert_array_equal(backend.numpy(given_a), a)
    with pytest.raises(NotPositiveDefiniteError, match="smallest pivot -3"):
        inverse(backend.array(np.diag([1.0, -3.0])))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_is_positive_definite(backend, dtype, monkeypatch):
    sound = np.diag([1.0, 2.0])
    turn = np.array([[1.0, 1.0], [-1.0, 1.0]])  # makes every entry count
    assert is_positive_definite(backend.array(sound, dtype)) is True
    assert is_positive_definite(backend.array(turn @ sound @ turn.T, dtype)) is True
    monkeypatch.setattr(
        factor, "smallest_pivot", None
    )  # nobody asks for it: on a device that is a copy to the host
    for last in (-1, 0, np.nan):
        assert is_positive_definite(backend.array(np.diag([1, last]), dtype)) is False


@pytest.mark.parametrize("pivot", [0.0, -1.0, np.nan])
def test_a_factor_with_a_pivot_that_is_not_positive_is_refused_where_the_backend_does_not(monkeypatch, pivot):
    """As CuPy's may be, which raises nothing by itself."""
    monkeypatch.setattr(factor.namespace(np.eye(2)).linalg, "cholesky", lambda a: np.diag([1.0, pivot]))
    with pytest.raises(NotPositiveDefiniteError, match="smallest pivot 0"):
        cholesky(np.diag([1.0, 0.0]), "the matrix")


def test_cholesky_of_a_batch_says_which_matrix_and_its_smallest_pivot(backend):
    batch = backend.array(np.stack([np.eye(2), np.diag([1.0, -3.0]), np.diag([-1.0, 1.0])]))
    with pytest.raises(NotPositiveDefiniteError, match="the thing is not positive definite") as caught:
        cholesky(batch, "the thing")
    assert caught.value.pivot == -3


@pytest.mark.parametrize(
    ("a", "pivot"),
    [
        ([[4.0]], 4.0),
        ([[-4.0]], -4.0),
        ([[4.0, 2.0], [2.0, 3.0]], 2.0),
        ([[4.0, 2.0], [2.0, 1.0]], 0.0),
        ([[1.0, 2.0], [2.0, 1.0]], -3.0),
        ([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, -9.0]], -3.0),  # stops at the first not positive
    ],
)
def test_smallest_pivot(a, pivot):
    assert smallest_pivot(np.array(a)) == pytest.approx(pivot, abs=1e-15)


def test_the_inverse_factor_loses_no_digits_by_squaring():
    """R's error grows with the root of the condition, not with it: the reason to factor A, not its inverse."""
    layer = random_layer(0, 1, 30, 0, condition=1e14)
    r = inverse_factor(layer.A)
    relative = np.linalg.norm(np.linalg.solve(r, np.eye(30)) @ np.linalg.solve(r, np.eye(30)).T - layer.A)
    assert relative <= 1e-13


def test_positive_definite_systems(backend):
    rng = np.random.default_rng(0)
    a, x = with_condition(rng, 9, 1e3), rng.normal(size=9)
    found = backend.numpy(solve(backend.array(a), backend.array(a @ x)))
    np.testing.assert_allclose(found, x, rtol=1e-10)
    with pytest.raises(NotPositiveDefiniteError):
        solve(backend.array(np.diag([1.0, -1.0])), backend.array([1.0, 1.0]))
