"""Products on tensor cores by parts: the arithmetic, and what cuBLAS is asked for, without a GPU."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from moonshot.linalg import split_cuda

TF32 = 3


class Array(np.ndarray):
    """A NumPy array that says where it lies as CuPy's do."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))


def cut(bits):
    """What TF32 has of float32 numbers."""
    return (bits & np.int32(-(2**13))).view(np.float32)


def parts(x):
    high = cut(np.ascontiguousarray(x).view(np.int32) + np.int32(2**12))
    return high.view(Array), (x - high).view(Array)


def beside(x, d, out):
    """The kernel of `split_cuda.beside`, as it indexes memory."""
    (high, low), flat = parts(x), out.reshape(-1)
    for i in range(x.size):
        at = i + 2 * d * (i // d)
        flat[at] = flat[at + 2 * d] = high.flat[i]
        flat[at + d] = low.flat[i]


class Cublas:
    """`sgemm` on memory of the host, as BLAS defines it; on tensor cores it cuts its arguments to TF32."""

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_POINTER_MODE_HOST = 0, 1, 0

    def __init__(self):
        self.mode, self.pointers = 0, 1

    def getMathMode(self, _):
        return self.mode

    def setMathMode(self, _, mode):
        self.mode = mode

    def getPointerMode(self, _):
        return self.pointers

    def setPointerMode(self, _, mode):
        self.pointers = mode

    def sgemm(self, _, transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
        assert (self.mode, self.pointers) == (TF32, self.CUBLAS_POINTER_MODE_HOST)
        a = self.matrix(a, lda, *((k, m) if transa else (m, k)))
        b = self.matrix(b, ldb, *((n, k) if transb else (k, n)))
        c = self.matrix(c, ldc, m, n)
        a, b = (cut(np.ascontiguousarray(x).view(np.int32)).astype("f8") for x in (a, b))
        product = (a.T if transa else a) @ (b.T if transb else b)
        kept = self.number(beta) * c if self.number(beta) else 0  # what is there may be anything
        c[...] = self.number(alpha) * product + kept

    def number(self, pointer):
        return ctypes.c_float.from_address(pointer).value

    def matrix(self, pointer, leading, rows, columns):
        """Columns one after the other, `leading` numbers apart."""
        assert leading >= rows
        size = (columns - 1) * leading + rows
        flat = np.ctypeslib.as_array((ctypes.c_float * size).from_address(pointer))
        return as_strided(flat, (rows, columns), (4, 4 * leading))


@pytest.fixture
def cublas(monkeypatch):
    found = Cublas()
    cuda = SimpleNamespace(cublas=found, get_cublas_handle=lambda: 7)
    empty = lambda shape, dtype: np.full(shape, np.nan, dtype).view(Array)  # noqa: E731
    concatenate = lambda arrays: np.concatenate(arrays).view(Array)  # noqa: E731
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, empty=empty, concatenate=concatenate))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(split_cuda, "parts", parts)
    monkeypatch.setattr(split_cuda, "kernel", lambda *_: beside)
    return found


@pytest.mark.parametrize(("d", "count", "numbers"), [(9, 4, 18), (9, 5, 10**6), (5, 1, 1), (4, 3, 8)])
def test_triangular_products(cublas, monkeypatch, d, count, numbers):
    monkeypatch.setattr(split_cuda, "_NUMBERS", numbers)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, d)).astype("f4").view(Array)
    r = np.triu(rng.normal(size=(d, d))).astype("f4").view(Array)
    found = split_cuda.triangular_product(rows, r, strip=4)
    expected = r.astype("f8") @ rows.T.astype("f8")
    size = abs(r).astype("f8") @ abs(rows).T.astype("f8")
    assert np.max(abs(found - expected) / size) < 5e-7  # TF32 alone: 1e-3
    assert (cublas.mode, cublas.pointers) == (0, 1)


@pytest.mark.parametrize(("m", "d", "numbers"), [(4, 9, 18), (5, 9, 10**6), (1, 5, 1)])
def test_products(cublas, monkeypatch, m, d, numbers):
    monkeypatch.setattr(split_cuda, "_NUMBERS", numbers)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(m, d)).astype("f4").view(Array)
    matrix = rng.normal(size=(d, d)).astype("f4").view(Array)
    found = split_cuda.product(x, split_cuda.below(matrix))
    size = abs(x).astype("f8") @ abs(matrix).astype("f8")
    assert np.max(abs(found - x.astype("f8") @ matrix.astype("f8")) / size) < 5e-7  # TF32 alone: 1e-3
    assert (cublas.mode, cublas.pointers) == (0, 1)


def test_modes_are_put_back_after_a_failure(cublas):
    with pytest.raises(KeyError), split_cuda._on_tensor_cores() as handle:
        assert (handle, cublas.mode) == (7, TF32)
        raise KeyError
    assert (cublas.mode, cublas.pointers) == (0, 1)


def test_a_number_is_the_sum_of_its_parts():
    x = np.random.default_rng(0).normal(size=1000).astype("f4") * np.logspace(-30, 30, 1000).astype("f4")
    high, low = parts(x)
    np.testing.assert_array_equal(high + low, x)
    assert (abs(low) <= abs(x) * 2.0**-11).all()
