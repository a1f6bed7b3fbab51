"""Projections on a device choose what those on the CPU choose, ties and all."""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cuda_on_host
from moonshot.linalg import smallest_cuda
from moonshot.linalg.backend import on_host, smallest

NUMBERS = [0.0, -0.0, 1.0, 1.0, 2.0, -1.0, np.inf, -np.inf, 1e-45, 1e-40, 5e-324, 1e38, 1 + 2**-23, 1 + 2**-52]


@pytest.fixture(params=cuda_on_host.PLACES)
def convert(request, monkeypatch):
    """What makes arrays for the kernels, which run on the CPU with so many threads in a block, or on a device."""
    return cuda_on_host.arrays_at(request.param, monkeypatch)


def assert_same(convert, scores, k):
    found = on_host(smallest_cuda.smallest(convert(scores), k, chunk=16))
    np.testing.assert_array_equal(found, smallest(scores, k))


def drawn(seed, rows, columns, numbers, dtype):
    """Scores with as many different values as there are numbers, or all different."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(rows, columns)) ** 2 * 10.0 ** rng.integers(-30, 30, size=(rows, columns))
    with np.errstate(all="ignore"):
        return (rng.choice(numbers, size=(rows, columns)) if numbers else spread).astype(dtype)


cases = given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    columns=st.integers(65, 130),
    share=st.floats(0, 1),
    numbers=st.lists(st.sampled_from(NUMBERS), max_size=6),
    dtype=st.sampled_from(["float32", "float64"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.fresh
@cases
@example(seed=0, rows=2, columns=65, share=0.5, numbers=[0.0, -0.0], dtype="float32")
@example(seed=0, rows=1, columns=129, share=0.99, numbers=[1.0], dtype="float64")
def test_long_rows(convert, seed, rows, columns, share, numbers, dtype):
    k = 1 + int(share * (columns - 2))
    assert_same(convert, drawn(seed, rows, columns, numbers, dtype), k)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("columns", "k"), [(4, 2), (8, 5), (64, 33)])
def test_short_rows(convert, dtype, columns, k):
    for numbers in ([], NUMBERS, [0.0, -0.0], [1.0, 2.0]):
        assert_same(convert, drawn(columns, 45, columns, numbers, dtype), k)


def test_views_that_are_not_in_order(convert):
    scores = drawn(1, 70, 3, [], "float32")
    found = on_host(smallest_cuda.smallest(convert(scores).T, 20))
    np.testing.assert_array_equal(found, smallest(scores.T, 20))


def test_more_rows_than_fit_at_once(convert, monkeypatch):
    monkeypatch.setattr(smallest_cuda, "_ROWS", 2)
    assert_same(convert, drawn(2, 5, 70, [0.0, 1.0, 2.0], "float32"), 30)
