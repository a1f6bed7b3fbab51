"""How good a language model is: perplexity, always with its context length."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moonshot.models.blocks import evaluating
from moonshot.models.calibration import Batch, batch_samples, model_loss, take


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss over `windows` windows of `context` tokens each."""

    value: float
    context: int
    windows: int

    def __str__(self) -> str:
        return f"{self.value:.2f} (context {self.context}, {self.windows} windows)"


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, batch_size: int = 8) -> Perplexity:
    """Perplexity of a causal language model on token ids (windows, context)."""
    if ids.ndim != 2 or ids.numel() == 0 or ids.shape[1] < 2:
        raise ValueError(f"ids must be (windows, context) with a context of 2 or more, got {tuple(ids.shape)}")
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model):
        for part in ids.split(batch_size):
            total += float(model_loss(model, {"input_ids": part.to(device)})) * len(part)
    return Perplexity(float(torch.tensor(total / len(ids)).exp()), ids.shape[1], len(ids))


@torch.no_grad()
def sample_losses(model: nn.Module, batches: list[Batch], loss: Callable[..., Tensor] = model_loss) -> Tensor:
    """The loss of each sample (samples,), on the CPU."""
    with evaluating(model):
        return torch.stack(
            [
                loss(model, take(batch, [index])).float().cpu()
                for batch in batches
                for index in range(batch_samples(batch))
            ]
        )
