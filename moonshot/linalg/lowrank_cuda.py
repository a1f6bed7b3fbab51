"""Products with every row's factors, for CuPy arrays (lowrank.cu): one launch for all factors."""

import array_api_compat
import numpy as np

from moonshot.linalg import cuda

SOURCE = "linalg/lowrank.cu"
_THREADS, _MOST = 256, 1024
_LONG = 1024  # columns of a long row
_COLUMNS = 32  # of a row that `gram` has in shared memory at once


def project(factors, x, scale=None):
    """`U_i' S x_i` for every row, (n, m); factors: (n, m, d); x: (m, d); S = diag(scale), (d,), None for I."""
    n, m, d = factors.shape
    xp = array_api_compat.array_namespace(x)
    out = xp.empty((n, m), dtype=x.dtype)
    _launch("project", n * m, (factors, x), scale, out, (m, d), x.dtype.itemsize * _THREADS)
    return out


def add_combined(y, factors, coefficients, scale=None):
    """Add `S U_i c_i` to every row of y (m, d), in place; factors: (n, m, d); coefficients: (n, m)."""
    n, m, d = factors.shape
    _launch("combine", m, (factors, coefficients), scale, y, (n, m, d))


def add_applied(y, factors, x, scale=None):
    """Add `S U_i U_i' S x_i` to every row of y (m, d), in place; factors: (n, m, d); x: (m, d)."""
    n, m, d = factors.shape
    threads = _for_rows(d)
    _launch("apply", m, (factors, x), scale, y, (n, m, d), y.dtype.itemsize * (threads + n), threads)


def refresh(factors, x, scale, inverses, coefficients):
    """`lowrank.refresh` in one launch; coefficients must be in C order."""
    n, m, d = factors.shape
    xp = array_api_compat.array_namespace(x)
    assert coefficients.flags.c_contiguous
    out = xp.empty_like(x, order="C")
    threads = _for_rows(d)
    shared = x.dtype.itemsize * (threads + 2 * n)
    _launch("refresh", m, (factors, x, inverses, coefficients), scale, out, (n, m, d), shared, threads)
    return out


def gram(p):
    """`P_i' P_i` for every row, (m, n, n), of P by column: (d, m, n), in C order. Only what `gram_fits`."""
    d, m, n = p.shape
    out, dtype = array_api_compat.array_namespace(p).empty((m, n, n), dtype=p.dtype), str(p.dtype)
    sizes = map(np.int32, (_COLUMNS, n, m, d))
    shared = _gram_bytes(n, dtype)
    cuda.launch(SOURCE, options(dtype, dtype, False), "gram", m, _THREADS, (p, out, *sizes), shared)
    return out


def gram_fits(rank: int, dtype: str, available: int) -> bool:
    """Whether so many factors fit into so many bytes of shared memory."""
    return _gram_bytes(rank, dtype) <= available


def _gram_bytes(rank: int, dtype: str) -> int:
    return np.dtype(dtype).itemsize * rank * (rank + _COLUMNS)


def add_diagonal(y, factors, scale=None):
    """Add the diagonal of `S U_i U_i' S` to every row of y (m, d), in place; factors: (n, m, d)."""
    n, m, d = factors.shape
    _launch("diagonal", m, (factors,), scale, y, (n, m, d))


def _for_rows(d: int) -> int:
    """Threads for a row of d that read its factors twice: so many that only few rows have theirs in the cache."""
    return _THREADS if d < _LONG else _MOST


def _launch(
    name: str,
    blocks: int,
    arrays,
    scale,
    out,
    sizes: tuple[int, ...],
    shared: int = 0,
    threads: int = _THREADS,
) -> None:
    """Run a kernel on arrays, scale, `out`, which is changed in place and must be in C order, and sizes."""
    xp = array_api_compat.array_namespace(out)
    assert out.flags.c_contiguous
    arguments = [xp.asarray(array, order="C") for array in (*arrays, out if scale is None else scale)]
    compiled = options(str(arrays[0].dtype), str(out.dtype), scale is not None)
    cuda.launch(SOURCE, compiled, name, blocks, threads, (*arguments, out, *map(np.int32, sizes)), shared)


def options(factors: str, dtype: str, scaled: bool) -> tuple[str, ...]:
    """What the source is compiled with: the factors' dtype, that of all else, and whether there is a scale."""
    return (f"-DFACTOR={cuda.real(factors)}", f"-DREAL={cuda.real(dtype)}", f"-DSCALED={int(scaled)}")
