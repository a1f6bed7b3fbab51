"""Safetensors files written tensor by tensor, so that one is in memory at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moonshot.errors import ArgumentError
from moonshot.files.mapped import DTYPE_NAMES

_ALIGNED = 8  # bytes; the header is padded to so many


class Entry(NamedTuple):
    """A tensor that is going to be written: its shape and dtype, and what gives it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_tensors(path: Path, entries: dict[str, Entry], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file with these tensors, in order of their alignment, as safetensors does; its sha256.

    metadata: what the file says of itself; that its tensors are torch's unless given.

    Raises ValueError for a dtype that the format has no name for, or that moonshot does not read.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    ordered = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    for name in ordered:
        shape, dtype, _ = entries[name]
        if dtype not in DTYPE_NAMES:
            raise ArgumentError(f"{name} is {dtype}, which moonshot does not write")
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return _write(path, (len(text).to_bytes(8, "little"), text), (entries[name].read for name in ordered))


def _write(path: Path, begin: Iterable[bytes], reads: Iterable[Callable[[], Tensor]]) -> str:
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in begin:
            file.write(part)
            digest.update(part)
        for read in reads:
            content: Any = read().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(content)
            digest.update(content)
    return digest.hexdigest()
