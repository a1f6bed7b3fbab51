"""Half-precision modules that compute in float32 for a while."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(tensors: list[Tensor]) -> Iterator[None]:
    """Half-precision parameters and buffers as float32 inside, in their own memory again outside. Ties stay tied.

    What changed inside is written back, and nothing else: weights may lie in a file.
    """
    halves = [(t, t.data) for t in dict.fromkeys(tensors) if t.is_floating_point() and t.itemsize < 4]
    for tensor, half in halves:
        tensor.data = half.float()
    try:
        yield
    finally:
        for tensor, half in halves:
            rounded = tensor.data.to(half.dtype)
            if not torch.equal(rounded, half):
                half.copy_(rounded)
            tensor.data = half


def widened(tensor: Tensor) -> Tensor:
    """A copy, in float32 where it is in half precision: what modules read that compute `in_float32`."""
    half = tensor.is_floating_point() and tensor.itemsize < 4
    return tensor.to(torch.float32 if half else tensor.dtype, copy=True)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in half precision, if that is `dtype` and the tensor wider: bfloat16 for what float16 cannot hold.

    That is said in a warning, but for what a mask adds to the scores of what is not to be seen.
    """
    if not tensor.is_floating_point() or tensor.itemsize <= dtype.itemsize:
        return tensor.clone()
    narrow = tensor.to(dtype)
    overflow = narrow.isinf() & tensor.isfinite()
    if bool(overflow.any()):
        if dtype == torch.float16 and bool((overflow & (tensor > torch.finfo(tensor.dtype).min / 2)).any()):
            warnings.warn(
                "float16 cannot hold what passes between the model's parts (65504 at most): it is stored in bfloat16, "
                "with fewer digits; the model itself may overflow in float16, convert it to bfloat16 or float32",
                stacklevel=2,
            )
        limit = torch.finfo(torch.bfloat16).max
        return tensor.clamp(-limit, limit).to(torch.bfloat16)
    return narrow


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that holds whatever passes between a model's parts: the widest of its weights', 16 bits or more."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    wide = [dtype for dtype in dtypes if dtype.itemsize > 1]
    return reduce(torch.promote_types, wide) if wide else torch.float32


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def zeros(model: nn.Module) -> float:
    """The fraction of all parameters of a model, those that share a weight counted once, that are zero."""
    parameters = list(model.parameters())
    countable = (p.detach().float() if p.is_floating_point() and p.itemsize == 1 else p for p in parameters)
    nonzero = sum(int(torch.count_nonzero(parameter)) for parameter in countable)
    return 1 - nonzero / max(sum(parameter.numel() for parameter in parameters), 1)


def tensors_outside(model: nn.Module, parts: list[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of a model that none of its parts holds."""
    inside = {id(tensor) for part in parts for tensor in tensors_of(part)}
    return [tensor for tensor in tensors_of(model) if id(tensor) not in inside]


@contextmanager
def running_in_float32(model: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """A model that computes in float32, of whose blocks only the one that runs is in it."""
    running = ExitStack()
    handles = []
    for block in blocks:
        tensors = tensors_of(block)
        handles.append(
            block.register_forward_pre_hook(lambda *_, t=tensors: running.enter_context(in_float32(t)) and None)
        )
        handles.append(block.register_forward_hook(lambda *_: running.close()))
    try:
        with running, in_float32(tensors_outside(model, blocks)):
            yield
    finally:
        for handle in handles:
            handle.remove()
