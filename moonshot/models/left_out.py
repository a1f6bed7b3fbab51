"""Weights that pruning cannot or must not touch, and why: what is no layer, and layers that share their weight."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moonshot.models.layer_view import LayerView
from moonshot.models.layers import UnsupportedLayerError, layer_view
from moonshot.models.targets import listed

Named = tuple[str, LayerView]


def left_out(model: nn.Module, views: Mapping[str, LayerView]) -> dict[str, str]:
    """{name of a layer or module: why its weights stay as they are}. views: the layers of the model, by name.

    A tied layer is among them whose weight is also an embedding's, say: zeros in one are zeros in the other. Embeddings
    themselves are not, nor are biases and what has one dimension, such as a norm's scale.
    """
    reasons = _tied(model, views)
    known = {id(getattr(module, view.parameter)) for view in views.values() for module in view.modules}
    inside: tuple[str, ...] = ()  # what is in a layer that is named already
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        try:
            layer_view(module)
        except UnsupportedLayerError as error:
            reasons[name] = str(error)
            inside += (f"{name}.",)
            continue
        weights = [
            key
            for key, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in known and "bias" not in key and _is_matrix(parameter)
        ]
        if weights and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            shown = listed(weights)
            reasons[name or shown] = (
                f"{type(module).__name__} holds {shown} and is no Linear, convolution or list of experts"
            )
    return reasons


def _is_matrix(parameter: Tensor) -> bool:
    """Whether it can be a layer's weight, and not a vector or one sample's position embeddings."""
    return len(parameter.squeeze().shape) > 1 and len(parameter) > 1


def _tied(model: nn.Module, views: Mapping[str, LayerView]) -> dict[str, str]:
    """Layers whose weight something else in the model holds too, as the same parameter or in the same memory."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}  # by where the weight lies
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not is_lazy(parameter) and parameter.numel():
                holders.setdefault(parameter.data_ptr(), []).append((f"{name}.{key}".lstrip("."), module))
    reasons = {}
    for name, view in views.items():
        parameter = getattr(view.module, view.parameter)
        uses = [module for module in view.modules if getattr(module, view.parameter) is parameter]
        if others := [holder for holder, module in holders.get(parameter.data_ptr(), ()) if module not in uses]:
            reasons[name] = f"its weight is also {', '.join(others)}"
    return reasons


def shared_between(parts: Iterable[Iterable[Named]]) -> list[str]:
    """The names of layers in different parts that have one weight. parts: (name, layer) of the layers in each."""
    first: dict[int, tuple[int, str]] = {}
    found: dict[str, None] = {}
    for index, layers in enumerate(parts):
        for name, view in layers:
            where, other = first.setdefault(id(getattr(view.module, view.parameter)), (index, name))
            if where != index:
                found |= {other: None, name: None}
    return list(found)
