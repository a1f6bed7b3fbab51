"""The layers of a module that can be pruned.

`layer_view` knows Linear, transformers' Conv1D, convolutions and transposed convolutions; `layers_of` also finds the
experts of a mixture that are slices of one parameter.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moonshot.errors import MoonshotError
from moonshot.models.convolutions import Convolution, TransposedConvolution
from moonshot.models.expert_view import experts_of
from moonshot.models.layer_view import LayerView, TransposedLinear
from moonshot.models.precision import is_quantised


class UnsupportedLayerError(MoonshotError):
    """A layer of a known kind that computes something else, or whose weight is not an ordinary parameter."""


def layer_view(module: nn.Module) -> LayerView | None:
    """The module as matrices; None where it is no Linear, Conv1D (transformers), Conv1d to 3d or ConvTranspose1d to 3d.

    Raises UnsupportedLayerError for one of these whose own `forward` computes something else, or whose weight is made
    from other tensors (parametrisations such as weight_norm), is no ordinary tensor of floating-point numbers
    (quantised, sharded) or not there yet (lazy).
    """
    kinds: dict[type[nn.Module], type[LayerView]] = {
        nn.Linear: LayerView,
        **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Convolution),
        **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), TransposedConvolution),
    }
    if transformers := sys.modules.get("transformers.pytorch_utils"):  # without it nobody has a Conv1D
        kinds[transformers.Conv1D] = TransposedLinear
    for kind, view in kinds.items():
        if isinstance(module, kind):
            _check(module, kind)
            return view(module)
    return None


def _check(module: nn.Module, kind: type[nn.Module]) -> None:
    name = type(module).__name__
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise UnsupportedLayerError(
            f"the weight of {name} is no parameter but made from others: make it one first "
            "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
        )
    if is_lazy(weight):
        raise UnsupportedLayerError(f"{name} has no weight yet: run the model once first")
    if is_quantised(weight):
        raise UnsupportedLayerError(f"the weight of {name} is {weight.dtype}: prune before quantising")
    if type(weight.data) is not Tensor:
        raise UnsupportedLayerError(
            f"the weight of {name} is a {type(weight.data).__name__}: prune before quantising or sharding"
        )
    methods = ("forward", "_conv_forward")
    if any(getattr(type(module), method, None) is not getattr(kind, method, None) for method in methods) or (
        "forward" in vars(module)
    ):
        _try(module, kind)


@torch.no_grad()
def _try(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises UnsupportedLayerError for a forward of a module's own that computes something else than its kind's."""
    plain = kind.__new__(kind)
    plain.__dict__ = module.__dict__ | {"forward": kind.forward.__get__(plain)}
    same = module.weight.is_meta  # taken for what it looks like: there is nothing to try
    own = [name for name, _ in module.named_parameters() if name not in ("weight", "bias")]
    if not same and not own:
        x = _example(module)
        try:
            same = torch.allclose(module.forward(x), plain.forward(x), rtol=1e-2, atol=1e-3)
        except Exception:  # whatever a module raises that is called in another way
            same = False
    if not same:
        raise UnsupportedLayerError(
            f"{type(module).__name__} computes something else than {kind.__name__} does"
        )


def _example(module: Any) -> Tensor:
    """Two samples that a Linear, Conv1D or convolution can read."""
    kernel, dilation = getattr(module, "kernel_size", ()), getattr(module, "dilation", ())
    sizes = [4 * step * (size - 1) + size for size, step in zip(kernel, dilation, strict=True)]
    names = [name for name in ("in_features", "in_channels", "nx") if hasattr(module, name)]
    channels = getattr(module, names[0]) if names else module.weight.shape[-1]
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn((2, channels, *sizes), generator=generator, dtype=torch.float32, device="cpu")
    return x.to(module.weight)


def layers_of(prefix: str, module: nn.Module) -> Iterator[tuple[str, LayerView]]:
    """(name, view) of every layer in a module that can be pruned.

    Several of one kind that have one weight are one layer, under the name of the first.
    """
    found: dict[str, LayerView] = {}
    weights: dict[tuple, LayerView] = {}
    for name, inner in module.named_modules(prefix=prefix):
        found |= {f"{name}.{key}".lstrip("."): expert for key, expert in experts_of(inner)}
        try:
            view = layer_view(inner)
        except UnsupportedLayerError:
            continue
        if view is None:
            continue
        first = weights.setdefault((type(view), id(inner.weight)), view)
        if first is view:
            found[name] = view
        else:
            first.modules.append(inner)
    yield from found.items()
