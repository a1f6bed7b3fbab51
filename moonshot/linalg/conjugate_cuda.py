"""`ScaledQuadratic.refit` for CuPy arrays (conjugate.cu): a product and one launch for each step.

The device is asked whether any row goes on every few steps only: those of rows at rest change nothing.
"""

from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from moonshot.linalg import cuda

SOURCE = "linalg/conjugate.cu"
_THREADS = 256
_EVERY = 8  # steps between two questions


def refit(matvec: Callable[[Any], Any], pull, target, diagonal, x, mask, steps: int, hardly: float) -> Any:
    """Minimise over the support of each row, by conjugate gradients from x, which is zero outside the mask.

    matvec: the product with every row's matrix. pull, target, x: (m, d). diagonal: (m, d) or (1, d), the matrices'.
    mask: (m, d). steps: at most. hardly: the share of its loss that a row has to gain to go on.
    """
    xp = array_api_compat.array_namespace(x)
    x = xp.asarray(x, copy=True, order="C")
    pull, target, diagonal, mask = (xp.asarray(array, order="C") for array in (pull, target, diagonal, mask))
    (m, d), real = x.shape, x.dtype.type
    eps = float(xp.finfo(x.dtype).eps)
    residual, direction = xp.empty_like(x), xp.empty_like(x)
    rho, tiny, loss = (xp.empty(m, dtype=x.dtype) for _ in range(3))
    active = xp.zeros(steps, dtype=xp.int32)

    def launch(name: str, *arguments: Any) -> None:
        shared = _THREADS * x.dtype.itemsize
        compiled = options(str(x.dtype), diagonal.shape[0] == 1)
        cuda.launch(SOURCE, compiled, name, m, _THREADS, (*arguments, np.int32(d)), shared)

    state = (x, residual, direction, rho, tiny, loss)
    product = xp.asarray(matvec(x), order="C")
    launch("start", product, pull, target, mask, diagonal, *state, real(eps**1.5), real(eps**2))
    for k in range(steps):
        if k and k % _EVERY == 0 and not int(active[k - 1]):
            break
        product = xp.asarray(matvec(direction), order="C")
        launch("advance", product, mask, diagonal, *state, real(hardly), active[k:])
    return x


def options(dtype: str, shared: bool) -> tuple[str, ...]:
    """What the source is compiled with: the dtype, and whether all rows share a diagonal."""
    return (f"-DREAL={cuda.real(dtype)}", f"-DSHARED={int(shared)}")
