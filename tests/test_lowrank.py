"""Products with the rows' factors against the sums they stand for."""

import numpy as np
import pytest

import cuda_on_host
from moonshot.linalg import lowrank, lowrank_cuda
from moonshot.linalg.backend import like, native, on_host

rng = np.random.default_rng(0)
FACTORS, X, COEFFICIENTS = rng.normal(size=(3, 4, 7)), rng.normal(size=(4, 7)), rng.normal(size=(3, 4))
INVERSES, SCALE = rng.normal(size=(4, 3, 3)), np.geomspace(0.5, 2, 7)
INVERSES = INVERSES + INVERSES.transpose(0, 2, 1)


def computed(backend, function, *arguments, dtype="float64"):
    arrays = [backend.array(array, dtype) for array in arguments]
    if backend.name != "torch-cpu":  # which sparsegpt_batched runs on for the tests, and NumPy otherwise
        arrays = [native(array) for array in arrays]
    return backend.numpy(like(function(*arrays), backend.array(X)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_products(backend, dtype, tolerance):
    scaled = FACTORS * SCALE
    expected = [
        (lowrank.project, (FACTORS, X), np.einsum("kij,ij->ki", FACTORS, X)),
        (lowrank.apply, (FACTORS, X), np.einsum("kij,kil,il->ij", FACTORS, FACTORS, X)),
        (lowrank.project, (FACTORS, X, SCALE), np.einsum("kij,ij->ki", scaled, X)),
        (lowrank.apply, (FACTORS, X, SCALE), np.einsum("kij,kil,il->ij", scaled, scaled, X)),
        (
            lowrank.add_applied,
            (X.copy(), FACTORS, X, SCALE),
            X + np.einsum("kij,kil,il->ij", scaled, scaled, X),
        ),
        (lowrank.diagonals, (X[0], FACTORS, SCALE), X[0] + np.sum(scaled**2, axis=0)),
    ]
    for function, arguments, value in expected:
        result = computed(backend, function, *arguments, dtype=dtype)
        assert result.dtype == dtype
        np.testing.assert_allclose(result, value, rtol=tolerance, atol=tolerance)


def test_the_woodbury_correction(backend):
    expected = X - np.einsum("kij,ikl,lin,in->ij", FACTORS, INVERSES, FACTORS, X)
    result = computed(backend, lowrank.correct, X, FACTORS, INVERSES)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_coefficients_are_refreshed_in_place(backend):
    scaled = FACTORS * SCALE
    projected = np.einsum("kij,ij->ki", scaled, X)
    expected = COEFFICIENTS.T + np.einsum("ikl,li->ik", INVERSES, projected - COEFFICIENTS)
    arrays = [backend.array(array) for array in (FACTORS, X, SCALE, INVERSES, COEFFICIENTS.T.copy())]
    if backend.name != "torch-cpu":
        arrays = [native(array) for array in arrays]
    pull = lowrank.refresh(*arrays)
    np.testing.assert_allclose(on_host(arrays[4]), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(on_host(pull), np.einsum("kij,ik->ij", scaled, expected), atol=1e-11)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("place", [1, 3, 70, *cuda_on_host.PLACES[2:]])  # 70: two factors at a time
def test_kernels(monkeypatch, place, dtype, scale):
    convert = cuda_on_host.arrays_at(place, monkeypatch)
    stored = FACTORS.astype(dtype)  # float32 as they are stored, all else float64
    factors = stored.astype("float64") * (1 if scale is None else SCALE)
    unit = None if scale is None else convert(scale)
    view = convert(X.T.copy()).T
    projected = on_host(lowrank_cuda.project(convert(stored), view, unit))
    np.testing.assert_allclose(projected, np.einsum("kij,ij->ki", factors, X), rtol=1e-12)
    y = convert(X.copy())
    lowrank_cuda.add_combined(y, convert(stored), convert(COEFFICIENTS), unit)
    combined = X + np.einsum("kij,ki->ij", factors, COEFFICIENTS)
    np.testing.assert_allclose(on_host(y), combined, rtol=1e-12, atol=1e-13)
    y = convert(X.copy())
    lowrank_cuda.add_diagonal(y, convert(stored), unit)
    np.testing.assert_allclose(on_host(y), X + np.sum(factors**2, axis=0), rtol=1e-12)
    y = convert(X.copy())
    lowrank_cuda.add_applied(y, convert(stored), view, unit)
    applied = np.einsum("kij,kil,il->ij", factors, factors, X)
    np.testing.assert_allclose(on_host(y), X + applied, rtol=1e-12, atol=1e-12)
    inverses, coefficients = convert(INVERSES), convert(COEFFICIENTS.T.copy())
    pull = lowrank_cuda.refresh(convert(stored), view, unit, inverses, coefficients)
    by_column = convert(np.ascontiguousarray(factors.transpose(2, 1, 0)))
    grams = np.einsum("kij,lij->ikl", factors, factors)
    np.testing.assert_allclose(on_host(lowrank_cuda.gram(by_column)), grams, rtol=1e-12, atol=1e-12)
    projected = np.einsum("kij,ij->ki", factors, X)
    expected = COEFFICIENTS.T + np.einsum("ikl,li->ik", INVERSES, projected - COEFFICIENTS)
    np.testing.assert_allclose(on_host(coefficients), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(on_host(pull), np.einsum("kij,ik->ij", factors, expected), atol=1e-11)


def test_factors_in_another_dtype(backend):
    factors = [backend.array(FACTORS, "float32"), backend.array(X)]
    if backend.name != "torch-cpu":
        factors = [native(array) for array in factors]
    result = backend.numpy(like(lowrank.apply(*factors), backend.array(X)))
    single = FACTORS.astype("float32").astype("float64")
    np.testing.assert_allclose(result, np.einsum("kij,kil,il->ij", single, single, X), rtol=1e-12, atol=1e-12)
