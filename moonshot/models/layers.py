"""The layers of a module that can be pruned.

`layer_view` knows Linear, transformers' Conv1D, convolutions and transposed convolutions; `layers_of` also finds the
experts of a mixture that are slices of one parameter.
"""

import sys
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from moonshot.models.convolutions import Convolution, TransposedConvolution
from moonshot.models.expert_view import experts_of
from moonshot.models.layer_view import LayerView, TransposedLinear


class UnsupportedLayerError(ValueError):
    """A layer of a known kind that overrides its forward, or whose weight is not an ordinary parameter."""


def layer_view(module: nn.Module) -> LayerView | None:
    """The module as matrices; None where it is no Linear, Conv1D (transformers), Conv1d to 3d or ConvTranspose1d to 3d.

    Raises UnsupportedLayerError for one of these that overrides `forward`, whose weight is made from other tensors
    (parametrisations such as weight_norm), is not floating-point (quantised) or not there yet (lazy).
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
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(kind, method, None):
            raise UnsupportedLayerError(
                f"{name} overrides {method} of {kind.__name__}: leave the layer out with ignore"
            )
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise UnsupportedLayerError(
            f"the weight of {name} is no parameter but made from others: make it one first "
            "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
        )
    if is_lazy(weight):
        raise UnsupportedLayerError(f"{name} has no weight yet: run the model once first")
    if not weight.is_floating_point():
        raise UnsupportedLayerError(f"the weight of {name} is {weight.dtype}: prune before quantising")


def layers_of(prefix: str, module: nn.Module) -> Iterator[tuple[str, LayerView]]:
    """(name, view) of every layer in a module that can be pruned."""
    for name, inner in module.named_modules(prefix=prefix):
        for key, expert in experts_of(inner):
            yield f"{name}.{key}".lstrip("."), expert
        try:
            view = layer_view(inner)
        except UnsupportedLayerError:
            continue
        if view is not None:
            yield name, view
