"""`backend.smallest` for CuPy arrays (smallest.cu): short rows in one launch, long ones by radix selection."""

import array_api_compat
import numpy as np

from moonshot.linalg import cuda

SOURCE = "linalg/smallest.cu"
_FEW = 64  # columns that are ranked by comparing all pairs
_CHUNK = 4096  # entries of a long row for each thread block
_ROWS = 65536  # long rows at once, with a KiB of counts each
_THREADS = 256
_BITS = {"float32": np.uint32, "float64": np.uint64}


def smallest(scores, k: int, chunk: int = _CHUNK):
    """Boolean mask of the k smallest entries of each row of `scores` (rows, columns), 0 < k < columns.

    Of equals the first count. chunk: entries for each thread block.
    """
    xp = array_api_compat.array_namespace(scores)
    scores = xp.asarray(scores, order="C")
    mask = xp.empty_like(scores, dtype=xp.bool)
    rows, columns = scores.shape
    if columns <= _FEW:
        blocks = -(-rows // _THREADS)
        arguments = (scores, mask, np.int32(rows), np.int32(k))
        cuda.launch(SOURCE, options(str(scores.dtype), few=columns), "few", blocks, _THREADS, arguments)
        return mask
    for start in range(0, rows, _ROWS):
        _select(xp, scores[start : start + _ROWS], k, mask[start : start + _ROWS], chunk)
    return mask


def _select(xp, scores, k: int, mask, chunk: int) -> None:
    """Mark the k smallest of each row."""
    rows, columns = scores.shape
    dtype = str(scores.dtype)
    chunks = -(-columns // chunk)
    threshold, missing = xp.zeros(rows, dtype=_BITS[dtype]), xp.full(rows, k, dtype=np.int32)
    counts, equal = xp.zeros((rows, 256), dtype=np.int32), xp.empty(rows, dtype=np.int32)
    ties = xp.empty((rows, chunks), dtype=np.int32)

    def launch(name: str, blocks: int, *arguments, shared: int = 0) -> None:
        numbers = (np.int32(each) if isinstance(each, int) else each for each in arguments)
        cuda.launch(SOURCE, options(dtype, chunk=chunk), name, blocks, _THREADS, tuple(numbers), shared)

    for shift in range(8 * threshold.itemsize - 8, -1, -8):
        launch("count", rows * chunks, scores, threshold, counts, columns, chunks, shift)
        launch("narrow", rows, counts, threshold, missing, equal, shift)
    launch("count_ties", rows * chunks, scores, threshold, missing, equal, ties, columns, chunks)
    found = (threshold, missing, equal, ties)
    launch("mark", rows * chunks, scores, *found, mask, columns, chunks, shared=4 * _THREADS)


def options(dtype: str, few: int = 1, chunk: int = _CHUNK) -> tuple[str, ...]:
    """What the source is compiled with."""
    bits = {"float32": "unsigned int", "float64": "unsigned long long"}[dtype]
    return (f"-DREAL={cuda.real(dtype)}", f"-DBITS={bits}", f"-DFEW={few}", f"-DCHUNK={chunk}")
