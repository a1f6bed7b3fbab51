"""The steps of IHT on a GPU, or its kernels on the CPU, against those of arrays."""

from functools import partial

import numpy as np
import pytest

import cuda_on_host
from moonshot.linalg.backend import on_host
from moonshot.solvers.iht_steps import compared, descended, restricted, taken

M, D = 7, 50
rng = np.random.default_rng(0)
X, GRADIENT, TO, PRODUCT, PULL = rng.normal(size=(5, M, D))
STEP = rng.uniform(0.1, 4, size=(M, 1))
MASK, THERE = rng.random((2, M, D)) < 0.5
THERE[:3] = MASK[:3]
LOWER, MOVED = np.arange(M) % 2 == 0, np.arange(M) % 3 != 0
CALLS = {
    "descended": (descended, (X, GRADIENT, STEP, rng.uniform(0.5, 2, size=(M, D)))),
    "descended, one diagonal": (descended, (X, GRADIENT, STEP, rng.uniform(0.5, 2, size=(1, D)))),
    "restricted": (restricted, (X, THERE, MASK)),
    "compared": (compared, (X, GRADIENT, TO, PRODUCT, PULL)),
    "taken": (
        partial(taken, factors=(1.25, 0.7)),
        (LOWER, MOVED, (X, GRADIENT, MASK), (TO, PRODUCT, THERE), STEP),
    ),
}
OVERWRITTEN = {"restricted": {0}, "compared": {3}, "taken": {3}}  # which arguments may be
SAME = dict(float32=1e-5, float64=1e-12)


def arguments(given, convert, dtype):
    """Copies, numbers in this dtype."""
    if isinstance(given, tuple):
        return tuple(arguments(each, convert, dtype) for each in given)
    return convert(given.copy() if given.dtype == bool else given.astype(dtype))


def assert_same(found, expected, rtol):
    if isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, rtol)
    else:
        assert on_host(found).dtype == expected.dtype
        np.testing.assert_allclose(on_host(found), expected, rtol, atol=rtol)


@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("place", cuda_on_host.PLACES)
def test_a_step(place, name, dtype, monkeypatch):
    step, given = CALLS[name]
    expected = step(*arguments(given, np.array, dtype))
    convert = cuda_on_host.arrays_at(place, monkeypatch)
    monkeypatch.setattr("moonshot.solvers.iht_steps.is_cupy", lambda array: True)
    passed = arguments(given, convert, dtype)
    assert_same(step(*passed), expected, SAME[dtype])
    for k, (each, before) in enumerate(zip(passed, arguments(given, np.array, dtype), strict=True)):
        if k not in OVERWRITTEN.get(name, ()):
            assert_same(each, before, 0)
    if name == "taken":  # a pattern may give the same mask at every call
        assert_same(passed[3][2], THERE, 0)
