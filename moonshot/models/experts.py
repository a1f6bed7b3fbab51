"""What each expert of a mixture reads and returns, where all experts are slices of one parameter."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moonshot.models.expert_view import ExpertView
from moonshot.models.modules import patched

Record = Callable[[str, Tensor, Tensor], Tensor]  # (layer name, what it reads, what it returns) -> what goes on

_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, torch.mm, Tensor.mm}


@contextmanager
def watching_experts(experts: dict[str, ExpertView], record: Record) -> Iterator[None]:
    """Call `record` at each product with an expert's weight.

    The modules run their own loop over experts meanwhile, and not the faster forward that transformers puts in its
    place (use_experts_implementation): in the loop each expert is a product of its own.
    """
    modules = list(dict.fromkeys(view.module for view in experts.values()))

    def watched(module: nn.Module) -> Callable:
        loop = inspect.unwrap(type(module).forward)
        own = vars(module).get("forward")  # such as a hook around the loop, or what is called in its place
        forward = own if own is not None and inspect.unwrap(own) is not loop else loop.__get__(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            with _Products({n: view for n, view in experts.items() if view.module is module}, record):
                return forward(*args, **kwargs)

        return run

    with patched(modules, [watched(module) for module in modules]):
        yield


class _Products(TorchFunctionMode):
    """Products with experts' weights, which are recognised by the memory they lie in."""

    def __init__(self, experts: dict[str, ExpertView], record: Record):
        super().__init__()
        self._names = {_memory(view.matrix()): name for name, view in experts.items()}
        self._record = record

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in _PRODUCTS:
            return result
        x, weight, *_ = (*args, *(kwargs or {}).values())
        if weight.ndim != 2:
            return result
        name = self._names.get(_memory(weight if function is F.linear else weight.mT))
        return result if name is None or not len(x) else self._record(name, x, result)


def _memory(matrix: Tensor) -> tuple:
    return matrix.data_ptr(), matrix.shape, matrix.stride()
