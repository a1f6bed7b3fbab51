"""Where and in which precision a model's modules compute for a while."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from moonshot.errors import ArgumentError
from moonshot.models.copies import write_back


@dataclass(frozen=True)
class Passes:
    """How the parts of a model run.

    device: on which, None for the one that they are on. widened: whether half precision is computed in float32.
    """

    device: torch.device | None = None
    widened: bool = True


_AT_ONCE = 2**24  # numbers that `zeros` makes a copy of
_DEFAULT = Passes()
_passes: ContextVar[Passes] = ContextVar("passes", default=_DEFAULT)


@contextmanager
def passing(passes: Passes) -> Iterator[None]:
    """Parts that are `placed` inside run so."""
    token = _passes.set(passes)
    try:
        with torch.autocast(passes.device.type, enabled=False) if passes.device else nullcontext():
            yield
    finally:
        _passes.reset(token)


@contextmanager
def placed(tensors: list[Tensor], come: Callable[[Tensor], Tensor | None] = lambda _: None) -> Iterator[None]:
    """Parameters and buffers where passes compute inside, in their own memory again outside. Ties stay tied.

    That is float32 for half precision, unless `passing` says something else. What changed inside is written back, and
    nothing else: weights may lie in a file. A parameter must be changed in place, and not through its `data`: torch
    counts such changes. A buffer may be changed in any way.

    come: gives what has been copied to the device beforehand, in its own dtype, None for what has not.
    """
    passes, moved = _passes.get(), []
    try:
        for tensor in dict.fromkeys(tensors):
            dtype = torch.float32 if passes.widened and _is_half(tensor) else tensor.dtype
            if (device := passes.device or tensor.device) != tensor.device or dtype != tensor.dtype:
                moved.append((tensor, tensor.data, _changes(tensor)))
                copy = come(tensor)
                tensor.data = tensor.data.to(device, dtype) if copy is None else copy.to(dtype)
        yield
    finally:
        try:
            write_back([(was, tensor.data) for tensor, was, changes in moved if _changed(tensor, was, changes)])
        finally:
            for tensor, original, _ in moved:
                tensor.data = original


def _changes(tensor: Tensor) -> int | None:
    """How often a parameter was changed in place; None for a buffer, as batch norms do not count what they change."""
    return tensor._version if isinstance(tensor, nn.Parameter) else None


def _changed(tensor: Tensor, original: Tensor, changes: int | None) -> bool:
    """Whether a tensor that has moved is another than it was; changes: `_changes` from before."""
    if changes is None:
        return not torch.equal(tensor.data.to(original.device, original.dtype), original)
    return changes != _changes(tensor)


def home(model: nn.Module) -> torch.device:
    """Where a model is."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def device_of_passes() -> torch.device | None:
    """Where `placed` brings tensors; None where they stay."""
    return _passes.get().device


@contextmanager
def in_float32(tensors: list[Tensor]) -> Iterator[None]:
    """`placed`, in float32 whatever the precision of passes is.

    Where passes compute in half precision as it is, products on a GPU have the 11 bits of TF32, no fewer than passes.
    """
    passes = _passes.get()
    half = not passes.widened and any(map(_is_half, tensors))
    with passing(replace(passes, widened=True)), placed(tensors), _tf32() if half else nullcontext():
        yield


@contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 on a GPU are rounded to TF32 before they are added up, unless they are less exact already."""
    if (before := torch.get_float32_matmul_precision()) == "highest":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def widened(tensor: Tensor) -> Tensor:
    """A copy, in float32 where it is in half precision."""
    return tensor.to(torch.float32 if _is_half(tensor) else tensor.dtype, copy=True)


def as_read(tensor: Tensor) -> Tensor:
    """A copy as modules read it that are `placed`."""
    return widened(tensor) if _passes.get().widened else tensor.clone()


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy to store: `narrowed` to a dtype where it was computed in a wider one."""
    return narrowed(tensor, dtype) if _passes.get().widened else tensor.clone()


def as_given(tensor: Tensor, model: nn.Module) -> Tensor:
    """A copy of what is in a batch, as a model reads it that is `placed`: floating-point numbers in its own dtype."""
    if _passes.get().widened or not tensor.is_floating_point():
        return widened(tensor)
    return tensor.to(activation_dtype(model), copy=True)


def runs_as_it_is(model: nn.Module) -> bool:
    """Whether gradients can be computed in the model's own dtype: not in float16, whose range is too small."""
    halves = {tensor.dtype for tensor in tensors_of(model) if _is_half(tensor)}
    return halves <= {torch.bfloat16}


def as_device(device: str | torch.device | None) -> torch.device | None:
    """The device that a name is for: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one, else None.

    Raises ArgumentError for another, and for a GPU that is not there.
    """
    if device is None or device == "auto":
        return None if device is None or not torch.cuda.is_available() else as_device("cuda")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f'device must be "cpu", "cuda" or such as "cuda:1", got {device!r}') from error
    if found.type not in ("cpu", "cuda"):
        raise ArgumentError(f'device must be "cpu", "cuda" or such as "cuda:1", got {str(found)!r}')
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "finds no GPU" if torch.version.cuda else "is one without CUDA"
        raise ArgumentError(f"device {str(found)!r} is not there, this torch {built}: leave device out")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= (count := torch.cuda.device_count()):
        raise ArgumentError(f"device {str(found)!r} is not there, torch sees {count}, from cuda:0 on")
    return torch.device("cuda", index)


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is integers or float8, which come with scales that pruning knows nothing of."""
    return not tensor.is_floating_point() or tensor.itemsize == 1


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize < 4


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


def itemsize_of_passes(model: nn.Module) -> int:
    """Bytes of a number in the passes of a model that is `placed`."""
    dtype = activation_dtype(model)
    return max(dtype.itemsize, 4) if _passes.get().widened else dtype.itemsize


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def zeros(model: nn.Module) -> float:
    """The fraction of all parameters of a model, those that share a weight counted once, that are zero."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    return 1 - sum(map(_nonzeros, parameters)) / max(sum(parameter.numel() for parameter in parameters), 1)


def _nonzeros(tensor: Tensor) -> int:
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()
    if not _is_half(tensor) or tensor.device.type != "cpu":
        return int(torch.count_nonzero(tensor))
    bits = tensor.reshape(-1).view(torch.int16).numpy()  # which NumPy counts many times as fast
    return sum(
        int(np.count_nonzero(some & 0x7FFF)) for some in np.split(bits, range(_AT_ONCE, len(bits), _AT_ONCE))
    )


def tensors_outside(model: nn.Module, parts: list[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of a model that none of its parts holds."""
    inside = {id(tensor) for part in parts for tensor in tensors_of(part)}
    return [tensor for tensor in tensors_of(model) if id(tensor) not in inside]
