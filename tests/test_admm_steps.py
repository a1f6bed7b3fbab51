"""The elementwise steps of ADMM against what they stand for."""

import numpy as np
import pytest

from moonshot.linalg.backend import add_multiple, asarray_like, native, on_host
from moonshot.solvers.admm_steps import move, reflected

rng = np.random.default_rng(0)
POINT, TARGET, X = rng.normal(size=(3, 5, 70))
MASK = rng.random((5, 70)) < 0.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_every_backend(backend, dtype):
    point, target, x = (backend.array(array, dtype) for array in np.stack([POINT, TARGET, X]))
    if backend.name != "torch-cpu":
        point, target, x = (native(array) for array in (point, target, x))
    mask = asarray_like(MASK, point)
    kept = MASK * POINT
    found = reflected(point, mask, target, 0.3, 0.2)
    assert on_host(found).dtype == dtype
    np.testing.assert_allclose(
        on_host(found), 0.3 * (kept - TARGET) - 0.2 * (POINT - kept), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(on_host(point), POINT.astype(dtype))
    move(point, mask, target, x, 0.7)
    assert on_host(point).dtype == dtype
    np.testing.assert_allclose(on_host(point), TARGET + X + 0.7 * (POINT - kept), rtol=1e-5, atol=1e-6)
    add_multiple(target, x, -0.4)
    assert on_host(target).dtype == dtype
    np.testing.assert_allclose(on_host(target), TARGET - 0.4 * X, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(on_host(x), X.astype(dtype))


def test_what_is_not_finite_does_not_stay_inside():
    point, mask, zero = np.array([[np.inf, 1.0]]), np.array([[True, False]]), np.zeros((1, 2))
    move(point, mask, zero, zero, 1.0)
    np.testing.assert_array_equal(point, [[0.0, 1.0]])
