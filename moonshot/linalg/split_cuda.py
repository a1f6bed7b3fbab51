"""float32 products of CuPy arrays on tensor cores, which multiply TF32: 8 bits of exponent and 11 of the number.

Each factor is the sum of two that TF32 holds, the second up to 2^-22 of the whole. Of the four products the one of both
second parts is less than that, and is left out. What the others lack is about as much as float32 itself rounds off.
"""

from typing import Any

from moonshot.linalg.elementwise_cuda import kernel

_LEAST = 512  # columns from which three products on tensor cores are faster than one without
_TF32 = 3  # cuBLAS's CUBLAS_TF32_TENSOR_OP_MATH, which CuPy has no name for
_CAPABILITY = 80  # Ampere, the first with TF32


def parts(x: Any) -> tuple[Any, Any]:
    """x, float32, as a sum: its leading 11 bits, and the rest."""
    operation = "high = __int_as_float(__float_as_int(x) & 0xffffe000); low = x - high"
    return kernel("float32 x", "float32 high, float32 low", operation, "tf32_parts")(x)


def possible(matrix: Any) -> bool:
    """Whether products with a square matrix are made so."""
    large = str(matrix.dtype) == "float32" and len(matrix) >= _LEAST
    return large and int(matrix.device.compute_capability) >= _CAPABILITY


def product(x: Any, matrix: tuple[Any, Any]) -> Any:
    """`x M`, (m, d); x: (m, d) in C order; matrix: the parts of M (d, d)."""
    import cupy
    from cupy.cublas import gemm
    from cupy.cuda import cublas

    (high, low), (m_high, m_low) = parts(x), matrix
    out = cupy.empty_like(x, order="C")
    handle = cupy.cuda.get_cublas_handle()
    before = cublas.getMathMode(handle)
    cublas.setMathMode(handle, _TF32)
    try:
        gemm("N", "N", high, m_low, out)
        gemm("N", "N", low, m_high, out, beta=1.0)
        gemm("N", "N", high, m_high, out, beta=1.0)
    finally:
        cublas.setMathMode(handle, before)
    return out
