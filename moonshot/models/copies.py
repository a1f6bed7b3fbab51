"""Copies between main memory and a GPU, beside what it computes: by streams of their own."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Coming = Callable[[], Tensor]  # waits for a copy, in the order of the current stream, and gives it


@cache
def _copying(index: int, unchanged: bool) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def to_device(tensor: Tensor, device: torch.device, unchanged: bool = False) -> Coming:
    """Begin to copy a tensor to a GPU; this thread goes on meanwhile if it is in pinned memory.

    unchanged: it does not come from `to_host`, so that it need not wait for such copies, nor they for it.
    """
    copying = _copying(device.index, unchanged)
    with torch.cuda.stream(copying):
        copy = tensor.to(device, non_blocking=True)
    there = copying.record_event()

    def come() -> Tensor:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(there)
        copy.record_stream(computing)
        return copy

    return come


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which `to_device` may read; others must wait for the device first."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    copying = _copying(tensor.device.index, False)
    copying.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(copying):
        copy.copy_(tensor, non_blocking=True)
    tensor.record_stream(copying)
    return copy


def write_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor over the first, in its dtype.

    From a GPU to main memory all go through pinned memory together, many times as fast as without.
    """
    staged = [(to, to_host(tensor) if tensor.is_cuda and not to.is_cuda else tensor) for to, tensor in pairs]
    for index in {tensor.device.index for to, tensor in pairs if tensor.is_cuda and not to.is_cuda}:
        _copying(index, False).synchronize()
    for to, tensor in staged:
        to.copy_(tensor)
