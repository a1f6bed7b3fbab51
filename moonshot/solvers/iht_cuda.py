"""The steps of IHT for CuPy arrays (iht.cu), one launch each; iht_steps says what they compute."""

from typing import Any

import array_api_compat
import numpy as np

from moonshot.linalg import cuda
from moonshot.linalg.conjugate_cuda import options

SOURCE = "solvers/iht.cu"
_THREADS = 256


def descended(x, gradient, step, diagonal):
    xp = array_api_compat.array_namespace(x)
    y, scores = xp.empty(x.shape, dtype=x.dtype), xp.empty(x.shape, dtype=x.dtype)
    _launch("descended", x, (x, gradient, step, diagonal), (y, scores), diagonal.shape[0] == 1)
    return y, scores


def restricted(y, mask, before):
    changed = array_api_compat.array_namespace(y).empty(len(y), dtype=bool)
    _launch("restricted", y, (mask, before), (y, changed))
    return y, changed


def compared(x, gradient, to, product, pull):
    rise = array_api_compat.array_namespace(x).empty(len(x), dtype=x.dtype)
    _launch("compared", x, (x, gradient, to, pull), (product, rise))
    return product, rise


def taken(lower, moved, here, there, step, factors):
    xp, real = array_api_compat.array_namespace(step), step.dtype.type
    (x, gradient, mask), (to, gradient_there, mask_there) = here, there
    mask_taken, following = xp.empty(mask.shape, dtype=bool), xp.empty(step.shape, dtype=step.dtype)
    read = (lower, moved, x, gradient, mask, mask_there, step, *map(real, factors))
    _launch("taken", x, read, (to, gradient_there, mask_taken, following))
    return to, gradient_there, mask_taken, following


def _launch(name: str, x, read: tuple[Any, ...], written: tuple[Any, ...], shared: bool = True) -> None:
    """Run a kernel on the rows of x (m, d). shared: whether all of them have one diagonal.

    read: arrays and numbers; written: arrays in C order, which are changed in place.
    """
    xp, (m, d) = array_api_compat.array_namespace(x), x.shape
    assert all(array.flags.c_contiguous for array in written)
    given = [each if np.isscalar(each) else xp.asarray(each, order="C") for each in read]
    sums = _THREADS * x.dtype.itemsize
    cuda.launch(
        SOURCE,
        options(str(x.dtype), shared),
        name,
        m,
        _THREADS,
        (*given, *written, np.int32(d)),
        sums,
    )
