"""RowHessian against explicit matrices H_i = A + U_i U_i', for every kind of array."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moonshot.layer.problem import Problem
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.linalg.backend import like
from strategies import DEGENERATE, Layer, layers, random_layer, with_condition


def backward_error(layer, x, b):
    """Largest |H_i x_i - b_i| / (|H_i| |x_i| + |b_i|) of the rows, evaluated in extended precision."""
    hessians = layer.dense(np.longdouble)
    residual = np.einsum("ijk,ik->ij", hessians, x.astype(np.longdouble)) - b
    scale = np.linalg.norm(layer.dense(), 2, axis=(1, 2)) * np.linalg.norm(x, axis=1)
    return float(np.max(np.sqrt(np.sum(residual**2, axis=1)) / (scale + np.linalg.norm(b, axis=1))))


def assert_agrees_with_dense(layer):
    hessian, hessians = layer.hessian, layer.dense()
    v = np.random.default_rng(1).normal(size=layer.weight.shape)
    for i, dense in enumerate(hessians):
        np.testing.assert_allclose(hessian.row(i), dense, rtol=1e-13, atol=1e-14 * np.max(abs(dense)))
    scale = np.max(abs(hessians))
    products = np.einsum("ijk,ik->ij", hessians, v)
    np.testing.assert_allclose(hessian.matvec(v), products, rtol=1e-11, atol=1e-12 * scale)
    np.testing.assert_allclose(
        hessian.quadratic(v), np.sum(v * products, axis=1), rtol=1e-11, atol=1e-13 * scale
    )
    diagonals = np.broadcast_to(hessian.diagonal(), v.shape)
    np.testing.assert_allclose(diagonals, np.diagonal(hessians, axis1=1, axis2=2), rtol=1e-13)
    assert backward_error(layer, hessian.solve(v), v) <= 1e-13


def assert_inverse_diagonal(layer, tolerance):
    inverse = np.diagonal(np.linalg.inv(layer.dense()), axis1=1, axis2=2)
    computed = np.broadcast_to(layer.hessian.inverse_diagonal(), layer.weight.shape)
    np.testing.assert_allclose(computed, inverse, rtol=tolerance)


@given(layers(max_condition=1e12))
def test_agrees_with_the_dense_twin(layer):
    assert_agrees_with_dense(layer)


@pytest.mark.parametrize("name", DEGENERATE)
def test_agrees_with_the_dense_twin_where_degenerate(name):
    assert_agrees_with_dense(DEGENERATE[name])
    assert_inverse_diagonal(DEGENERATE[name], 1e-6)


@given(layers(max_condition=1e6))
def test_inverse_diagonal(layer):
    assert_inverse_diagonal(layer, 1e-8)


@given(layers(max_condition=1e6))
def test_the_saliency_scale_makes_the_diagonal_of_the_inverse_one_or_that_of_a_a_hundredth(layer):
    scale = RowHessian(layer.A, layer.U).saliency_scale
    saliency = 1 / np.diag(np.linalg.inv(layer.A))
    np.testing.assert_allclose(scale**2, np.maximum(saliency, np.diag(layer.A) / 100), rtol=1e-8)


@pytest.mark.parametrize("m", [1, 5, 300])  # 300 rows are more than are multiplied at once
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_shifted_inverse_and_grams_on_every_backend(backend, m, dtype, tolerance):
    layer = random_layer(m, m, 12, 3, condition=1e4)
    hessian = RowHessian(backend.array(layer.A), backend.array(layer.U))
    scale = layer.hessian.saliency_scale
    np.testing.assert_allclose(backend.numpy(like(hessian.saliency_scale, backend.array(scale))), scale)
    expected = np.linalg.inv(layer.A / np.outer(scale, scale) + 0.3 * np.eye(12))
    found = hessian.shifted_inverse(0.3, dtype, grams=True)
    inverse, grams = (backend.numpy(like(array, backend.array(scale))) for array in found)
    assert hessian.shifted_inverse(0.3, dtype, grams=False)[1] is None
    assert inverse.dtype == grams.dtype == dtype
    np.testing.assert_allclose(inverse, expected, rtol=tolerance, atol=tolerance)
    u = layer.U / scale[:, None]
    expected = np.einsum("ijk,jl,ilq->ikq", u, expected, u)
    np.testing.assert_allclose(grams, expected, rtol=tolerance, atol=tolerance * abs(expected).max())


@pytest.mark.parametrize("scale", [1e-8, 1, 1e3])
@pytest.mark.parametrize("n", [1, 6, 15])
def test_solve_is_backward_stable_for_light_and_heavy_factors(n, scale):
    layer = random_layer(n, 5, 12, n, condition=1e4)
    layer = Layer(layer.weight, layer.A, scale * layer.U)
    assert backward_error(layer, layer.hessian.solve(layer.weight), layer.weight) <= 1e-13


def test_solve_is_right_or_refuses():
    layer = random_layer(12, 5, 12, 12, condition=1e8)
    layer = Layer(layer.weight, layer.A, 1e4 * layer.U)
    try:
        solution = layer.hessian.solve(layer.weight)
    except NotPositiveDefiniteError as error:
        assert "ridge" in str(error)
    else:
        assert backward_error(layer, solution, layer.weight) <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kind_of_array_comes_back_as_it_went_in(backend, dtype):
    layer = random_layer(0, 4, 8, 3, condition=1e2)
    a, u, v = (backend.array(x, dtype) for x in (layer.A, layer.U, layer.weight))
    hessian, reference = RowHessian(a, u), layer.hessian
    tolerance = 1e-4 if dtype == "float32" else 1e-11
    pairs = [
        (hessian.matvec(v), reference.matvec(layer.weight)),
        (hessian.quadratic(v), reference.quadratic(layer.weight)),
        (hessian.solve(v), reference.solve(layer.weight)),
        (hessian.diagonal(), reference.diagonal()),
        (hessian.inverse_diagonal(), reference.inverse_diagonal()),
        (hessian.row(2), reference.row(2)),
    ]
    for computed, expected in pairs:
        np.testing.assert_allclose(backend.numpy(computed), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_narrow_and_integer_tensors_are_widened(dtype):
    a, v = torch.diag(torch.tensor([1, 2, 4])).to(dtype), torch.tensor([[1, 1, 2]]).to(dtype)
    assert RowHessian(a).solve(v).tolist() == [[1.0, 0.5, 0.5]]


def test_without_factors_rows_are_free():
    hessian = RowHessian(np.diag([1.0, 2.0]))
    assert (hessian.rows, hessian.columns, hessian.rank) == (None, 2, 0)
    assert hessian.diagonal().shape == hessian.inverse_diagonal().shape == (1, 2)
    for rows in (1, 5):
        np.testing.assert_array_equal(hessian.matvec(np.ones((rows, 2))), np.tile([1.0, 2.0], (rows, 1)))


def test_factors_of_rank_zero_are_none():
    hessian = RowHessian(np.eye(3), np.empty((4, 3, 0)))
    assert hessian.factors is None and hessian.rank == 0


def test_a_factor_view_of_memory_laid_out_by_factor_is_not_copied():
    memory = np.ones((2, 4, 3))
    assert np.shares_memory(RowHessian(np.eye(3), memory.transpose(1, 2, 0)).factors, memory)


def test_rounding_asymmetry_is_averaged():
    a = np.eye(2)
    a[0, 1], a[1, 0] = 0.5, 0.5 + 1e-12
    np.testing.assert_array_equal(RowHessian(a).A, RowHessian(a).A.T)


def test_no_dense_array_per_row_is_formed():
    m, d, n = 400, 100, 2
    layer = random_layer(0, m, d, n)
    hessian = layer.hessian
    hessian.solve(layer.weight)  # imports and caches are not what is measured
    tracemalloc.start()
    fresh = layer.hessian
    for method in (fresh.matvec, fresh.quadratic, fresh.solve):
        method(layer.weight)
    fresh.diagonal(), fresh.inverse_diagonal(), fresh.row(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert m * d * 8 < peak < m * d * d * 8 / 4


EYE = np.eye(3)
BAD = {
    "A a vector": (np.ones(3), None, ValueError, r"square matrix \(d, d\)"),
    "A rectangular": (np.ones((2, 3)), None, ValueError, r"square matrix \(d, d\)"),
    "A empty": (np.empty((0, 0)), None, ValueError, r"square matrix \(d, d\)"),
    "A asymmetric": (np.triu(np.ones((3, 3))), None, ValueError, r"pass \(A \+ A\.T\) / 2"),
    "A with NaN": (EYE * np.nan, None, ValueError, "NaN or infinity: look at the calibration data"),
    "A with infinity": (
        np.diag([1, 1, np.inf]),
        None,
        ValueError,
        "NaN or infinity: look at the calibration data",
    ),
    "A with both infinities": (np.diag([1, -np.inf, np.inf]), None, ValueError, "NaN or infinity"),
    "A complex": (EYE * 1j, None, TypeError, "A must hold real numbers: pass a floating-point array"),
    "A a complex tensor": (torch.eye(3) * 1j, None, TypeError, "A must hold real numbers"),
    "A of text": (np.full((3, 3), "x"), None, TypeError, "A must hold real numbers"),
    "A a list": (EYE.tolist(), None, TypeError, "convert it with numpy.asarray first"),
    "A None": (None, None, TypeError, "convert it with numpy.asarray first"),
    "A on meta": (
        torch.eye(3, device="meta"),
        None,
        ValueError,
        "meta device and holds no data: load it first",
    ),
    "U a matrix": (EYE, np.ones((2, 3)), ValueError, r"U must be \(m, d, n\) with d = 3"),
    "U with n first": (EYE, np.ones((2, 4, 3)), ValueError, r"U must be \(m, d, n\) with d = 3"),
    "U with NaN": (
        EYE,
        np.full((2, 3, 1), np.nan),
        ValueError,
        "U holds NaN or infinity: look at the gradients",
    ),
    "U without rows": (EYE, np.ones((0, 3, 1)), ValueError, "U has no rows: pass U=None"),
    "U complex": (EYE, np.ones((2, 3, 1)) * 1j, TypeError, "U must hold real numbers"),
    "U a list": (EYE, [[[1.0]] * 3], TypeError, "convert it with numpy.asarray first"),
    "U on meta": (EYE, torch.ones(2, 3, 1, device="meta"), ValueError, "load it first"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_matrices_are_refused_with_a_remedy(name):
    a, u, error, message = BAD[name]
    with pytest.raises(error, match=message):
        RowHessian(a, u)


@pytest.mark.parametrize("method", ["matvec", "quadratic", "solve"])
@pytest.mark.parametrize("shape", [(3,), (3, 3), (2, 4), (2, 3, 1)])
def test_arguments_of_the_wrong_shape_are_refused(method, shape):
    hessian = RowHessian(EYE, np.ones((2, 3, 1)))
    with pytest.raises(ValueError, match=r"expected an array of shape \(2, 3\)"):
        getattr(hessian, method)(np.ones(shape))


@pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
def test_a_problem_refuses_a_weight_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"A must be \(d, d\) and U \(m, d, n\)"):
        Problem(np.ones(shape), RowHessian(EYE, np.ones((2, 3, 1))))


def test_a_problem_refuses_a_bare_matrix():
    with pytest.raises(TypeError, match=r"write Problem\(weight, RowHessian\(A, U\)\)"):
        Problem(np.ones((2, 3)), EYE)


def test_not_positive_definite_says_the_smallest_pivot(backend):
    indefinite, rank_one, dead_input = np.diag([1.0, -2.0, 3.0]), np.ones((3, 3)), np.diag([1.0, 0.0])
    for a, pivot in [(indefinite, -2.0), (rank_one, 0.0), (dead_input, 0.0)]:
        hessian, right = RowHessian(backend.array(a)), backend.array(np.ones((1, len(a))))
        for use in (lambda: hessian.solve(right), hessian.inverse_diagonal):  # noqa: B023 - called at once
            with pytest.raises(NotPositiveDefiniteError, match="add a ridge to its diagonal") as caught:
                use()
            assert caught.value.pivot == pytest.approx(pivot, abs=1e-15)


def test_an_ill_conditioned_matrix_is_not_mistaken_for_a_singular_one():
    a = with_condition(np.random.default_rng(0), 20, 1e12)
    assert np.isfinite(RowHessian(a).inverse_diagonal()).all()


@given(st.sampled_from([2, 63, 64, 65, 130]), st.data())
def test_any_entry_may_be_the_asymmetric_one(d, data):
    i, j = data.draw(st.lists(st.integers(0, d - 1), min_size=2, max_size=2, unique=True))
    A = np.eye(d)
    A[i, j] = 0.5
    with pytest.raises(ValueError, match=r"A is not symmetric \(max \|A - A'\| = 0.5\)"):
        RowHessian(A)
