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


def parts(x: Any) -> tuple[Any, Any]:
    """x, float32, as a sum: rounded to 11 bits, and the rest."""
    operation = "high = __int_as_float((__float_as_int(x) + 0x1000) & 0xffffe000); low = x - high"
    return kernel("float32 x", "float32 high, float32 low", operation, "tf32_parts")(x)


def possible(matrix: Any) -> bool:
    """Whether products with a square matrix are made so."""
    large = str(matrix.dtype) == "float32" and len(matrix) >= _LEAST
    return large and int(matrix.device.compute_capability) >= _CAPABILITY


def product(x: Any, matrix: tuple[Any, Any]) -> Any:
    """`x M`, (m, d); x: (m, d) in C order; matrix: the parts of M (d, d)."""
    import cupy
    from cupy.cublas import gemm

    (high, low), (m_high, m_low) = parts(x), matrix
    out = cupy.empty_like(x, order="C")
    with _on_tensor_cores():
        gemm("N", "N", high, m_low, out)
        gemm("N", "N", low, m_high, out, beta=1.0)
        gemm("N", "N", high, m_high, out, beta=1.0)
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
    zero, one = (np.full(1, value, dtype=np.float32) for value in (0, 1))

    def at(array: Any, row: int, column: int) -> int:
        return array.data.ptr + array.itemsize * (row * array.shape[1] + column)

    with _on_tensor_cores() as handle:
        for first in range(0, count, step):
            high, low = parts(rows[first : first + step])
            for start in range(0, d, strip):
                m, n, k = len(high), min(strip, d - start), d - start
                into = at(out, start, first)
                for x, factor, beta in ((high, r_low, zero), (low, r_high, one), (high, r_high, one)):
                    cublas.sgemm(  # which has columns one after the other, and so reads and writes transposes
                        *(handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, m, n, k, one.ctypes.data),
                        *(at(x, 0, start), d, at(factor, start, start), d, beta.ctypes.data, into, count),
                    )
    return out


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
