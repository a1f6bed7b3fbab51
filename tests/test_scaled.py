"""Refits by conjugate gradients: the minimiser on every row's support, and on a device what the CPU finds."""

import numpy as np
import pytest

import cuda_on_host
from moonshot.linalg import RowHessian, conjugate_cuda
from moonshot.linalg.backend import on_host
from moonshot.linalg.scaled import ScaledQuadratic
from strategies import random_layer

ROWS, COLUMNS = 4, 21
MASK = np.random.default_rng(1).random((ROWS, COLUMNS)) < [[0.7], [0.3], [0], [1]]


def quadratic_of(n, dtype, convert=np.asarray):
    layer = random_layer(n, ROWS, COLUMNS, n, 1e2)
    hessian = RowHessian(convert(layer.A), convert(layer.U) if n else None)
    return ScaledQuadratic.of(hessian, convert(layer.weight.astype(dtype)), convert(np.sqrt(np.diag(layer.A))))


@pytest.mark.parametrize("n", [0, 3])
def test_a_refit_finds_the_minimiser_on_the_support(n):
    quadratic = quadratic_of(n, "float64")
    x = quadratic.refit(quadratic.target * MASK, MASK, 200)
    assert not x[~MASK].any()
    gradient = quadratic.matvec(x) - quadratic.pull
    assert np.max(abs(gradient[MASK])) < 1e-9 * np.max(abs(quadratic.pull))


def test_some_rows_are_as_they_are_among_all():
    quadratic, rows = quadratic_of(3, "float64"), np.array([3, 1])
    fresh = ScaledQuadratic(
        quadratic.scale,
        quadratic.target[rows],
        quadratic.pull[rows],
        quadratic.shared,
        quadratic.factors[:, rows],
        quadratic.units,
    )
    some = quadratic.rows(rows)
    np.testing.assert_array_equal(some.diagonal, fresh.diagonal)
    np.testing.assert_allclose(some.matvec(some.target), fresh.matvec(fresh.target), rtol=1e-12)


@pytest.mark.parametrize("steps", [2, 60])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("place", cuda_on_host.PLACES)
def test_a_refit_on_cuda(place, n, dtype, steps, monkeypatch):
    expected = quadratic_of(n, dtype)
    start = expected.target * MASK
    found = expected.refit(start, MASK, steps)
    convert = cuda_on_host.arrays_at(place, monkeypatch)
    quadratic = quadratic_of(n, dtype, convert)
    monkeypatch.setattr("moonshot.linalg.scaled.is_cupy", lambda array: True)
    products, launch = [], cuda_on_host.cuda.launch
    monkeypatch.setattr(conjugate_cuda.cuda, "launch", lambda *all: products.append(all[2]) or launch(*all))
    given = convert(start.copy())
    x = on_host(quadratic.refit(given, convert(MASK), steps))
    if dtype == "float64":
        np.testing.assert_allclose(x, found, rtol=1e-9, atol=1e-9)
    assert expected.loss(x) == pytest.approx(
        expected.loss(found), rel=1e-3
    )  # float32 may end a step sooner or later
    np.testing.assert_array_equal(on_host(given), start)
    assert not x[~MASK].any()
    products = [name for name in products if name in ("start", "advance")]
    assert products[0] == "start" and len(products) <= 1 + steps and (steps < 60 or len(products) < 60)
