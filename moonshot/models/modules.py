"""Modules in another mode, or with another forward, for a while."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from moonshot.errors import ArgumentTypeError, MoonshotError


class ModelError(MoonshotError):
    """A model that cannot be pruned as it is."""


def check_model(model: nn.Module) -> None:
    """Raises ArgumentTypeError for what is no module, ModelError for one whose weights are not there."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch module, got {type(model).__name__}")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ModelError(
            "the model is spread over several devices by device_map: load it without, so that it stays on the CPU, and "
            'give device="cuda", which takes one part of it at a time; for several GPUs start with torchrun'
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model is on the meta device and holds no weights: load it first")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise ModelError(f"{', '.join(lazy)} have no shape yet: run the model once")
    for name, parameter in model.named_parameters():
        if parameter.layout != torch.strided:
            raise ModelError(f"{name} is {parameter.layout}: make it dense first (to_dense())")


def shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model that more than one of its modules holds."""
    holders = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    return {parameter for parameter, count in holders.items() if count > 1}


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
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks of modules that are there inside; each is registered when it is asked for, and all are removed."""
    there: list[RemovableHandle] = []
    try:
        for handle in handles:
            there.append(handle)
        yield
    finally:
        for handle in there:
            handle.remove()


@contextmanager
def patched(blocks: list[nn.Module], forwards: list[Callable]) -> Iterator[None]:
    """Modules that run other functions inside; a forward of their own, such as a hook, is theirs again outside."""
    own: list[Any] = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@contextmanager
def replaced(blocks: list[nn.Module], forwards: list[Callable]) -> Iterator[None]:
    """Modules whose calls are other functions inside: `patched`, and without their hooks, which would run once more."""
    own = [{name: vars(block)[name] for name in _HOOKS if name in vars(block)} for block in blocks]
    with patched(blocks, forwards):
        for block, hooks in zip(blocks, own, strict=True):
            vars(block).update({name: OrderedDict() for name in hooks})
        try:
            yield
        finally:
            for block, hooks in zip(blocks, own, strict=True):
                vars(block).update(hooks)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile, which share its weights.

    Raises ModelError for a model with PEFT adapters.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ModelError(
            "the model has PEFT adapters beside its weights: merge them first (model = model.merge_and_unload())"
        )
    return model
