"""The sequential sweep's inner loops for CuPy arrays: every row is one thread block (sparsegpt.cu).

`sparsegpt_batched` has the same functions, with the same arguments, for any device; its docstrings hold the
mathematics. There each step of the sweep is several launches over all rows, here the whole of it is one. A tile is
one row. A row's n x n state, the columns of its block, and p and t of a few of them are in shared memory, of which
`gains` needs most.
"""

from typing import Any

import numpy as np

from moonshot.errors import ArgumentError
from moonshot.linalg import cuda
from moonshot.linalg.backend import Array, dtype_name, namespace

SOURCE = "solvers/sparsegpt.cu"
_THREADS = 64  # of a block; what `gains` has is a thread for each factor
_WARP = 32
_TILED = 8  # columns whose p and t are in shared memory at once


def lanes(rows: int) -> int:
    """Rows of a tile."""
    return 1


def fits(rank: int, dtype: str, available: int) -> bool:
    """Whether a row's state, rank x rank, fits into so many bytes of shared memory."""
    return shared_bytes("gains", rank, dtype) <= available


def shared_bytes(name: str, rank: int, dtype: str, columns: int = 0, group: int = 0) -> int:
    """The shared memory of a kernel's thread block. columns: stop - start. group: that of sweep_groups."""
    tile = 2 * _TILED * rank
    reals = {
        "gains": rank * (rank + 3 + _TILED),
        "scores": columns + rank + tile,
        "sweep": columns + rank + tile,
        "sweep_groups": columns + group + 2 * rank + tile,
    }[name]
    return np.dtype(dtype).itemsize * reals


def gains(p: Array, share: float) -> tuple[Array, Array]:
    xp = namespace(p)
    d, m = p.shape[:2]
    t, phi = xp.empty_like(p), xp.empty((d, m, 1), dtype=p.dtype)
    _run("gains", p, 0, 0, p, p.dtype.type(share), t, phi)
    return t, phi


def scores(a: Array, r: Array, p: Array, t: Array, phi: Array, residual: Array, start: int, stop: int) -> Array:
    out = namespace(a).empty_like(a[start:stop])
    _run("scores", p, stop - start, 0, a, r, p, t, phi, residual, out, start, stop)
    return out


def sweep(
    a: Array, r: Array, p: Array, t: Array, residual: Array, keep: Array, z: Array, start: int, stop: int
) -> None:
    _run("sweep", p, stop - start, 0, a, r, p, t, residual, keep, z, start, stop)


def sweep_groups(
    a: Array,
    r: Array,
    p: Array,
    t: Array,
    phi: Array,
    residual: Array,
    keep: Array,
    z: Array,
    start: int,
    stop: int,
    kept: int,
    group: int,
) -> None:
    _run("sweep_groups", p, stop - start, group, a, r, p, t, phi, residual, keep, z, start, stop, kept, group)


def _run(name: str, p: Array, columns: int, group: int, *arguments: Any) -> None:
    """Launch a kernel with these arguments, d and m; columns, group: what of each row is in shared memory."""
    d, m, rank, _ = p.shape
    dtype = dtype_name(p)
    shared = shared_bytes(name, rank, dtype, columns, group)
    if shared > cuda.UNASKED and shared > cuda.shared_memory(p):
        raise ArgumentError(
            f"{columns} columns at once do not fit into shared memory: use SparseGPT() with a smaller block"
        )
    if not all(item.flags.c_contiguous for item in arguments if hasattr(item, "flags")):
        raise ArgumentError(f"{name} reads arrays in C order only")
    passed = tuple(np.int32(item) if isinstance(item, int) else item for item in (*arguments, d, m))
    threads = min(256, -(-max(rank, 1) // _WARP) * _WARP) if name == "gains" else _THREADS
    cuda.launch(SOURCE, options(dtype, rank), name, m, threads, passed, shared)


def options(dtype: str, rank: int) -> tuple[str, ...]:
    """What the source is compiled with."""
    return (f"-DREAL={cuda.real(dtype)}", f"-DRANK={rank}", f"-DTILED={_TILED}")
