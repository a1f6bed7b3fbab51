"""What a batch is made of: tensors and anything else, in containers of any kind, which stay of their kind."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """An entry of a batch that belongs to all of its samples, though it may be as long as there are samples.

    Such as the weights of classes: `{"input_ids": ids, "class_weights": Shared(weights)}`. The model or the loss gets
    what is inside.
    """

    value: Any


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same containers with `function` of everything in them that is no container."""
    if isinstance(tree, Shared):
        return Shared(map_leaves(function, tree.value))
    if isinstance(tree, Mapping):
        return _mapping_like(tree, {name: map_leaves(function, value) for name, value in tree.items()})
    if isinstance(tree, list | tuple):
        return _sequence_like(tree, [map_leaves(function, value) for value in tree])
    return function(tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same containers with `function` of every tensor in them."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def leaves(tree: Any) -> Iterator[Any]:
    """All that is in containers and is none, in order."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    yield from found


def unshared(tree: Any) -> Any:
    """The same containers with what is in every Shared in its place."""
    if isinstance(tree, Shared):
        return tree.value
    if isinstance(tree, Mapping):
        return _mapping_like(tree, {name: unshared(value) for name, value in tree.items()})
    return _sequence_like(tree, list(map(unshared, tree))) if isinstance(tree, list | tuple) else tree


def samples_of(batch: Any) -> int | None:
    """How many samples a batch has; None where it has none.

    The length of input_ids, of a list that has a mapping for each sample (as in detection), or else of the first
    tensor or array that is not Shared, those that are entries of the batch before those inside of them; in a mapping
    also of a list of tensors, such as images of different sizes.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return len(batch["input_ids"])
    if _is_list_of_mappings(batch):
        return len(batch)
    entries = list(batch.values() if isinstance(batch, Mapping) else batch if _is_sequence(batch) else [batch])
    entries = [entry for entry in entries if not isinstance(entry, Shared)]
    listed = [len(entry) for entry in entries if _is_list_of_mappings(entry)]
    outer = [
        len(entry)
        for entry in entries
        if _is_array(entry) or (isinstance(batch, Mapping) and _is_listed(entry))
    ]
    inner = [len(leaf) for entry in entries for leaf in leaves(entry) if _is_array(leaf)]
    return next(iter(listed + outer + inner), None)


def take_samples(batch: Any, samples: list[int]) -> Any:
    """The given samples of a batch; what is not one entry a sample stays as it is.

    position_ids with one dimension more than input_ids, such as time, height and width, have the samples second.
    """
    count = samples_of(batch)
    if count is None or samples == list(range(count)):
        return batch
    entries = batch.values() if isinstance(batch, Mapping) else batch if _is_sequence(batch) else ()
    listed = any(
        map(_is_list_of_mappings, entries)
    )  # then other lists of that length have an entry a sample too

    def pick(entry: Any, inner: bool, in_mapping: bool) -> Any:
        if isinstance(entry, Shared):
            return entry
        if isinstance(entry, Tensor | np.ndarray):
            return entry[samples] if entry.ndim and len(entry) == count else entry
        if _is_sequence(entry):
            by_sample = len(entry) == count and (
                listed or not _are_columns(entry, count) or (in_mapping and _is_listed(entry))
            )
            if (inner and by_sample) or _is_list_of_mappings(entry):
                return _sequence_like(entry, [entry[k] for k in samples])
            return _sequence_like(entry, [pick(value, True, False) for value in entry])
        if isinstance(entry, Mapping):
            return _mapping_like(entry, {name: pick(value, True, True) for name, value in entry.items()})
        return entry

    taken = pick(batch, False, False)
    if has_position_axes(batch):
        taken = _mapping_like(taken, {**taken, "position_ids": batch["position_ids"][:, samples]})
    return taken


def has_position_axes(batch: Any) -> bool:
    """Whether the position_ids of a batch are (axes, samples, tokens)."""
    entries = [batch.get(name) for name in ("input_ids", "position_ids")] if isinstance(batch, Mapping) else []
    ids, positions = entries or (None, None)
    return isinstance(ids, Tensor) and isinstance(positions, Tensor) and positions.shape[1:] == ids.shape


def _is_array(entry: Any) -> bool:
    """Whether it is a tensor or array that could have the samples first."""
    return isinstance(entry, Tensor | np.ndarray) and entry.ndim > 0


def _is_listed(entry: Any) -> bool:
    """Whether it is a list of tensors or arrays, one for each sample where it is in a mapping."""
    return isinstance(entry, list) and bool(entry) and all(map(_is_array, entry))


def _are_columns(entry: Any, count: int) -> bool:
    """Whether all arrays in a list or tuple have as many rows as there are samples: then each is of all samples."""
    arrays = [leaf for leaf in leaves(entry) if isinstance(leaf, Tensor | np.ndarray)]
    return bool(arrays) and all(_is_array(leaf) and len(leaf) == count for leaf in arrays)


def _is_sequence(tree: Any) -> bool:
    return isinstance(tree, list | tuple)


def _is_list_of_mappings(tree: Any) -> bool:
    return _is_sequence(tree) and bool(tree) and all(isinstance(entry, Mapping) for entry in tree)


def _mapping_like(tree: Mapping, values: dict) -> Any:
    if type(tree) is dict:
        return values
    made: Any = copy.copy(tree)  # a UserDict, a BatchEncoding, a ModelOutput
    for name, value in values.items():
        made[name] = value
    return made


def _sequence_like(tree: Any, values: list) -> Any:
    if hasattr(tree, "_fields"):
        return type(tree)(*values)  # a named tuple
    return values if type(tree) is list else type(tree)(values)
