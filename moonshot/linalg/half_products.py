"""Products of bfloat16 tensors on a GPU's tensor cores: every product is exact, and their sums are float32.

torch has them for CUDA tensors since 2.8. Half precision in float32 is as exact, for about ten times the time.
"""

import sys
from typing import Any

import array_api_compat

Tensor = Any  # of torch, which somebody else has imported

_PARTS = 3  # bfloat16 numbers that add up to a float32


def possible(*arrays: Any) -> bool:
    """Whether these are arrays that `product` can multiply."""
    return all(array_api_compat.is_torch_array(array) and _is_suited(array) for array in arrays)


def _is_suited(tensor: Tensor) -> bool:
    torch = sys.modules["torch"]
    return tensor.is_cuda and tensor.dtype == torch.bfloat16 and "dtype" in torch.ops.aten.mm.overloads()


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, (m, n), in float32; a: (m, k), b: (k, n)."""
    return _mm(a, b)


def gram(x: Tensor, gradients: Tensor | None = None) -> Tensor:
    """`X' S X`, (d, d), in float32; x: (tokens, d); S the diagonal of each token's mean squared gradient.

    gradients: (tokens, m), None for S = I. A row of S X is no bfloat16, but the sum of three that have all its digits.
    """
    if gradients is None:
        return _mm(x.T, x)
    rest = x.float() * gradients.float().square().mean(1)[:, None]
    total = 0
    for _ in range(_PARTS):
        part = rest.to(x.dtype)
        rest -= part
        total = total + _mm(x.T, part)
    return total


def _mm(a: Tensor, b: Tensor) -> Tensor:
    torch = sys.modules["torch"]
    return torch.mm(a, b, out_dtype=torch.float32)
