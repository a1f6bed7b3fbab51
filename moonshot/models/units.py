"""Units of a transformer's block that can be cut out whole: hidden units of its MLP, groups of its attention heads.

A unit is read by some input columns of one layer, and made by some rows of others. Where the columns are zero, the rows
are of no effect.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moonshot.layer.columns import Columns
from moonshot.models.blocks import find_blocks
from moonshot.models.modules import ModelError

# (layers that make the hidden units, the layer that reads them), by their names in a block's MLP
_MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
_ATTENTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
)


@dataclass(frozen=True)
class Units:
    """The units that one layer of a block reads.

    reader: the name of that layer; count: how many units it reads; columns: how many of its input columns are a unit.
    makers: {name: rows of a unit} of the layers whose rows make the units.
    sizes: {field of the model's configuration: how much of it a unit is}.
    """

    reader: str
    count: int
    columns: int
    makers: dict[str, int]
    sizes: dict[str, int]

    def pattern(self, config: Any, sparsity: float) -> Columns:
        """The pattern that prunes this fraction of the units, or the next one to it that a configuration allows."""
        wanted = round((1 - sparsity) * self.count)
        by_distance = sorted(range(1, self.count + 1), key=lambda left: (abs(left - wanted), -left))
        allowed = (left for left in by_distance if reason_against(config, self.changes(left)) is None)
        return Columns(1 - next(allowed, self.count) / self.count, self.columns)

    def changes(self, left: int) -> dict[str, int]:
        """What changes in the configuration where so many units are left."""
        return {field: left * size for field, size in self.sizes.items()}


def reason_against(config: Any, changes: dict[str, int]) -> str | None:
    """Why a configuration cannot be changed so, in transformers' words; None where it can."""
    try:
        type(config).from_dict(config.to_dict() | changes)
    except Exception as error:  # what checks of a configuration raise has no common base class
        return str(error.__cause__ or error).strip().splitlines()[-1].strip()
    return None


def units_of(model: nn.Module) -> list[Units]:
    """The units of every block of a transformers model that its configuration can do with fewer of.

    Raises ModelError where there are none.
    """
    config = getattr(model, "config", None)
    found = [units for block in _all_blocks(model, config) for units in _of_block(config, *block)]
    if not found:
        channels = (
            "; the channels inside a block of convolutions follow from its outputs, by a ratio that no configuration "
            "says: prune them to 2:4 or a fraction, and save with --compact"
        )
        raise ModelError(
            f"{type(model).__name__} has no units that can be cut out: known are the MLPs and attention heads of "
            "transformers' models whose configuration has their number"
            + channels
            * any(isinstance(module, nn.Conv2d) for module in model.modules())
        )
    return found


def column_patterns(model: nn.Module, sparsity: float) -> dict[str, Columns]:
    """{layer name: pattern} that prunes this fraction of the units of every block; `prune` takes it as its pattern.

    model: a transformer, of transformers. sparsity: the fraction of the units, 0 to 1.

    Where the model's configuration does not allow so many (a Llama's number of heads must divide its hidden size), it
    is the next fraction that it allows. Raises PatternError for what is no fraction, ModelError as `units_of` does.
    """
    Columns(sparsity)
    units, config = units_of(model), model.config
    patterns = {(each.count, each.columns): each.pattern(config, sparsity) for each in units}
    return {each.reader: patterns[each.count, each.columns] for each in units}


def _all_blocks(model: nn.Module, config: Any) -> list[tuple[str, nn.Module]]:
    """(name, block) of a transformer's blocks, in an encoder-decoder of both sides."""
    if not getattr(config, "is_encoder_decoder", False):
        return find_blocks(model)
    sides = [
        (name, side)
        for name, side in model.named_modules()
        if name.rpartition(".")[2] in ("encoder", "decoder")
    ]
    return list(
        {f"{name}.{inner}": block for name, side in sides for inner, block in find_blocks(side)}.items()
    )


def _of_block(config: Any, prefix: str, block: nn.Module) -> Iterator[Units]:
    sides = [f"{side}_ffn_dim" for side in ("encoder", "decoder") if side in prefix.split(".")]
    field = next((key for key in (*sides, *_WIDTHS) if isinstance(getattr(config, key, None), int)), None)
    for name, module in block.named_modules(prefix=prefix):
        for makers, reader in _MLPS:
            layers = _named(module, (*makers, reader))
            if layers and field and {_outputs(layer) for layer in layers[:-1]} == {getattr(config, field)}:
                rows = {f"{name}.{maker}": 1 for maker in makers}
                yield Units(f"{name}.{reader}", getattr(config, field), 1, rows, {field: 1})
                break
        for makers, reader in _ATTENTIONS:
            if _named(module, (*makers, reader)) and (units := _heads(config, name, module, makers, reader)):
                yield units


def _heads(config: Any, name: str, module: nn.Module, makers: tuple[str, ...], reader: str) -> Units | None:
    """Groups of heads that share keys and values; None where the configuration ties their number to other sizes."""
    width = getattr(config, "head_dim", None)
    heads, groups = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if not (width and heads and groups) or _outputs(module.get_submodule(makers[0])) != heads * width:
        return None
    together = heads // groups
    rows = dict(zip((f"{name}.{maker}" for maker in makers), (together * width, width, width), strict=True))
    sizes = {"num_attention_heads": together, "num_key_value_heads": 1}
    return Units(f"{name}.{reader}", groups, together * width, rows, sizes)


def _named(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The linear layers of these names in a module; [] unless all are there."""
    modules = dict(module.named_modules())
    linear = [modules[name] for name in names if isinstance(modules.get(name), nn.Linear)]
    return linear if len(linear) == len(names) else []


def _outputs(layer: Any) -> int:
    return layer.out_features
