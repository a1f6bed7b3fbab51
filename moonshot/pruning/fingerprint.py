"""What a run depends on, in JSON's types and exactly: two runs with the same fingerprint give the same answers."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moonshot.errors import ArgumentTypeError
from moonshot.layer.objectives import Objective
from moonshot.models.batch_tree import leaves, map_leaves


def exact(value: Any, what: str) -> Any:
    """A value in JSON's types: numbers with all their digits, arrays and code as digests, objects by their attributes.

    Raises ArgumentTypeError, which names `what`, for what has no such representation.
    """
    if value is None or isinstance(value, bool | int | str | float):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return digest([value if isinstance(value, Tensor) else np.asarray(value)])
    if isinstance(value, Objective) and len(value.weighted_terms) > 1:
        return [[weight, exact(term, what)] for weight, term in value.weighted_terms]
    if isinstance(value, Mapping):
        return [[exact(key, what), exact(item, what)] for key, item in value.items()]
    if isinstance(value, Sequence | set | frozenset):
        items = [exact(item, what) for item in value]
        return items if isinstance(value, Sequence) else sorted(items, key=repr)
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, partial):
        return [exact(value.func, what), exact(value.args, what), exact(value.keywords, what)]
    if isinstance(value, MethodType):
        return [exact(value.__func__, what), exact(value.__self__, what)]
    if isinstance(value, FunctionType):
        captured = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = captured, value.__defaults__, value.__kwdefaults__
        return [_name(value), digest(_code(value.__code__)), *(exact(part, what) for part in parts)]
    if isinstance(value, nn.Module):
        return [_name(type(value)), repr(value), state_digest(value)]
    if dataclasses.is_dataclass(value):
        attributes = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "__dict__"):
        attributes = vars(value)
    else:
        raise ArgumentTypeError(
            f"the {what} holds a {type(value).__name__}, which a checkpoint cannot compare with that of another run: "
            "give it numbers, text or arrays instead, or leave the checkpoint out"
        )
    return [_name(type(value)), *([name, exact(item, what)] for name, item in attributes.items())]


def comparable(value: Any) -> Any:
    """As `exact`, but the type alone of what has no such representation."""
    try:
        return exact(value, "value")
    except (ArgumentTypeError, RecursionError):
        return _name(type(value))


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _code(code: CodeType) -> list[Any]:
    """What a function does, whatever file and line it is in."""
    constants = [_code(each) if isinstance(each, CodeType) else each for each in code.co_consts]
    return [code.co_code, constants, code.co_names, code.co_varnames]


def state_digest(model: nn.Module, without: Iterable[str] = ()) -> str:
    """A digest of the names, shapes and dtypes of all tensors of a model, and of their values.

    without: names of modules whose weights' values do not count.
    """
    left_out = {f"{name}.weight" for name in without}
    state = _state(model)
    return digest([_about(state), *(tensor for name, tensor in state if name not in left_out)])


def sketch(model: nn.Module, most: int = 64) -> str:
    """A digest as `state_digest`, but of a few values of each tensor, evenly spread."""
    state = _state(model)
    flat = [tensor.detach().reshape(-1) for _, tensor in state]
    return digest([_about(state), *(values[:: max(len(values) // most, 1)] for values in flat)])


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _about(state: list[tuple[str, Tensor]]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state]


def data_digest(batches: Iterable[Any]) -> str:
    """A digest of calibration data: batches of tensors and arrays in containers of any kind."""
    found = list(batches)
    return digest([repr(map_leaves(lambda _: None, found)), *leaves(found)])


def digest(parts: Iterable[Any]) -> str:
    """A digest of tensors, by their dtype, shape and values, and of what else is told apart by its repr."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            content: Any = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.update(content)
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()
