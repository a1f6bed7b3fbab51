"""`smallest`: exactly k entries of every row, none larger than one left out; transposes in C order; devices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moonshot.layer.objectives import Reconstruction
from moonshot.linalg.backend import computing_on, smallest, transposed
from moonshot.solvers import ADMM, solve


def assert_smallest(scores, mask, k):
    k = min(max(k, 0), scores.shape[1])
    assert mask.dtype == bool and mask.shape == scores.shape
    assert (mask.sum(axis=1) == k).all()
    for row, chosen in zip(scores, mask, strict=True):
        if 0 < k < len(row):
            assert row[chosen].max() <= row[~chosen].min()


@pytest.mark.fresh
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(-1, 41),
    st.sampled_from([2, 5, 10**6]),
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exactly_k_of_every_row_ties_included(dtype, seed, rows, columns, k, values):
    scores = np.random.default_rng(seed).integers(0, values, (rows, columns)).astype(dtype)
    before = scores.copy()
    mask = smallest(scores, k)
    assert_smallest(scores, mask, k)
    np.testing.assert_array_equal(scores, before)
    np.testing.assert_array_equal(smallest(scores, k), mask)


def test_on_every_backend(backend):
    for columns in (4, 40):
        scores = np.random.default_rng(0).integers(0, 3, (7, columns)).astype(float)
        for k in (1, 2, 3):
            assert_smallest(scores, backend.numpy(smallest(backend.array(scores), k)), k)


@pytest.mark.parametrize("columns", [4, 40])
def test_infinity_is_a_score(columns):
    scores = np.full((2, columns), np.inf)
    scores[0, 1], scores[1, 2] = -np.inf, 0
    for k in range(columns + 1):
        assert_smallest(scores, smallest(scores, k), k)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool"])
def test_a_transpose_in_c_order(backend, dtype):
    for shape in [(1, 1), (3, 200), (64, 64), (65, 63), (130, 1), (0, 4)]:
        array = np.random.default_rng(0).integers(0, 2, shape)
        found = backend.numpy(transposed(backend.array(array, dtype)))
        assert found.flags.c_contiguous and str(found.dtype) == dtype
        np.testing.assert_array_equal(found, array.astype(dtype).T)
        strided = np.repeat(array.astype(dtype), 2, axis=1)[:, ::2]
        np.testing.assert_array_equal(transposed(strided), strided.T)


def test_computing_on_a_device_leaves_no_autocast_and_no_tf32():
    a = torch.rand(8, 8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (a @ a).dtype == torch.bfloat16
            with computing_on(a):
                assert (a @ a).dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
            assert (a @ a).dtype == torch.bfloat16 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_arrays_of_another_device_are_computed_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    x, weight = torch.rand(40, 8, device="cuda:1"), torch.rand(4, 8, device="cuda:1")
    problem = Reconstruction().problem(weight, inputs=x)
    result = solve(problem, "2:4", ADMM())
    assert result.weight.device == weight.device
    plain = Reconstruction().problem(weight.cpu(), inputs=x.cpu())
    assert result.value == pytest.approx(solve(plain, "2:4", ADMM()).value, rel=0.05)
