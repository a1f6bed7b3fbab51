"""From whatever array a caller has to one that is computed on, and back.

A computation runs on NumPy for everything on the CPU, and on CuPy for everything on a CUDA device;
a CUDA torch tensor stays torch where CuPy is not installed. Conversions share memory (DLPack)
wherever the dtype allows it. torch and CuPy are never imported for somebody who did not bring them.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np
import scipy  # whose linalg is imported where it is first used

from moonshot.errors import ArgumentError, ArgumentTypeError
from moonshot.linalg.streams import beside_torch

Array = Any  # a NumPy, CuPy or torch array

namespace = array_api_compat.array_namespace

_FEW = 16  # columns that are ranked by comparing all pairs


def native(array: Array, name: str = "array") -> Array:
    """`array` as it is computed on: NumPy on the CPU, CuPy (or torch) on a CUDA device.

    float32 and float64 share memory with the argument; float16 and bfloat16 become float32, integers and longer floats
    float64, and bytes have the machine's order. TypeError for what is no array, sparse or not real.
    """
    if array_api_compat.is_torch_array(array):
        tensor = array.detach()
        if tensor.is_meta:
            raise ArgumentError(f"{name} is on the meta device and holds no data: load it first")
        if tensor.layout != sys.modules["torch"].strided:
            raise ArgumentTypeError(f"{name} is a sparse tensor: call {name}.to_dense() first")
        if not tensor.is_floating_point():
            _require_real(name, complex_=tensor.is_complex())
            tensor = tensor.double()
        elif tensor.element_size() < 4:
            tensor = tensor.float()
        if tensor.device.type == "cpu":
            return tensor.numpy()
        return _to_cupy(tensor)
    if not (array_api_compat.is_numpy_array(array) or array_api_compat.is_cupy_array(array)):
        raise ArgumentTypeError(
            f"{name} must be a NumPy, CuPy or torch array, got {type(array).__name__}: "
            "convert it with numpy.asarray first"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise ArgumentTypeError(f"{name} is a masked array: fill it first, such as with {name}.filled(0)")
    if isinstance(array, np.ndarray):
        array = np.asarray(array)  # a matrix, whose * is another
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind != "f":
        _require_real(name, complex_=array.dtype.kind not in "iub")
        return array.astype(np.float64)
    if array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):  # what is infinite then is found
            return array.astype(np.float64)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _require_real(name: str, complex_: bool) -> None:
    if complex_:
        raise ArgumentTypeError(f"{name} must hold real numbers: pass a floating-point array")


def _to_cupy(tensor: Array) -> Array:
    cupy = _cupy() if tensor.device.type == "cuda" else None
    return tensor if cupy is None else cupy.from_dlpack(tensor)


def _cupy() -> ModuleType | None:
    try:
        import cupy
    except ImportError:
        return None
    return cupy


@contextmanager
def computing_on(array: Array) -> Iterator[None]:
    """Inside, new arrays are on the device of `array`, and products have all the digits of their dtype.

    CuPy makes arrays on its current device, wherever those are that it computes with; torch rounds float32 where
    autocast or TF32 is on. For a CUDA torch tensor CuPy shares torch's stream and memory (`streams.beside_torch`).
    What overflows is looked for in the results, so NumPy does not warn of it.
    """
    with ExitStack() as stack:
        stack.enter_context(np.errstate(over="ignore", divide="ignore", invalid="ignore"))
        if is_cupy(array):
            stack.enter_context(array.device)
        elif array_api_compat.is_torch_array(array) and array.device.type in ("cpu", "cuda"):
            torch = sys.modules["torch"]
            stack.enter_context(torch.autocast(array.device.type, enabled=False))
            if (precision := torch.get_float32_matmul_precision()) != "highest":
                torch.set_float32_matmul_precision("highest")
                stack.callback(torch.set_float32_matmul_precision, precision)
            if array.device.type == "cuda":
                stack.enter_context(torch.cuda.device(array.device))
                if cupy := _cupy():
                    stack.enter_context(beside_torch(cupy, array.device))
        yield


def like(result: Array, original: Array) -> Array:
    """`result` of a computation as the kind of array, on the device, that `original` is.

    The dtype is that of `result`; see `cast_like` for the dtype too.
    """
    if not array_api_compat.is_torch_array(original) or array_api_compat.is_torch_array(result):
        return result
    torch = sys.modules["torch"]
    if array_api_compat.is_numpy_array(result):
        return torch.from_numpy(np.ascontiguousarray(result)).to(original.device)
    return torch.from_dlpack(result)


def cast_like(result: Array, original: Array) -> Array:
    """`result` as the kind, device and, where `original` is floating, the dtype of `original`.

    What that dtype cannot hold becomes infinite.
    """
    converted = like(result, original)
    if array_api_compat.is_torch_array(original):
        return converted.to(original.dtype) if original.is_floating_point() else converted
    with np.errstate(over="ignore"):
        return converted.astype(original.dtype) if original.dtype.kind == "f" else converted


def is_numpy(array: Array) -> bool:
    return array_api_compat.is_numpy_array(array)


def is_cupy(array: Array) -> bool:
    return array_api_compat.is_cupy_array(array)


def as_dtype(array: Array, dtype: str) -> Array:
    """`array` in "float32" or "float64", without a copy where it is that already."""
    xp = namespace(array)
    return xp.astype(array, getattr(xp, dtype), copy=False)


def dtype_name(array: Array) -> str:
    """ "float32", or what else the dtype is called."""
    return str(array.dtype).removeprefix("torch.")


def asarray_like(values: Array, reference: Array) -> Array:
    """A NumPy array moved to the namespace and device of `reference`."""
    if is_numpy(reference):
        return np.asarray(values)
    xp = namespace(reference)
    return xp.asarray(values, device=array_api_compat.device(reference))


def on_host(array: Array) -> np.ndarray:
    """`array` as NumPy, copied from its device if it is on one."""
    if array_api_compat.is_torch_array(array):
        return array.cpu().numpy()
    return array if is_numpy(array) else array.get()


def zeros_like_shape(reference: Array, shape: tuple[int, ...]) -> Array:
    """Zeros of a shape, in the dtype and on the device of `reference`."""
    xp = namespace(reference)
    return xp.zeros(shape, dtype=reference.dtype, device=array_api_compat.device(reference))


def contiguous(array: Array) -> Array:
    """`array` in C order, without a copy where it is that already."""
    if array_api_compat.is_torch_array(array):
        return array.contiguous()
    return namespace(array).asarray(array, order="C")


def squares(x: Array) -> Array:
    """x^2 in a unit in which the largest is between a quarter and one: no square of a float32 is too large or small."""
    return (x / unit(x)) ** 2


def unit(x: Array) -> float:
    """The power of two in which the largest `|x|` is between a half and one; dividing by it rounds nothing."""
    return 2.0 ** math.frexp(largest(x))[1]


def largest(x: Array) -> float:
    """The largest `|x|`, without an array of them."""
    xp = namespace(x)
    return float(xp.maximum(xp.max(x), -xp.min(x)))


def transposed(array: Array) -> Array:
    """The transpose of a matrix, in C order."""
    if is_numpy(array):
        from moonshot.linalg import kernels

        return kernels.transposed(array)
    return contiguous(array.T)


def add_multiple(y: Array, x: Array, factor: float) -> None:
    """`y + factor x` in the place of y; both (m, d)."""
    if is_numpy(y):
        from moonshot.linalg import kernels

        kernels.add_multiple(y, x, y.dtype.type(factor))
    elif is_cupy(y):
        from moonshot.linalg import elementwise_cuda

        elementwise_cuda.add_multiple(y, x, factor)
    else:
        y += factor * x


def eye_like(reference: Array, n: int) -> Array:
    xp = namespace(reference)
    return xp.eye(n, dtype=reference.dtype, device=array_api_compat.device(reference))


def all_finite(array: Array) -> bool:
    """Whether an array holds neither NaN nor infinity: a sum is not finite if a summand is not."""
    xp = namespace(array)
    with np.errstate(all="ignore"):
        if math.isfinite(float(xp.sum(array))):
            return True
    return bool(xp.all(xp.isfinite(array)))  # the sum of finite numbers may be infinite


def smallest(scores: Array, k: int) -> Array:
    """Boolean mask of exactly k smallest entries of each row of `scores` (rows, columns).

    Of equals the first count, in NumPy and in CuPy; in torch ties are broken the same way at every call.
    """
    xp = namespace(scores)
    if k <= 0:
        return xp.zeros_like(scores, dtype=xp.bool)
    if k >= scores.shape[1]:
        return xp.ones_like(scores, dtype=xp.bool)
    if array_api_compat.is_torch_array(scores):
        chosen = scores.topk(k, dim=1, largest=False, sorted=False).indices
        return xp.zeros_like(scores, dtype=xp.bool).scatter_(1, chosen, True)
    if is_numpy(scores):
        return _smallest_on_host(scores, k)
    from moonshot.linalg import smallest_cuda

    return smallest_cuda.smallest(scores, k)


def _smallest_on_host(scores: np.ndarray, k: int) -> np.ndarray:
    """`smallest` by values: a partition without indices is several times as fast. The first of equals count."""
    if scores.shape[1] <= _FEW:
        from moonshot.linalg import kernels

        return kernels.smallest_of_few(scores, k)
    threshold = np.partition(scores, k - 1, axis=1)[:, k - 1 : k]
    mask, equal = scores < threshold, scores == threshold
    missing = k - mask.sum(axis=1)
    exact = equal.sum(axis=1) == missing
    mask[exact] |= equal[exact]
    for row in np.flatnonzero(~exact):
        mask[row, np.flatnonzero(equal[row])[: missing[row]]] = True
    return mask


def triangular_solve(factor: Array, b: Array, *, lower: bool) -> Array:
    """X with `factor X = b`, for one triangular matrix or a batch of them."""
    if is_numpy(factor) and factor.ndim == 2:
        return scipy.linalg.solve_triangular(factor, b, lower=lower, check_finite=False)
    xp = namespace(factor)
    if array_api_compat.is_torch_array(factor):
        return sys.modules["torch"].linalg.solve_triangular(factor, b, upper=not lower)
    if factor.ndim == 2:
        import cupyx.scipy.linalg

        return cupyx.scipy.linalg.solve_triangular(factor, b, lower=lower)
    return xp.linalg.solve(factor, b)
