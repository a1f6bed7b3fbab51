"""The loss from the hidden states of a text, a few tokens at a time.

After a transformer's blocks each token goes its own way, through the last norm and the head, so that the model's loss
on some of a text's tokens is that of a shorter text. The logits of a whole batch, the largest arrays by far where the
vocabulary is large, are then never there at once.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moonshot.models.calibration import Batch, next_token_mask

_IGNORED = -100  # the label of what is no target
_TRIED = 24  # tokens of a text on which it is tried whether the loss may be taken in pieces


class Piece(NamedTuple):
    """Some tokens of a text, whose targets are all but the first of them, and how many targets they are."""

    tokens: slice
    batch: Batch
    targets: int


def is_text(batch: Batch, hidden: Tensor) -> bool:
    """Whether all that is in a batch has an entry for each token of each sample, as hidden states do."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return isinstance(ids, Tensor) and all(
        isinstance(value, Tensor) and value.shape == ids.shape == hidden.shape[:2] for value in batch.values()
    )


def pieces(batch: Batch, size: int) -> Iterator[Piece]:
    """A text in pieces of so many targets a sample, the last of fewer; those without any are left out."""
    at_token = _targets(batch).sum(0).tolist()
    for first in range(0, len(at_token) - 1, size):
        tokens = slice(first, first + size + 1)
        targets = sum(at_token[first + 1 : tokens.stop])
        if targets:
            yield Piece(tokens, {name: value[:, tokens] for name, value in batch.items()}, targets)


def in_pieces(
    leave: Callable[[Batch, Tensor], tuple[Tensor, Tensor]], batch: Batch, hidden: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The mean loss over a text's targets, and its gradient, from those of its pieces (`pieces`)."""
    found = list(pieces(batch, size))
    total, gradient = sum(piece.targets for piece in found), torch.zeros_like(hidden)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for piece in found:
        of_piece, at_piece = leave(piece.batch, hidden[:, piece.tokens])
        loss += of_piece * piece.targets / total
        gradient[:, piece.tokens] += at_piece.to(gradient.dtype) * (piece.targets / total)
    return loss, gradient


def by_samples(
    leave: Callable[[Batch, Tensor], tuple[Tensor, Tensor]], batch: Batch, hidden: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The mean loss of samples with as many targets each, and its gradient, from those of `size` of them at a time."""
    losses, gradients = [], []
    for first in range(0, len(hidden), size):
        samples = slice(first, first + size)
        loss, gradient = leave({name: value[samples] for name, value in batch.items()}, hidden[samples])
        share = len(gradient) / len(hidden)
        losses.append(loss.double() * share)
        gradients.append(gradient * share)
    return torch.stack(losses).sum(), torch.cat(gradients)


def can_be_taken_apart(
    leave: Callable[[Batch, Tensor], tuple[Tensor, Tensor]], batch: Batch, hidden: Tensor
) -> bool:
    """Whether `in_pieces` gives the loss and the gradient that `leave` gives, tried on some tokens of one text."""
    is_target = _targets(batch)[0]
    first = max(int(is_target.int().argmax()) - 1, 0)
    tokens = slice(first, first + _TRIED)
    short = {name: value[:1, tokens] for name, value in batch.items()}
    try:
        whole, gradient = leave(short, hidden[:1, tokens])
        loss, found = in_pieces(leave, short, hidden[:1, tokens], _TRIED // 3)
    except (TypeError, IndexError, AttributeError, RuntimeError, ValueError, ZeroDivisionError):
        return False  # whatever a model does with a text that is cut short
    error = (found.float() - gradient.float()).norm()
    return bool((whole - loss).abs() <= 1e-2 * whole.abs()) and bool(error <= 2e-2 * gradient.float().norm())


def _targets(batch: Batch) -> Tensor:
    """(samples, tokens), True for what the token before it is to predict."""
    if "labels" in batch:
        return batch["labels"] != _IGNORED
    mask = next_token_mask(batch)
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask
