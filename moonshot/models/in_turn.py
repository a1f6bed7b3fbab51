"""Parts of a model that are placed one after the other, the next one on its way meanwhile."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from moonshot.models.batch_sizes import fits_whole
from moonshot.models.copies import Coming, to_device
from moonshot.models.modules import hooked
from moonshot.models.precision import (
    device_of_passes,
    home,
    itemsize_of_passes,
    placed,
    tensors_of,
    tensors_outside,
)

_HALF = 4  # in eighths of a GPU's memory


class InTurn:
    """What `placed` does, for parts of a model that have their turns in order, each given by its tensors.

    While a part is placed, a thread brings the parameters of the next one to the GPU where passes compute: nobody may
    change these before. What there is no memory for comes in its turn.
    """

    def __init__(self, parts: Sequence[list[Tensor]]):
        self._parts = parts
        self._coming: dict[Tensor, Future[Coming]] = {}
        self._thread: ThreadPoolExecutor | None = None

    @contextmanager
    def placed(self, index: int) -> Iterator[None]:
        here = self._parts[index]
        with placed(here, self._come):
            self._coming.clear()
            for following in self._parts[index + 1 : index + 2]:
                self._begin(following, set(here))
            yield

    def _begin(self, part: list[Tensor], here: set[Tensor]) -> None:
        """Let a part's parameters come, but those that are here."""
        device = device_of_passes()
        if device is None or not _can_copy(device):
            return
        self._thread = self._thread or ThreadPoolExecutor(1)
        for tensor in part:
            if isinstance(tensor, nn.Parameter) and tensor not in here and tensor.device != device:
                self._coming[tensor] = self._thread.submit(to_device, tensor.data, device, unchanged=True)

    def _come(self, tensor: Tensor) -> Tensor | None:
        if (coming := self._coming.pop(tensor, None)) is None:
            return None
        try:
            return coming.result()()
        except torch.OutOfMemoryError:
            return None


@contextmanager
def placed_in_turn(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks of a model, each `placed` while it runs; the rest of the model is `placed` already."""
    turns, running = InTurn([tensors_of(block) for block in blocks]), ExitStack()
    begin = (
        block.register_forward_pre_hook(
            lambda *_, index=index: running.enter_context(turns.placed(index)) and None
        )
        for index, block in enumerate(blocks)
    )
    end = (block.register_forward_hook(lambda *_: running.close()) for block in blocks)
    with hooked(begin), hooked(end), running:
        yield


def between_passes(
    model: nn.Module, parts: Sequence[nn.Module], shares: int = 1
) -> AbstractContextManager[None]:
    """What is `placed` between passes of a whole model: what is outside of its parts, or all of it if that fits.

    shares: how many eighths of the GPU's memory it may take.
    """
    device = device_of_passes() or home(model)
    fits = fits_whole(model, itemsize_of_passes(model), device, shares)
    return placed(tensors_of(model) if fits else tensors_outside(model, list(parts)))


@contextmanager
def passes_of(model: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """A model that runs as a whole, again and again: on the GPU if it takes half of it at most, else part by part."""
    with between_passes(model, parts, _HALF), placed_in_turn(parts):
        yield


def _can_copy(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()
