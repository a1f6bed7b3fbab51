"""Tensors that are not wanted for a while: in memory, or in a file that nobody else sees."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moonshot.errors import ArgumentError
from moonshot.models.copies import Coming, to_device, to_host


class Offloaded(Protocol):
    """A tensor in an Offload."""

    def begin(self) -> None:
        """Begin to read it, where that can be done beside something else: `read` is to come soon."""

    def read(self) -> Tensor:
        """The tensor, which is not to be changed in place."""

    def replace(self, tensor: Tensor) -> None:
        """Store another tensor in its place; it must take as many bytes."""


class Offload:
    """Stores tensors in memory, or in an unnamed file in `folder`, which is made where it is not there.

    The file is gone with the process or this object.

    to_host: whether those on a GPU are stored in main memory where there is no folder.
    """

    def __init__(self, folder: Path | None = None, to_host: bool = False):
        self._to_host = to_host
        self._file: _Unnamed | None = None
        if folder is not None:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                self._file = _Unnamed(folder)
            except OSError as error:
                raise OSError(
                    f"cannot offload to a file in {folder}: {error}; choose another folder"
                ) from error
        self._end = 0

    def store(self, tensor: Tensor) -> Offloaded:
        """The tensor itself in its memory, a copy of it elsewhere."""
        if self._file is None:
            return _OnHost(tensor) if self._to_host and tensor.is_cuda else _InMemory(tensor)
        stored = _InFile(self._file, self._end, tensor)
        self._end += tensor.nbytes
        return stored

    def store_all(self, tree: Any) -> Any:
        """A tree with its tensors stored."""
        return tree_map(lambda leaf: self.store(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def in_turn(*lists: list[Offloaded]) -> Iterator[int]:
    """The indices of lists of one length, or none, while the tensors at the next index are on their way."""
    for b in range(max(map(len, lists))):
        for stored in lists:
            for following in stored[b + 1 : b + 2]:
                following.begin()
        yield b


def read_all(tree: Any) -> Any:
    """A tree with its stored tensors read."""
    return tree_map(lambda leaf: leaf.read() if isinstance(leaf, _InMemory | _OnHost | _InFile) else leaf, tree)


class _InMemory:
    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def begin(self) -> None:
        pass

    def read(self) -> Tensor:
        return self._tensor

    def replace(self, tensor: Tensor) -> None:
        self._tensor = tensor


class _OnHost:
    """In pinned memory, so that a GPU goes on while it comes and goes (models.copies)."""

    def __init__(self, tensor: Tensor):
        self._coming: Coming | None = None
        self.replace(tensor)

    def begin(self) -> None:
        if self._coming is None:
            self._coming = to_device(self._tensor, self._device)

    def read(self) -> Tensor:
        coming, self._coming = self._coming or to_device(self._tensor, self._device), None
        return coming()

    def replace(self, tensor: Tensor) -> None:
        self._device, self._tensor, self._coming = tensor.device, to_host(tensor), None


class _Unnamed:
    """A file without a name, closed when nothing refers to it any more."""

    def __init__(self, folder: Path):
        file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this object
        self.seek, self.readinto, self.write, self.flush = file.seek, file.readinto, file.write, file.flush
        finalize(self, file.close)


class _InFile:
    def __init__(self, file: _Unnamed, offset: int, tensor: Tensor):
        self._file, self._offset, self._bytes = file, offset, tensor.nbytes
        self.replace(tensor)

    def begin(self) -> None:
        pass

    def read(self) -> Tensor:
        tensor = torch.empty(self._shape, dtype=self._dtype, device="cpu")
        self._file.seek(self._offset)
        if self._file.readinto(_bytes(tensor)) != tensor.nbytes:
            raise OSError("the offload file is shorter than what was written to it")
        return tensor.to(self._device)

    def replace(self, tensor: Tensor) -> None:
        if tensor.nbytes != self._bytes:
            raise ArgumentError(
                f"a tensor of {tensor.nbytes} bytes cannot take the place of one of {self._bytes}"
            )
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        try:
            self._file.seek(self._offset)
            self._file.write(_bytes(tensor.detach().cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"the offload file took {self._offset / 2**30:.1f} GiB, then: {error}; choose a folder with more "
                "space, or fewer samples"
            ) from error


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()
