"""A pruned model without its zeros, where whole units are zero: an ordinary smaller model."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.layer.columns import Columns
from moonshot.models.modules import ModelError
from moonshot.models.precision import home
from moonshot.models.targets import listed
from moonshot.models.units import Units, reason_against, units_of


@torch.no_grad()
def shrink(model: nn.Module) -> nn.Module:
    """A new model of the same class without the units that are zero, and with the same outputs up to rounding.

    model: a transformers model in some of whose blocks the layer that reads an MLP's hidden units, or the heads of an
    attention, has zero columns, such as `prune(model, calibration, column_patterns(model, 0.25))` leaves. It stays as
    it is. Every block must have the same number of them, which is what a configuration can say.

    Raises ModelError where blocks differ, where nothing is zero, and for a model whose sizes do not follow from its
    configuration alone.
    """
    units = units_of(model)
    remaining = {each.reader: _remaining(model, each) for each in units}
    return _cut_down(model, units, remaining)


def check_shrinks(model: nn.Module, patterns: Mapping[str, Columns]) -> None:
    """Raises ModelError where `shrink` will, once the layers are pruned to these patterns.

    model: may be on the meta device. patterns: those of `column_patterns`, or some.
    """
    units = units_of(model)
    remaining = {}
    for each in units:
        pattern = patterns.get(each.reader, Columns(0, each.columns))
        left = each.count - pattern.pruned_groups((1, each.count * each.columns))
        remaining[each.reader] = torch.arange(left)
    _cut_down(model, units, remaining)


def _cut_down(model: nn.Module, units: list[Units], remaining: dict[str, Tensor]) -> nn.Module:
    """A model with the units of these indices, by the name of the layer that reads them."""
    sizes = _sizes(units, remaining)
    if all(getattr(model.config, field) == size for field, size in sizes.items()):
        raise ModelError("no unit is zero as a whole: prune with column_patterns(model, 0.25) first")
    if reason := reason_against(model.config, sizes):
        raise ModelError(f"{type(model.config).__name__} does not allow {sizes}: {reason}")
    config: Any = copy.deepcopy(model.config)
    for field, size in sizes.items():
        setattr(config, field, size)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for each in units:
        left = remaining[each.reader]
        _cut(tensors, f"{each.reader}.weight", left, each.columns, axis=1)
        for maker, rows in each.makers.items():
            _cut(tensors, f"{maker}.weight", left, rows, axis=0)
            _cut(tensors, f"{maker}.bias", left, rows, axis=0)
    kind: Any = type(model)
    with torch.device(home(model)):
        small = kind(config)
    try:
        small.load_state_dict(tensors, assign=True)  # each in its own dtype
    except RuntimeError as error:
        raise ModelError(
            f"{kind.__name__} has other layers whose size follows from {listed(sizes)} in its configuration, so that "
            f"its units cannot be cut out: {str(error).splitlines()[-1].strip()}"
        ) from error
    small.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    small.train(model.training)
    return small


def _remaining(model: nn.Module, units: Units) -> Tensor:
    """The indices of the units that the reader has nonzero columns for."""
    weight: Tensor = model.get_submodule(units.reader).weight  # type: ignore[assignment]
    columns = (weight != 0).any(dim=0)
    return columns.reshape(-1, units.columns).any(dim=1).nonzero().flatten()


def _sizes(units: list[Units], remaining: dict[str, Tensor]) -> dict[str, int]:
    """{field of the configuration: its new value}. Raises ModelError where blocks differ or nothing is left."""
    sizes: dict[str, int] = {}
    first: dict[str, Units] = {}
    for each in units:
        left = len(remaining[each.reader])
        for field, size in each.changes(left).items():
            other = first.setdefault(field, each)
            if sizes.setdefault(field, size) != size:
                raise ModelError(
                    f"{other.reader} has {len(remaining[other.reader])} units left and {each.reader} {left}, but the "
                    f"configuration has one {field} for all blocks: prune the same share of every block, such as with "
                    "column_patterns(model, 0.25)"
                )
            if not left:
                raise ModelError(f"nothing is left of {each.reader}: prune fewer columns")
    return sizes


def _cut(tensors: dict[str, Tensor], name: str, left: Tensor, size: int, axis: int) -> None:
    """Leave only the units with the indices `left` in a tensor, if there is one of this name. size: of a unit."""
    if name in tensors:
        tensor = tensors[name]
        indices = (left[:, None] * size + torch.arange(size, device=left.device)).flatten()
        tensors[name] = tensor.index_select(axis, indices.to(tensor.device))
