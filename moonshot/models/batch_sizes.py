"""How much is there at once: on a GPU as much as takes an eighth of its memory."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.models.calibration import Batch, batch_tokens
from moonshot.models.layer_view import LayerView
from moonshot.models.precision import tensors_of

_TOKENS = 2048, 2**14  # in a batch, and at most on a GPU
_LOGITS = 2**25, 2**28  # numbers, and at most on a GPU
LOGIT_ARRAYS = 4  # of the size of a batch's logits, in float32, in the loss and its gradient
_ACTIVATIONS = (
    4  # numbers for each that a layer reads or returns: it, a recorded copy, and the gradients of both
)
_SHARE = 8  # the part of a GPU's memory, all of it and not what is free, is one divided by this
_TILED = ("sdpa", "flash", "flex")  # attention that never has all of its scores at once
_HEADS = 64  # of any other, at most


def tokens_at_once(model: Any, in_pieces: bool = True) -> int:
    """How many tokens a batch should have: 2048, or as many as have their logits at once.

    in_pieces: whether the logits of a batch need not all be there at once (models.pieces).
    """
    return _TOKENS[0] if in_pieces else min(_TOKENS[0], logits_at_once(model))


def logits_at_once(model: Any, device: torch.device | None = None) -> int:
    """How many tokens should have their logits at once: so many that these are about 2**25 numbers.

    device: a GPU may have up to 2**28 at once, as long as they and their gradients take an eighth of its memory.
    """
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    vocabulary = len(getattr(embeddings, "weight", ()))
    return max(_count(_LOGITS, 4 * LOGIT_ARRAYS, device) // max(vocabulary, 1), 1)


def replayed_at_once(
    model: nn.Module, parts: Iterable[Iterable[LayerView]], length: int, itemsize: int, device: torch.device
) -> int:
    """How many tokens run through a part at once: 2048, and on a GPU up to 16384.

    As many, by powers of two, as have the activations of the largest part in an eighth of the GPU's memory.

    parts: the layers of each; length: tokens of a text; itemsize: bytes of a number in the passes.
    """
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    scores = 0 if attention.startswith(_TILED) else _HEADS * length
    largest = max(sum(map(_width, layers)) for layers in parts)
    return _count(_TOKENS, _ACTIVATIONS * (largest + scores) * itemsize, device)


def fits_whole(model: nn.Module, itemsize: int, device: torch.device, shares: int = 1) -> bool:
    """Whether a whole model takes at most so many eighths of a GPU's memory.

    itemsize: bytes of a number in the passes.
    """
    size = sum(max(tensor.itemsize, itemsize) * tensor.numel() for tensor in tensors_of(model))
    return device.type == "cuda" and size <= shares * _share(device)


def joined(batches: list[Batch], tokens: int) -> list[Batch]:
    """The same samples in the same order, with as many in a batch as have so many tokens.

    Joined are neighbours that have nothing but texts of one length; all others stay as they are.
    """
    groups: list[list[Batch]] = []
    for batch in batches:
        group = groups[-1] if groups else []
        if group and _can_be_joined(group[0], batch) and sum(map(batch_tokens, [*group, batch])) <= tokens:
            group.append(batch)
        else:
            groups.append([batch])
    return [
        group[0] if len(group) == 1 else {"input_ids": torch.cat([batch["input_ids"] for batch in group])}
        for group in groups
    ]


def _can_be_joined(*batches: Batch) -> bool:
    texts = [
        batch["input_ids"] for batch in batches if isinstance(batch, Mapping) and set(batch) == {"input_ids"}
    ]
    lengths = {text.shape[1:] for text in texts if isinstance(text, Tensor)}
    return len(texts) == len(batches) and len(lengths) == 1


def _width(layer: LayerView) -> int:
    """Numbers that a layer reads and returns for a token."""
    m, d = layer.shape
    return layer.groups * (m + d)


def _count(limits: tuple[int, int], size: int, device: torch.device | None) -> int:
    """How many of `size` bytes each: the lower limit; on a GPU twice as many while they fit, up to the other limit."""
    count, most = limits
    if device is None or device.type != "cuda":
        return count
    while 2 * count <= most and 2 * count * size <= _share(device):
        count *= 2
    return count


def _share(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory // _SHARE
