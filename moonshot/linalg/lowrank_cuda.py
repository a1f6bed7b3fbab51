"""Products with every row's factors, for CuPy arrays (lowrank.cu): one launch for all factors."""

import array_api_compat
import numpy as np

from moonshot.linalg import cuda

SOURCE = "linalg/lowrank.cu"
_THREADS = 256


def project(factors, x):
    """`U_i' x_i` for every row, (n, m); factors: (n, m, d); x: (m, d)."""
    n, m, d = factors.shape
    xp = array_api_compat.array_namespace(x)
    out = xp.empty((n, m), dtype=x.dtype)
    _launch("project", n * m, (factors, x, out), (m, d), x.dtype.itemsize * _THREADS)
    return out


def combine(factors, coefficients):
    """`U_i c_i` for every row, (m, d); factors: (n, m, d); coefficients: (n, m)."""
    n, m, d = factors.shape
    xp = array_api_compat.array_namespace(coefficients)
    out = xp.empty((m, d), dtype=coefficients.dtype)
    _launch("combine", m, (factors, coefficients, out), (n, m, d), 0)
    return out


def _launch(name: str, blocks: int, arrays, sizes: tuple[int, ...], shared: int) -> None:
    xp = array_api_compat.array_namespace(*arrays)
    arguments = [xp.asarray(array, order="C") for array in arrays] + [np.int32(size) for size in sizes]
    compiled = options(str(arrays[0].dtype), str(arrays[1].dtype))
    cuda.launch(SOURCE, compiled, name, blocks, _THREADS, tuple(arguments), shared)


def options(factors: str, dtype: str) -> tuple[str, ...]:
    """What the source is compiled with: the factors' dtype, and that of all else."""
    return (f"-DFACTOR={cuda.real(factors)}", f"-DREAL={cuda.real(dtype)}")
