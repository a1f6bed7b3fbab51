"""Products with half the work, against plain ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonshot.linalg.backend import namespace, native, on_host
from moonshot.linalg.products import Times, half_product, half_product_by_factor, half_product_grams, square

sizes = st.sampled_from([1, 5, 31, 32, 33, 255, 257, 600])


@pytest.mark.fresh
@given(st.integers(0, 2**32 - 1), sizes, st.integers(0, 3), st.integers(1, 7), st.sampled_from(["f4", "f8"]))
def test_half_product(seed, d, n, lanes, dtype):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, 5, d)).astype(dtype)
    r = np.triu(rng.normal(size=(d, d)).astype(dtype))
    before = factors.copy()
    expected = np.einsum("jk,nmk->jnm", r, factors)
    close = {"rtol": 0, "atol": (1e-4 if dtype == "f4" else 1e-11)}
    tiles = half_product(factors, r, lanes)
    assert tiles.shape == (d, -(-5 // lanes), n, lanes) and tiles.dtype == dtype
    rows = np.moveaxis(tiles, 1, 2).reshape(d, n, -(-5 // lanes) * lanes)
    np.testing.assert_allclose(rows[:, :, :5], expected, **close)
    assert (rows[:, :, 5:] == 0).all()
    np.testing.assert_allclose(half_product_by_factor(factors, r), expected.transpose(1, 2, 0), **close)
    np.testing.assert_array_equal(factors, before)


@pytest.mark.parametrize("n", [0, 2])
def test_products_on_every_backend(backend, n):
    rng = np.random.default_rng(0)
    factors, r = rng.normal(size=(n, 5, 9)), np.triu(rng.normal(size=(9, 9)))
    on = [backend.array(a) for a in (factors, r)]
    np.testing.assert_allclose(
        backend.numpy(half_product(on[0], on[1], 3)), half_product(factors, r, 3), atol=1e-12
    )
    by_factor = half_product_by_factor(factors, r)
    np.testing.assert_allclose(backend.numpy(half_product_by_factor(on[0], on[1])), by_factor, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3])
def test_grams_of_products(backend, n):
    rng = np.random.default_rng(0)
    factors, r = rng.normal(size=(n, 300, 9)), np.triu(rng.normal(size=(9, 9)))
    products = np.einsum("jk,nmk->mnj", r, factors)
    found = backend.numpy(half_product_grams(backend.array(factors), backend.array(r)))
    np.testing.assert_allclose(found, products @ products.transpose(0, 2, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 600), ("float64", 600), ("float32", 9)])
def test_products_with_one_matrix(backend, dtype, size):
    rng = np.random.default_rng(0)
    x, matrix = rng.normal(size=(7, size)), rng.normal(size=(size, size))
    times = Times(native(backend.array(matrix, dtype)))
    found = times(native(backend.array(x.T.copy(), dtype)).T)
    single, other = x.astype(dtype).astype("float64"), matrix.astype(dtype).astype("float64")
    error = abs(on_host(found) - single @ other) / (abs(single) @ abs(other))
    assert found.dtype == getattr(namespace(found), dtype)
    assert error.max() < {"float32": 1e-6, "float64": 1e-15}[dtype]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 600), ("float64", 40)])
def test_a_square(backend, dtype, size):
    r = np.triu(np.random.default_rng(0).normal(size=(size, size))).astype(dtype)
    found = on_host(square(native(backend.array(r, dtype))))
    error = abs(found - r.T.astype("f8") @ r) / (abs(r).T.astype("f8") @ abs(r))
    assert found.dtype == dtype
    assert error[np.isfinite(error)].max() < {"float32": 1e-6, "float64": 1e-15}[dtype]
