"""What layers read and return while a model, or a part of it, runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from moonshot.linalg import half_products
from moonshot.models.expert_view import ExpertView
from moonshot.models.experts import Record, watching_experts
from moonshot.models.layer_view import LayerView
from moonshot.models.modules import hooked
from moonshot.models.precision import widened

Seen = dict[str, list[Tensor]]  # by layer name, a tensor for each call


@contextmanager
def watching(layers: dict[str, LayerView], record: Record) -> Iterator[None]:
    """Call `record` whenever a layer has read something, to go on with what it gives back."""

    def hook(name: str) -> Callable:
        def watch(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            return record(name, x, output) if len(x) else None

        return watch

    experts = {name: view for name, view in layers.items() if isinstance(view, ExpertView)}
    hooks = (
        module.register_forward_hook(hook(name), with_kwargs=True, prepend=True)
        for name, view in layers.items()
        if name not in experts
        for module in view.modules
    )
    with hooked(hooks), watching_experts(experts, record):
        yield


@contextmanager
def recording(layers: dict[str, LayerView], inputs: Seen, outputs: Seen | None = None) -> Iterator[None]:
    """Append what every layer reads, and returns, to `inputs` and `outputs` at each call, `as_observed`.

    Both stay what they were where the model goes on to change them in place. Layers that read the same tensor have one
    copy of it.
    """
    copies: dict[
        tuple, tuple[Tensor, Tensor]
    ] = {}  # by what was read: it, so that its memory is not used again

    def record(name: str, x: Tensor, output: Tensor) -> Tensor:
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        _, copy = copies.setdefault(key, (x, as_observed(x.detach())))
        inputs.setdefault(name, []).append(copy)
        if outputs is None:
            return output
        if torch.is_grad_enabled() and not output.requires_grad:  # frozen, and read from what has no gradient
            output = output.detach().requires_grad_()
        outputs.setdefault(name, []).append(output)
        return output.clone()

    with watching(layers, record):
        yield


def as_observed(tensor: Tensor) -> Tensor:
    """A copy for the statistics: in float32 or better, but where half precision can be multiplied as exactly."""
    return tensor.clone() if half_products.possible(tensor) else widened(tensor)


def output_gradients(results: Any, gradients: list[Tensor | None], outputs: Seen) -> Seen:
    """The gradient at every recorded output, given that at the floating-point tensors of `results`."""
    pairs = [
        (result, gradient.to(result.dtype))
        for result, gradient in zip(differentiable(results), gradients, strict=True)
        if gradient is not None and result.requires_grad
    ]
    calls = [(name, output) for name, made in outputs.items() for output in made]
    watched = [
        output for _, output in calls if output.requires_grad
    ]  # not where the model sets torch.no_grad()
    if not pairs or not watched:
        return {name: [torch.zeros_like(output) for output in made] for name, made in outputs.items()}
    tops, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(tops, watched, seeds, allow_unused=True))
    deltas: Seen = {}
    for name, output in calls:
        delta = next(found) if output.requires_grad else None
        deltas.setdefault(name, []).append(torch.zeros_like(output) if delta is None else as_observed(delta))
    return deltas


def differentiable(results: Any) -> list[Tensor]:
    """The floating-point tensors in whatever a module returned, in a fixed order."""
    leaves, _ = tree_flatten(results)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def main_output(results: Any) -> Tensor:
    """The hidden states in whatever a module returned: the first floating-point tensor that is no vector."""
    found = differentiable(results)
    return next((result for result in found if result.ndim > 1), found[0])


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are kept in for a model in this dtype: the range of float16 is too small."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


@contextmanager
def counting(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """{module: number of its calls} of those that are called inside, in the order of their first calls."""
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, _arguments: tuple) -> None:
        calls[module] = calls.get(module, 0) + 1

    with hooked(module.register_forward_pre_hook(count) for module in modules):
        yield calls
