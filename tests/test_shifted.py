"""Solutions with a shifted Hessian, against dense ones."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moonshot.linalg.backend import native
from moonshot.linalg.factor import eigenbasis
from moonshot.linalg.shifted import ShiftedInverse


def layer(seed, d, n, rows=5, scale=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * d, d)) * np.geomspace(1, 1e-3, d)
    a = x.T @ x / (2 * d) + 1e-4 * np.eye(d)
    return a, (scale * rng.normal(size=(n, rows, d)) if n else None), rng.normal(size=(rows, d))


def shifted(a, u, put=lambda array: array):
    values, basis = eigenbasis(a)
    arrays = [values, basis, None if u is None else (u.reshape(-1, len(a)) @ basis).reshape(u.shape), u]
    return ShiftedInverse(*(None if array is None else put(np.ascontiguousarray(array)) for array in arrays))


def exact(a, u, rho, b):
    full = [a + rho * np.eye(len(a)) + (0 if u is None else u[:, i].T @ u[:, i]) for i in range(len(b))]
    return np.stack([np.linalg.solve(h, right) for h, right in zip(full, b, strict=True)])


def rest(inverse, b, rho, calls=60):
    """The solution that repeated calls come to."""
    for _ in range(calls):
        x = inverse.solve(b.copy(), rho)
    return x


@given(st.integers(0, 99), st.sampled_from([16, 33]), st.sampled_from([0, 1, 2, 5, 40]), st.floats(0.01, 10))
def test_the_first_solution_and_those_of_a_resting_right_side_are_exact(seed, d, n, rho):
    a, u, b = layer(seed, d, n)
    inverse = shifted(a, u)
    expected = exact(a, u, rho, b)
    np.testing.assert_allclose(
        inverse.solve(b.copy(), rho), expected, rtol=1e-6, atol=1e-7 * abs(expected).max()
    )
    for larger in (1.2 * rho, 1.5 * rho, 1.9 * rho, 40 * rho):
        expected = exact(a, u, larger, b)
        found = rest(inverse, b, larger)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * abs(expected).max())


@given(st.integers(0, 99), st.sampled_from([0, 9]), st.lists(st.floats(1, 10), min_size=1, max_size=8))
def test_a_call_for_a_larger_rho_brings_x_nearer_by_the_share_it_says(seed, n, factors):
    a, u, b = layer(seed, 24, n)
    inverse, rho, x = shifted(a, u), 0.3, None
    x = inverse.solve(b.copy(), rho)
    for factor in factors:
        rho *= factor
        expected = exact(a, u, rho, b)
        far, x = np.linalg.norm(x - expected, axis=1), inverse.solve(b.copy(), rho)
        assert (np.linalg.norm(x - expected, axis=1) <= (2**0.5 - 1) * far + 1e-9).all()


def test_one_inverse_serves_every_rho_near_it(monkeypatch):
    a, u, b = layer(0, 24, 2)
    inverse, made = shifted(a, u), []
    invert = ShiftedInverse._invert
    monkeypatch.setattr(
        ShiftedInverse, "_invert", lambda self, sigma: (made.append(sigma), invert(self, sigma))
    )
    for rho in (1, 1.1, 1.4, 1.42, 2, 2.8, 2.9, 0.1):
        inverse.solve(b.copy(), rho)
    np.testing.assert_allclose(made, [1, 1.42 * 2**0.5, 2.9 * 2**0.5, 0.1 * 2**0.5])


@given(st.integers(0, 99), st.sampled_from([1, 2]), st.floats(0.1, 10))
def test_few_factors_lag_one_call_behind(seed, n, scale):
    a, u, b = layer(seed, 24, n, scale=scale)
    inverse = shifted(a, u)
    inverse.solve(b.copy(), 0.5)
    other = b + 0.1 * np.random.default_rng(seed).normal(size=b.shape)
    dense = np.linalg.inv(a + 0.5 * np.eye(24))
    pull = np.einsum("kij,kil,il->ij", u, u, exact(a, u, 0.5, b))
    np.testing.assert_allclose(inverse.solve(other.copy(), 0.5), (other - pull) @ dense, rtol=1e-6, atol=1e-8)
    lagging = abs((other - pull) @ dense - exact(a, u, 0.5, other)).max()
    assume(lagging > 1e-5)
    assert abs(inverse.solve(other.copy(), 0.5) - exact(a, u, 0.5, other)).max() < 1e-3 * lagging


def test_many_factors_do_not_lag():
    a, u, b = layer(0, 24, 4)
    inverse = shifted(a, u)
    for right in (b, -b, b**2):
        found = inverse.solve(right.copy(), 0.5)
        np.testing.assert_allclose(found, exact(a, u, 0.5, right), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [0, 2, 9])
def test_on_every_backend(backend, n):
    a, u, b = layer(1, 24, n)
    put = backend.array if backend.name == "torch-cpu" else lambda array: native(backend.array(array))
    inverse = shifted(a, u, put)
    inverse.solve(put(b.copy()), 0.5)
    for _ in range(40):
        found = backend.numpy(inverse.solve(put(b.copy()), 0.6))
    np.testing.assert_allclose(found, exact(a, u, 0.6, b), rtol=1e-6, atol=1e-8)
