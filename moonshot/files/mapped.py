"""The tensors of a safetensors file, in the file itself: what is written to them is on disk."""

import json
import mmap
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moonshot.errors import ArgumentError
from moonshot.files.source import check_weights

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class MappedFile:
    """A safetensors file mapped into memory, of which the operating system holds only what is in use.

    tensors: {name: tensor}, each a view of the file. safetensors itself looks at the file first.
    Raises ValueError for a file that is not in the format, whose tensors are not aligned, or that holds numbers that
    torch has none of.
    """

    def __init__(self, path: Path):
        check_weights(path)
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        try:
            begin = 8 + int.from_bytes(self._map[:8], "little")
            header: dict[str, Any] = json.loads(self._map[8:begin])
            header.pop("__metadata__", None)
            self.tensors = {name: self._tensor(begin, **entry) for name, entry in header.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"{path} is no safetensors file that can be mapped: {error!r}") from error

    def _tensor(self, begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
        kind = DTYPES[dtype]
        if not prod(shape):
            return torch.empty(shape, dtype=kind, device="cpu")
        start = begin + data_offsets[0]
        if start % kind.itemsize:
            raise ArgumentError(f"a tensor of {dtype} begins at byte {start}")
        return torch.frombuffer(self._map, dtype=kind, count=prod(shape), offset=start).view(shape)

    def release(self) -> None:
        """Let the memory go that holds parts of the file; they are read again where they are wanted."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Wait until all that was written is on disk."""
        self._map.flush()
