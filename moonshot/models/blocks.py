"""A model as a chain of blocks: find them, cut the model open at their boundaries, run one alone."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moonshot.models.batch_sizes import logits_at_once, tokens_at_once
from moonshot.models.calibration import Batch
from moonshot.models.layers import layers_of
from moonshot.models.losses import (
    Loss,
    check_loss,
    check_scalar,
    gradients_of,
    loss_of,
    model_loss,
    predicts_the_next_token,
)
from moonshot.models.modules import ModelError, replaced
from moonshot.models.pieces import by_samples, can_be_taken_apart, in_pieces, is_text
from moonshot.models.precision import as_read, tensors_outside
from moonshot.models.settings import without_cache

_UNCHAINED = "a block does not read what the one before it returned"


@dataclass(frozen=True)
class Call:
    """The arguments of one block in one batch, apart from the hidden states, and how it returns them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of a transformer's blocks: its largest list of modules of one class that hold layers; or []."""
    candidates = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(True for _ in layers_of("", module))
    ]
    if not candidates:
        return []
    _, name, blocks = max(candidates, key=lambda candidate: candidate[0])
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


class _Entered(Exception):
    """Raised once every block has been called: nothing after them is wanted."""


class Chain:
    """A model cut at its blocks' boundaries.

    loss: (model, batch) -> scalar. Hidden states are the blocks' first argument and first (or only) result.
    What is outside the blocks must be `placed` to `enter` and `leave`, a block to `run`.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], loss: Loss):
        self.model, self.blocks, self.loss = model, blocks, loss
        self.outside = tensors_outside(model, blocks)
        self._returns_tuple = False
        self._can_be_taken_apart: bool | None = None

    @torch.no_grad()
    def enter(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """The first block's hidden states, and every block's other arguments, for one batch.

        Raises ModelError where a block does not read what the one before it returned.
        """
        first: list[Tensor] = []
        calls: list[Call] = []
        differ: list[Tensor] = []  # asked for once, after all blocks: the device may be behind

        def record(hidden, *args, **kwargs):
            if not calls:
                first.append(hidden.clone())
            elif hidden.shape == first[0].shape[1:] and not self._returns_tuple:
                raise IndexError("the model reads the first of a block's results")
            elif hidden.shape != first[0].shape:
                raise ModelError(_UNCHAINED)
            else:
                differ.append((hidden != (first[0] if len(calls) % 2 == 0 else -first[0])).any())
            calls.append(Call(*without_cache(args, kwargs)))
            if (
                len(calls) == len(self.blocks) > 1
            ):  # what reads the last of several is like what reads the others
                raise _Entered
            return (
                (-hidden,) if self._returns_tuple else -hidden
            )  # nothing but the next block can have read this

        with suppress(_Entered), replaced(self.blocks, [record] * len(self.blocks)):
            try:
                loss_of(self.loss, self.model, batch)
            except (TypeError, IndexError, AttributeError):
                if self._returns_tuple or not calls:
                    raise
                self._returns_tuple = True
                for seen in (first, calls, differ):
                    seen.clear()
                loss_of(self.loss, self.model, batch)
        if len(calls) != len(self.blocks):
            raise ModelError(
                f"the loss called {len(calls)} of {len(self.blocks)} blocks: it must run the whole model once"
            )
        if differ and bool(torch.stack(differ).any()):
            raise ModelError(_UNCHAINED)
        return first[0], calls

    def leave(self, batch: Batch, hidden: Tensor) -> tuple[float, Tensor]:
        """The loss of one batch from the last block's output, and its gradient there.

        Where that can be done, of as many tokens at a time as should have their logits at once (`logits_at_once`).
        Raises LossNotFiniteError.
        """
        loss, gradient = self._left(batch, hidden)
        return check_loss(loss), gradient

    def _left(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`leave`, without asking the device whether the loss is finite."""
        size = max(logits_at_once(self.model, hidden.device) // len(hidden), 1)
        is_ours = self.loss is model_loss and predicts_the_next_token(self.model)
        if not is_ours or not is_text(batch, hidden) or size >= hidden.shape[1]:
            return self._leave(batch, hidden)
        if self._can_be_taken_apart is None:
            self._can_be_taken_apart = can_be_taken_apart(self._leave, batch, hidden)
        if self._can_be_taken_apart:
            return in_pieces(self._leave, batch, hidden, size)
        return by_samples(self._leave, batch, hidden, max(tokens_at_once(self.model) // hidden.shape[1], 1))

    def _leave(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`_left`, all tokens at once."""
        leaf = as_read(hidden.detach()).requires_grad_()

        def replace(_hidden, *args, **kwargs):
            return (leaf,) if self._returns_tuple else leaf

        with replaced(self.blocks, [replace] * len(self.blocks)):
            loss = loss_of(self.loss, self.model, batch)
            check_scalar(loss)
            (gradient,) = gradients_of(loss, [leaf])
        if gradient is None:
            raise ModelError("the loss does not depend on what the last block returns")
        return loss.detach(), gradient

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """One block alone. It may change in place what it reads, so it reads copies."""
        args, kwargs = tree_map(_copied, (call.args, call.kwargs))
        output = self.blocks[index](as_read(hidden), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _copied(leaf: Any) -> Any:
    return as_read(leaf) if isinstance(leaf, Tensor) else leaf
