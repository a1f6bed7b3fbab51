"""Solutions with a shifted Hessian, against dense ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonshot.linalg.backend import native
from moonshot.linalg.shifted import ShiftedInverse


def layer(seed, d, n, rows=5, scale=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * d, d)) * np.geomspace(1, 1e-3, d)
    a = x.T @ x / (2 * d) + 1e-4 * np.eye(d)
    return a, (scale * rng.normal(size=(n, rows, d)) if n else None), rng.normal(size=(rows, d))


def shifted(a, u, put=lambda array: array):
    def inverse(sigma, dtype, grams):
        assert dtype == "float64"
        b = np.linalg.inv(a + sigma * np.eye(len(a)))
        return put(b), put(np.einsum("kij,jl,qil->ikq", u, b, u)) if grams else None

    units = np.geomspace(1e-3, 1e3, len(a))
    return ShiftedInverse(inverse, None if u is None else put(u / units), put(units))


def exact(a, u, rho, b):
    full = [a + rho * np.eye(len(a)) + (0 if u is None else u[:, i].T @ u[:, i]) for i in range(len(b))]
    return np.stack([np.linalg.solve(h, right) for h, right in zip(full, b, strict=True)])


def rest(inverse, b, rho, calls=60):
    """The solution that repeated calls come to."""
    for _ in range(calls):
        x = inverse.solve(b.copy(), rho)
    return x


@given(st.integers(0, 99), st.sampled_from([16, 33]), st.sampled_from([0, 1, 2, 5, 40]), st.floats(0.01, 10))
def test_solutions_of_a_resting_right_side_are_exact(seed, d, n, rho):
    a, u, b = layer(seed, d, n)
    inverse = shifted(a, u)
    for larger in (rho, 1.2 * rho, 1.9 * rho, 5 * rho, 90 * rho):
        expected = exact(a, u, larger, b)
        found = rest(inverse, b, larger)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * abs(expected).max())


@given(st.integers(0, 99), st.sampled_from([0, 9]), st.lists(st.floats(1, 10), min_size=1, max_size=8))
def test_a_call_brings_x_nearer_by_the_share_it_says(seed, n, factors):
    a, u, b = layer(seed, 24, n)
    inverse, rho, x = shifted(a, u), 0.3, np.zeros_like(b)
    for factor in (1, *factors):
        rho *= factor
        expected = exact(a, u, rho, b)
        far, x = np.linalg.norm(x - expected, axis=1), inverse.solve(b.copy(), rho)
        assert (np.linalg.norm(x - expected, axis=1) <= 0.3 * far + 1e-9).all()


def test_one_inverse_serves_every_rho_near_it():
    a, u, b = layer(0, 24, 2)
    inverse, made = shifted(a, u), []
    invert = inverse._inverse
    inverse._inverse = lambda sigma, *how: (made.append((round(sigma, 9), how[1])), invert(sigma, *how))[1]
    for rho in (0.7, 0.8, 1.29, 1.4, 2.5, 2.8, 5, 5.6, 0.07):
        inverse.solve(b.copy(), rho)
    assert made == [(1, True), (2, False), (4, True), (8, False), (0.1, True)]


@given(st.integers(0, 99), st.sampled_from([1, 2]), st.floats(0.1, 10))
def test_few_factors_lag_one_call_behind(seed, n, scale):
    a, u, b = layer(seed, 24, n, scale=scale)
    inverse, rho = shifted(a, u), 0.7  # and sigma 1
    inverse.solve(b.copy(), rho)
    x = rest(inverse, b, rho)
    right = b + 0.1 * np.random.default_rng(seed).normal(size=b.shape)
    dense, shift = np.linalg.inv(a + np.eye(24)), 0.3
    pull = np.einsum("kij,kil,il->ij", u, u, x)
    expected = (right + shift * x - pull) @ dense
    np.testing.assert_allclose(inverse.solve(right.copy(), rho), expected, rtol=1e-6, atol=1e-8)
    now = exact(a, u, 1.0, right + shift * x)  # what this call would have been without lag
    pull = np.einsum("kij,kil,il->ij", u, u, now)
    np.testing.assert_allclose(
        inverse.solve(right.copy(), rho), (right + shift * expected - pull) @ dense, rtol=1e-6, atol=1e-8
    )


@given(st.integers(0, 99), st.floats(1, 2.9), st.floats(0.1, 100))
def test_grams_of_an_earlier_rho_leave_the_share_of_the_coefficients_it_says(seed, sigma, scale):
    a, u, b = layer(seed, 24, 2, scale=scale)
    inverse = shifted(a, u)
    inverse.solve(b.copy(), 0.7)
    inverse._renew(sigma, "float64")
    assert inverse._earlier == pytest.approx(1)
    dense = np.linalg.inv(a + sigma * np.eye(24))
    for i, inverted in enumerate(inverse._capacitance_inverses):
        capacitance = np.eye(2) + u[:, i] @ dense @ u[:, i].T
        root = np.linalg.cholesky(capacitance)
        left = np.eye(2) - root.T @ inverted @ root  # similar to I less the inverse that is used times C_i
        assert np.linalg.norm(left, 2) <= (1 - 1 / sigma) / (1 + 1 / sigma) + 1e-6


def test_many_factors_do_not_lag():
    a, u, b = layer(0, 24, 4)
    inverse, x = shifted(a, u), 0
    for right in (b, -b, b**2):
        x = exact(a, u, 1.0, right + 0.3 * x)
        np.testing.assert_allclose(inverse.solve(right.copy(), 0.7), x, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [0, 2, 9])
def test_on_every_backend(backend, n):
    a, u, b = layer(1, 24, n)
    put, read = backend.array, backend.numpy
    if backend.name != "torch-cpu":
        put, read = lambda array: native(backend.array(array)), backend.computed
    inverse = shifted(a, u, put)
    inverse.solve(put(b.copy()), 0.5)
    for _ in range(40):
        found = read(inverse.solve(put(b.copy()), 0.6))
    np.testing.assert_allclose(found, exact(a, u, 0.6, b), rtol=1e-6, atol=1e-8)
