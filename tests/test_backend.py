"""`smallest`: exactly k entries of every row, none of them larger than one that is left out; transposes in C order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonshot.linalg.backend import smallest, transposed


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
