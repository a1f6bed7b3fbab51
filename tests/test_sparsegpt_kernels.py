"""The sweep's kernels: those for the CPU do what those for devices do, at chosen sizes and at random ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuda_on_host
import moonshot as ms
from moonshot.linalg.backend import native, on_host
from moonshot.linalg.cuda import UNASKED
from moonshot.solvers import sparsegpt, sparsegpt_batched, sparsegpt_cuda, sparsegpt_kernels
from strategies import random_layer

H100 = 227 * 1024  # bytes of shared memory that a thread block can have
TOLERANCE = {"float32": 2e-4, "float64": 1e-10}


def sweep_arguments(seed, m, d, n, dtype):
    """State of a sweep that has passed some columns: every argument non-trivial."""
    rng = np.random.default_rng(seed)
    layer = random_layer(seed, m, d, n, condition=10.0)
    p = rng.normal(size=(d, n, m))
    t, phi = explicit_gains(p)
    arrays = {"a": layer.weight.T, "r": np.triu(layer.A) + np.eye(d), "p": p, "t": t, "phi": phi}
    arrays["residual"] = rng.normal(size=(n, m))
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    return arrays | {"keep": rng.random((d, m)) < 0.5, "z": np.zeros((d, m), dtype)}


def explicit_gains(p):
    """t_j = T_j p_j and phi_j = 1 - p_j' t_j by the definition of T_j, one inverse each."""
    d, n, m = p.shape
    t, phi = np.empty_like(p), np.ones((d, m))
    rows = p.transpose(2, 0, 1)  # (m, d, n)
    for j in range(d):
        inverses = np.linalg.inv(np.eye(n) + rows[:, j:].transpose(0, 2, 1) @ rows[:, j:])
        t[j] = np.einsum("mkl,ml->km", inverses, rows[:, j])
        phi[j] = 1 - np.sum(p[j] * t[j], axis=0)
    return t, phi


TILED = {"p": 1, "t": 1, "phi": 1, "residual": 0}  # what comes in tiles of rows, and which axis they are


def tiled(array, lanes, axis):
    """(..., m) as (..., lanes) with the tiles as an axis of their own, zero beyond the last row."""
    tiles = -(-array.shape[-1] // lanes)
    padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, tiles * lanes - array.shape[-1])])
    return np.moveaxis(padded.reshape(*array.shape[:-1], tiles, lanes), -2, axis)


def untiled(array, m, axis):
    *others, tiles, lanes = np.moveaxis(array, axis, -2).shape
    return np.moveaxis(array, axis, -2).reshape(*others, tiles * lanes)[..., :m]


def run(kernels, function, arguments, convert, *numbers):
    """What `function` returns and every array it changed, as NumPy, without tiles."""
    names = {
        "gains": ["p"],
        "scores": ["a", "r", "p", "t", "phi", "residual"],
        "sweep": ["a", "r", "p", "t", "residual", "keep", "z"],
        "sweep_groups": ["a", "r", "p", "t", "phi", "residual", "keep", "z"],
    }[function]
    m = arguments["a"].shape[1]
    lanes = kernels.lanes(m)
    arrays = {
        name: convert(
            np.ascontiguousarray(tiled(arguments[name], lanes, TILED[name]))
            if name in TILED
            else arguments[name].copy()
        )
        for name in names
    }
    returned = getattr(kernels, function)(*arrays.values(), *numbers)
    results = dict(zip(("t", "phi"), returned, strict=True)) if function == "gains" else {"scores": returned}
    found = {
        name: np.array(x.get() if hasattr(x, "get") else x.tolist()).reshape(x.shape)
        for name, x in (arrays | results).items()
        if x is not None
    }
    return {name: untiled(x, m, TILED[name]) if name in TILED else x for name, x in found.items()}


@pytest.fixture
def batched(backend):
    """(sparsegpt_batched, what makes an array of the kind they are tried on)."""

    def convert(array):
        made = backend.array(array, str(array.dtype))
        return native(made) if backend.name == "torch-cuda" and array.dtype != bool else made

    if backend.name == "torch-cuda" and type(convert(np.ones(1))).__module__.startswith("cupy"):
        pytest.skip("CUDA tensors are computed on by CuPy here: the cupy run covers them")
    return sparsegpt_batched, convert


@pytest.fixture(params=cuda_on_host.PLACES)
def cuda(request, monkeypatch):
    """(sparsegpt_cuda, what makes arrays for them), on the CPU with so many threads in a block, or on a device."""
    convert = cuda_on_host.arrays_at(request.param, monkeypatch)
    if request.param != "device":
        monkeypatch.setattr("moonshot.linalg.cuda.shared_memory", lambda array: H100)
    return sparsegpt_cuda, convert


def assert_same(function, kernels, arguments, *numbers):
    """That `kernels`, (module, what makes arrays), do what those for the CPU do."""
    tolerance = TOLERANCE[str(arguments["a"].dtype)]
    expected = run(sparsegpt_kernels, function, arguments, np.ascontiguousarray, *numbers)
    module, convert = kernels
    computed = run(module, function, arguments, convert, *numbers)
    assert expected.keys() == computed.keys()
    for name, left in expected.items():
        right = computed[name]
        if left.dtype == bool:
            np.testing.assert_array_equal(left, right)
        else:
            np.testing.assert_allclose(right, left, rtol=tolerance, atol=tolerance)
        if name == "a":  # what is pruned is exactly zero
            np.testing.assert_array_equal(right == 0, left == 0)


@pytest.mark.fresh
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 150), st.integers(1, 5), st.floats(1e-4, 1e4)
)
def test_gains_are_what_they_are_defined_as(seed, m, d, n, share):
    p = np.random.default_rng(seed).normal(size=(d, n, m)) / share**0.5
    t, phi = explicit_gains(p * share**0.5)
    found = sparsegpt_kernels.gains(np.ascontiguousarray(tiled(p, sparsegpt_kernels.lanes(m), 1)), share)
    for left, right in zip(found, (t * share**0.5, phi), strict=True):
        np.testing.assert_allclose(untiled(left, m, 1), right, rtol=1e-9, atol=1e-11)


SPANS = [(0, 8), (4, 8), (2, 7), (3, 4)]
GROUPS = [(2, 4), (1, 4), (0, 2), (4, 4), (3, 8)]


def assert_all_same(kernels, arguments):
    """All four functions, on spans and groups of 24 columns."""
    assert_same("gains", kernels, arguments, 0.7)
    for start, stop in SPANS:
        assert_same("scores", kernels, arguments, start, stop)
        assert_same("sweep", kernels, arguments, start, stop)
    for kept, group in GROUPS:
        assert_same("sweep_groups", kernels, arguments, 8, 16, kept, group)


# A tile has 96 rows: one row, part of a tile, a lane less than one, all of one, a lane more, several and a rest.
@pytest.mark.parametrize(
    ("m", "n", "dtype"),
    [
        (1, 0, "float32"),
        (1, 4, "float64"),
        (5, 9, "float32"),
        (95, 1, "float64"),
        (96, 4, "float32"),
        (97, 0, "float64"),
        (97, 9, "float32"),
        (193, 1, "float32"),
        (193, 5, "float64"),
    ],
)
def test_chosen_sizes(batched, m, n, dtype):
    assert_all_same(batched, sweep_arguments(n, m, 24, n, dtype))


@pytest.mark.fresh
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 200) | st.sampled_from([1, 95, 96, 97, 192, 193]),
    n=st.integers(0, 12),
    dtype=st.sampled_from(["float32", "float64"]),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.floats(1e-2, 1e2),
    data=st.data(),
)
def test_random_sizes(seed, m, n, dtype, group, share, data):
    d = group * data.draw(st.integers(1, 24 // group), "groups")
    start = group * data.draw(st.integers(0, d // group - 1), "first group")
    stop = group * data.draw(st.integers(start // group + 1, d // group), "last group")
    arguments, kernels = sweep_arguments(seed, m, d, n, dtype), (sparsegpt_batched, np.ascontiguousarray)
    assert_same("gains", kernels, arguments, share)
    assert_same("scores", kernels, arguments, start, stop)
    assert_same("sweep", kernels, arguments, start, stop)
    kept = data.draw(st.integers(0, group), "kept")
    arguments = sweep_arguments(
        seed, m, d, n, "float64"
    )  # costs that float32 cannot tell apart may change places
    assert_same("sweep_groups", kernels, arguments, start, stop, kept, group)


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(0, "float64"), (1, "float32"), (9, "float32"), (9, "float64"), (16, "float32"), (8, "float64")],
)
def test_cuda(cuda, n, dtype):
    assert_all_same(cuda, sweep_arguments(n, 4, 24, n, dtype))


@pytest.mark.parametrize("n", [0, 9])
def test_a_whole_sweep_by_cuda(cuda, monkeypatch, n):
    layer = random_layer(7, 3, 40, n, condition=100.0)
    _, convert = cuda
    solver = ms.SparseGPT(block=16)
    patterns = [ms.NM(2, 4), ms.Unstructured(0.6), ms.Unstructured(0.6, scope="row")]

    def solutions(convert):
        arrays = [convert(array) for array in (layer.weight, layer.A, layer.U) if array is not None]
        problem = ms.Problem(arrays[0], ms.RowHessian(*arrays[1:]))
        return [ms.solve(problem, pattern, solver) for pattern in patterns]

    by_the_cpu = solutions(np.asarray)
    monkeypatch.setattr("moonshot.solvers.sparsegpt._kernels", lambda weight, rank: sparsegpt_cuda)
    for expected, found in zip(by_the_cpu, solutions(convert), strict=True):
        np.testing.assert_array_equal(on_host(found.mask), expected.mask)
        np.testing.assert_allclose(on_host(found.weight), expected.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "n"), [("float32", 128), ("float64", 100)])
def test_state_that_has_to_be_asked_for(cuda, dtype, n):
    assert sparsegpt_cuda.shared_bytes("gains", n, dtype) > UNASKED
    arguments = sweep_arguments(0, 2, 4, n, dtype)
    assert_same("gains", cuda, arguments, 1.5)
    assert_same("sweep_groups", cuda, arguments, 0, 4, 2, 4)


@pytest.mark.parametrize(
    ("available", "dtype", "most"),
    [(UNASKED, "float32", 105), (UNASKED, "float64", 73), (H100, "float32", 235), (H100, "float64", 165)],
)
def test_the_most_factors_that_fit(available, dtype, most):
    assert sparsegpt_cuda.fits(most, dtype, available)
    assert not sparsegpt_cuda.fits(most + 1, dtype, available)


@pytest.mark.parametrize(("n", "chosen"), [(128, sparsegpt_cuda), (240, sparsegpt_batched)])
def test_the_device_says_what_fits(monkeypatch, n, chosen):
    monkeypatch.setattr("moonshot.solvers.sparsegpt.is_numpy", lambda array: False)
    monkeypatch.setattr("moonshot.solvers.sparsegpt.is_cupy", lambda array: True)
    monkeypatch.setattr("moonshot.solvers.sparsegpt.shared_memory", lambda array: H100)
    assert sparsegpt._kernels(np.ones((2, 2), np.float32), n) is chosen


def test_what_cuda_cannot_hold_is_said(cuda, monkeypatch):
    kernels, convert = cuda
    monkeypatch.setattr("moonshot.linalg.cuda.shared_memory", lambda array: UNASKED)
    d = UNASKED // 8 + 1
    none = convert(np.zeros((d, 1, 0, 1)))
    column, keep = convert(np.zeros((d, 1))), convert(np.ones((d, 1), bool))
    with pytest.raises(ValueError, match="smaller block"):
        kernels.sweep(column, convert(np.eye(1)), none, none, none[0], keep, column, 0, d)
    with pytest.raises(ValueError, match="C order"):
        kernels.gains(convert(np.zeros((3, 4, 2, 1))).swapaxes(0, 1), 1.0)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("kernels", [sparsegpt_kernels, sparsegpt_batched])
def test_a_sweep_leaves_the_columns_outside_alone(kernels, n):
    before = sweep_arguments(1, 3, 8, n, "float64")
    after = run(kernels, "sweep", before, np.ascontiguousarray, 2, 5)
    for name in ("a", "z"):
        np.testing.assert_array_equal(
            np.delete(after[name], [2, 3, 4], 0), np.delete(before[name], [2, 3, 4], 0)
        )
        assert (after[name] != before[name]).any()
    for name in ("r", "p", "t", "keep"):
        np.testing.assert_array_equal(after[name], before[name])
