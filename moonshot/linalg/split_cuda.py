"""float32 products of CuPy arrays on tensor cores, which multiply TF32: 8 bits of exponent and 11 of the number.

Each factor is the sum of two that TF32 holds, up to 2^-21 of it. Of the four products the one of both second parts is
no more than that, and is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from moonshot.linalg.elementwise_cuda import kernel

_LEAST = 512  # columns from which three products on tensor cores are faster than one without
_TF32 = 3  # cuBLAS's CUBLAS_TF32_TENSOR_OP_MATH, which CuPy has no name for
_CAPABILITY = 80  # Ampere, the first with TF32
_NUMBERS = 2**27  # whose parts are there at once
_HIGH = "__int_as_float((__float_as_int(x) + 0x1000) & 0xffffe000)"  # x rounded to 11 bits
_ZERO, _ONE = (np.full(1, value, dtype=np.float32) for value in (0, 1))


def parts(x: Any) -> tuple[Any, Any]:
    """x, float32, as a sum: rounded to 11 bits, and the rest."""
    operation = f"high = {_HIGH}; low = x - high"
    return kernel("float32 x", "float32 high, float32 low", operation, "tf32_parts")(x)


def possible(matrix: Any) -> bool:
    """Whether products with a square matrix are made so."""
    large = str(matrix.dtype) == "float32" and len(matrix) >= _LEAST
    return large and int(matrix.device.compute_capability) >= _CAPABILITY


def below(matrix: Any) -> Any:
    """(3 d, d): second parts of a matrix (d, d), and below them twice the first, as `product` takes it."""
    import cupy

    high, low = parts(matrix)
    return cupy.concatenate((low, high, high))


def beside(x: Any) -> Any:
    """(m, 3 d): first parts of x (m, d), in C order, and beside them the second, and the first again."""
    import cupy

    m, d = x.shape
    out = cupy.empty((m, 3 * d), dtype=x.dtype)
    operation = f"""
        const float high = {_HIGH};
        const ptrdiff_t at = i + 2 * d * (i / d);
        out[at] = out[at + 2 * d] = high;
        out[at + d] = x - high;
    """
    kernel("float32 x, int64 d", "raw float32 out", operation, "tf32_beside")(x, d, out)
    return out


def product(x: Any, matrix: Any) -> Any:
    """`x M`, (m, d); x: (m, d) in C order; matrix: `below(M)`. One product of three times as many columns."""
    import cupy
    from cupy.cuda import cublas

    m, d = x.shape
    out = cupy.empty((m, d), dtype=x.dtype)
    step = max(_NUMBERS // d, 1)
    with _on_tensor_cores() as handle:
        for first in range(0, m, step):
            rows = beside(x[first : first + step])
            cublas.sgemm(  # which has columns one after the other, and so reads and writes transposes
                *(handle, cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_N, d, len(rows), 3 * d, _ONE.ctypes.data),
                *(matrix.data.ptr, d, rows.data.ptr, 3 * d, _ZERO.ctypes.data, _address(out, first, 0), d),
            )
    return out


def triangular_product(rows: Any, r: Any, strip: int) -> Any:
    """`R X`, (d, k), for an upper triangular R (d, d) and the columns of X (d, k) as rows (k, d), all in C order.

    strip: rows of R multiplied at once.
    """
    import cupy
    from cupy.cuda import cublas

    (count, d), (r_high, r_low) = rows.shape, parts(r)
    out = cupy.empty((d, count), dtype=rows.dtype)
    step = max(_NUMBERS // d, 1)
    with _on_tensor_cores() as handle:
        for first in range(0, count, step):
            high, low = parts(rows[first : first + step])
            for start in range(0, d, strip):
                m, n, k = len(high), min(strip, d - start), d - start
                into = _address(out, start, first)
                for x, factor, beta in ((high, r_low, _ZERO), (low, r_high, _ONE), (high, r_high, _ONE)):
                    read = _address(x, 0, start), d, _address(factor, start, start), d
                    cublas.sgemm(
                        *(handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, m, n, k, _ONE.ctypes.data),
                        *(*read, beta.ctypes.data, into, count),
                    )
    return out


def _address(array: Any, row: int, column: int) -> int:
    """Where an element of a matrix in C order lies."""
    return array.data.ptr + array.itemsize * (row * array.shape[1] + column)


@contextmanager
def _on_tensor_cores() -> Iterator[int]:
    """Products of float32 are of TF32 inside; yields the handle of cuBLAS, which reads scalars from the host."""
    from cupy.cuda import cublas, get_cublas_handle

    handle = get_cublas_handle()
    mode, pointers = cublas.getMathMode(handle), cublas.getPointerMode(handle)
    cublas.setMathMode(handle, _TF32)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    try:
        yield handle
    finally:
        cublas.setMathMode(handle, mode)
        cublas.setPointerMode(handle, pointers)
