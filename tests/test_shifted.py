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


@given(st.integers(0, 99), st.sampled_from([16, 33]), st.sampled_from([0, 1, 2, 5, 40]), st.floats(0.01, 10))
def test_the_first_solution_and_those_of_a_resting_right_side_are_exact(seed, d, n, rho):
    a, u, b = layer(seed, d, n)
    inverse = shifted(a, u)
    for shift in (rho, 1.5 * rho):
        inverse.shift(shift)
        solutions = [inverse.solve(b.copy()) for _ in range(3)]
        expected = exact(a, u, shift, b)
        close = dict(rtol=1e-6, atol=1e-7 * abs(expected).max())
        np.testing.assert_allclose(solutions[-1], expected, **close)
        if shift == rho:
            np.testing.assert_allclose(solutions[0], expected, **close)


@given(st.integers(0, 99), st.sampled_from([1, 2]), st.floats(0.1, 10))
def test_few_factors_lag_one_call_behind(seed, n, scale):
    a, u, b = layer(seed, 24, n, scale=scale)
    inverse = shifted(a, u)
    inverse.shift(0.5)
    inverse.solve(b.copy())
    other = b + 0.1 * np.random.default_rng(seed).normal(size=b.shape)
    dense = np.linalg.inv(a + 0.5 * np.eye(24))
    pull = np.einsum("kij,kil,il->ij", u, u, exact(a, u, 0.5, b))
    np.testing.assert_allclose(inverse.solve(other.copy()), (other - pull) @ dense, rtol=1e-6, atol=1e-8)
    lagging = abs((other - pull) @ dense - exact(a, u, 0.5, other)).max()
    assume(lagging > 1e-5)
    assert abs(inverse.solve(other.copy()) - exact(a, u, 0.5, other)).max() < 1e-3 * lagging


def test_many_factors_do_not_lag():
    a, u, b = layer(0, 24, 4)
    inverse = shifted(a, u)
    for rho, right in ((0.5, b), (0.5, -b), (2.0, b**2)):
        inverse.shift(rho)
        np.testing.assert_allclose(inverse.solve(right.copy()), exact(a, u, rho, right), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [0, 2, 9])
def test_on_every_backend(backend, n):
    a, u, b = layer(1, 24, n)
    put = backend.array if backend.name == "torch-cpu" else lambda array: native(backend.array(array))
    inverse = shifted(a, u, put)
    for rho, right in ((0.5, b), (0.7, b), (0.7, b)):
        inverse.shift(rho)
        found = backend.numpy(inverse.solve(put(right.copy())))
    np.testing.assert_allclose(found, exact(a, u, 0.7, b), rtol=1e-6, atol=1e-8)
