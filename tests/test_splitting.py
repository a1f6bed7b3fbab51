"""The elementwise steps of ADMM against what they stand for."""

import numpy as np
import pytest

from moonshot.linalg.backend import native
from moonshot.linalg.splitting import add_outside, reflected

rng = np.random.default_rng(0)
POINT, PULL, X = rng.normal(size=(3, 5, 70))
MASK = rng.random((5, 70)) < 0.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_on_every_backend(backend, dtype):
    point, pull, x = (backend.array(array, dtype) for array in (POINT, PULL, X.copy()))
    mask = backend.array(MASK, "bool")
    if backend.name != "torch-cpu":
        point, pull, x, mask = (native(array) for array in (point, pull, x, mask))
    kept = MASK * POINT
    found = reflected(point, mask, pull, 0.3)
    assert backend.numpy(found).dtype == dtype
    np.testing.assert_allclose(backend.numpy(found), PULL + 0.3 * (2 * kept - POINT), rtol=1e-5, atol=1e-6)
    add_outside(x, point, mask)
    np.testing.assert_allclose(backend.numpy(x), X + POINT - kept, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(backend.numpy(point), POINT.astype(dtype))


def test_what_is_not_finite_stays_outside():
    point, mask, x = np.array([[np.inf, 1.0]]), np.array([[True, False]]), np.zeros((1, 2))
    add_outside(x, point, mask)
    np.testing.assert_array_equal(x, [[0.0, 1.0]])
