"""The sequential sweep's inner loops for CuPy arrays: every row is one thread block (sparsegpt.cu).

`sparsegpt_batched` has the same functions, with the same arguments, for any device; its docstrings hold the
mathematics. There each step of the sweep is several launches over all rows, here the whole of it is one. A tile is
one row. The source is compiled when it is first needed for a dtype, a number of factors and a width, which takes a
second or so, and kept on disk by CuPy.
"""

from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from moonshot.errors import ArgumentError
from moonshot.linalg.backend import Array, dtype_name, namespace

_SHARED = 48 * 1024  # bytes of shared memory that every thread block may have
_THREADS = {"gains": 64, "scores": 128, "sweep": 128, "sweep_groups": 128}


def lanes(rows: int) -> int:
    """Rows of a tile."""
    return 1


def fits(rank: int, dtype: str) -> bool:
    """Whether a row's state, rank x rank, fits into shared memory."""
    return np.dtype(dtype).itemsize * (rank + 2) ** 2 <= _SHARED


def gains(p: Array, share: float) -> tuple[Array, Array]:
    xp = namespace(p)
    d, m = p.shape[:2]
    t, phi = xp.empty_like(p), xp.empty((d, m, 1), dtype=p.dtype)
    _run("gains", p, 1, p, p.dtype.type(share), t, phi)
    return t, phi


def scores(a: Array, r: Array, p: Array, t: Array, phi: Array, residual: Array, start: int, stop: int) -> Array:
    out = namespace(a).empty_like(a[start:stop])
    _run("scores", p, stop - start, a, r, p, t, phi, residual, out, start, stop)
    return out


def sweep(
    a: Array, r: Array, p: Array, t: Array, residual: Array, keep: Array, z: Array, start: int, stop: int
) -> None:
    _run("sweep", p, stop - start, a, r, p, t, residual, keep, z, start, stop)


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
    _run("sweep_groups", p, stop - start, a, r, p, t, phi, residual, keep, z, start, stop, kept, group)


def _run(name: str, p: Array, columns: int, *arguments: Any) -> None:
    """Launch a kernel with these arguments, d and m, so many columns of each row in shared memory."""
    d, m, rank, _ = p.shape
    width = max(32, 1 << (columns - 1).bit_length())
    if 3 * p.dtype.itemsize * width > _SHARED:  # two of them, and a row's factors
        raise ArgumentError(
            f"{columns} columns at once do not fit into shared memory: use SparseGPT() with a smaller block"
        )
    if not all(item.flags.c_contiguous for item in arguments if hasattr(item, "flags")):
        raise ArgumentError(f"{name} reads arrays in C order only")
    passed = tuple(np.int32(item) if isinstance(item, int) else item for item in (*arguments, d, m))
    launch(name, dtype_name(p), rank, width, m, _THREADS[name], passed)


def launch(
    name: str, dtype: str, rank: int, width: int, blocks: int, threads: int, arguments: tuple[Any, ...]
) -> None:
    """Run a kernel of sparsegpt.cu on the device that its arrays are on."""
    with arguments[0].device:
        _compiled(dtype, rank, width).get_function(name)((blocks,), (threads,), arguments)


@cache
def _compiled(dtype: str, rank: int, width: int) -> Any:
    import cupy

    return cupy.RawModule(code=source(), options=options(dtype, rank, width))


def source() -> str:
    return (files("moonshot.solvers") / "sparsegpt.cu").read_text(encoding="utf-8")


def options(dtype: str, rank: int, width: int) -> tuple[str, ...]:
    """What the source is compiled with."""
    real = {"float32": "float", "float64": "double"}[dtype]
    return (f"-DREAL={real}", f"-DRANK={rank}", f"-DWIDTH={width}")
