"""How good a model is: perplexity, always with its context length, and accuracy, with its number of images."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moonshot.errors import ArgumentError, ArgumentTypeError
from moonshot.models.batch_sizes import tokens_at_once
from moonshot.models.calibration import Batch, check_vocabulary
from moonshot.models.losses import next_token_loss
from moonshot.models.modules import evaluating
from moonshot.models.precision import home

_LARGEST = math.log(sys.float_info.max)  # a loss whose exp is still a number


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss over `windows` windows of `context` tokens each."""

    value: float
    context: int
    windows: int

    name: ClassVar[str] = "perplexity"

    def __str__(self) -> str:
        return f"{self.value:.2f} (context {self.context}, {self.windows} windows)"


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, batch_size: int | None = None) -> Perplexity:
    """Perplexity of a causal language model, from its logits: its own loss may have more in it (next_token_loss).

    ids: token ids (windows, context).
    batch_size: windows at once; unless given as many as 2048 tokens are, fewer where the vocabulary is large.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentTypeError(f"ids must be a tensor (windows, context) of integers, got {got}")
    if ids.ndim != 2 or ids.numel() == 0 or ids.shape[1] < 2:
        raise ArgumentError(
            f"ids must be (windows, context) with a context of 2 or more, got {tuple(ids.shape)}"
        )
    check_vocabulary(model, [{"input_ids": ids}])
    device = home(model)
    total = 0.0
    size = max(tokens_at_once(model) // ids.shape[1], 1) if batch_size is None else batch_size
    with evaluating(model):
        for part in ids.split(size):
            total += float(next_token_loss(model, part.to(device))) * len(part)
    mean = total / len(ids)
    return Perplexity(math.inf if mean >= _LARGEST else math.exp(mean), ids.shape[1], len(ids))


@dataclass(frozen=True)
class Accuracy:
    """The share of `images` for which the model's highest logit is that of their label; not where one is NaN."""

    value: float
    images: int

    name: ClassVar[str] = "accuracy"

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % ({self.images} images)"


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> Accuracy:
    """Accuracy of an image classifier on batches with `labels` (images,), such as `models.images.ImageBatches`."""
    parameter = next(model.parameters())
    right = images = 0
    with evaluating(model):
        for batch in batches:
            inputs = {name: _like(tensor, parameter) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            right += int(((logits.argmax(-1) == labels) & ~logits.isnan().any(-1)).sum())
            images += len(labels)
    if not images:
        raise ArgumentError("there are no images to measure accuracy on")
    return Accuracy(right / images, images)


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device and, if it is not of integers, in its dtype."""
    return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else tensor.dtype)
