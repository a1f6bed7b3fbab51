"""Modules in another mode, or with another forward, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


class ModelError(ValueError):
    """A model that cannot be pruned as it is."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; every module's mode as it was outside."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def patched(blocks: list[nn.Module], forwards: list[Callable]) -> Iterator[None]:
    """Modules that run other functions inside."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
