"""What is done to every element of CuPy arrays, in one launch."""

from functools import cache
from typing import Any


@cache
def kernel(inputs: str, outputs: str, operation: str, name: str) -> Any:
    """What computes `operation` for every element; T stands for the arrays' dtype. See cupy.ElementwiseKernel."""
    import cupy

    return cupy.ElementwiseKernel(inputs, outputs, operation, name)


def add_multiple(y: Any, x: Any, factor: float) -> None:
    """`y + factor x` in the place of y."""
    kernel("T x, T factor", "T y", "y += factor * x", "add_multiple")(x, y.dtype.type(factor), y)
