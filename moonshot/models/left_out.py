"""Weights that pruning cannot or must not touch, and why: what is no layer, and layers that share their weight."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

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
    """Layers whose weight something else in the model holds too, as a parameter or in the same memory."""
    holders = _holders(model)
    reasons = {}
    for name, view in views.items():
        parameter = getattr(view.module, view.parameter)
        uses = [module for module in view.modules if getattr(module, view.parameter) is parameter]
        place = _place(parameter)
        others = {
            holder: other == place
            for holder, module, other in holders.get(place.start, ())
            if module not in uses and other.start < place.stop and place.start < other.stop
        }
        if others:
            words = "its weight is also" if all(others.values()) else "its weight shares memory with"
            reasons[name] = f"{words} {', '.join(others)}"
        elif any(size > 1 and not step for size, step in zip(parameter.shape, parameter.stride(), strict=True)):
            reasons[name] = "entries of its weight share memory: give it a copy first (weight.data.clone())"
    return reasons


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, range]]]:
    """By where a parameter lies: (name, module, place) of all in the memory around it that has no gap."""
    found = [
        (f"{name}.{key}".lstrip("."), module, _place(parameter))
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.numel()
    ]
    by_place: dict[int, list[tuple[str, nn.Module, range]]] = {}
    together: list[tuple[str, nn.Module, range]] = []
    end = 0
    for holder in sorted(found, key=lambda holder: holder[2].start):
        if holder[2].start >= end:
            together = []
        together.append(holder)
        by_place[holder[2].start] = together
        end = max(end, holder[2].stop)
    return by_place


def _place(parameter: Tensor) -> range:
    """The addresses from a tensor's first entry to its last."""
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps)
    return range(parameter.data_ptr(), parameter.data_ptr() + span * parameter.element_size())


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
