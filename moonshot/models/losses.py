"""The training loss: the model's own or a caller's, of a batch, of each sample, of many."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from math import isfinite
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moonshot.models.batch_tree import leaves, map_tensors, unshared
from moonshot.models.calibration import Batch, CalibrationError, batch_samples, next_token_mask, take
from moonshot.models.modules import ModelError, evaluating
from moonshot.models.precision import as_given

Loss = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> scalar, the mean over the batch


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss, its mean over the batch; a causal language model without labels predicts the next token."""
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"a batch is a {type(batch).__name__}: pass loss=, a callable (model, batch) -> scalar, or batches that "
            "are mappings for model(**batch)"
        )
    batch = dict(batch)
    if not isinstance(ids := batch.get("input_ids", torch.empty(0)), Tensor):
        raise CalibrationError(f'input_ids are a {type(ids).__name__}: give a tensor (return_tensors="pt")')
    if "labels" not in batch and "input_ids" in batch and predicts_the_next_token(model):
        mask = next_token_mask(batch)
        ids = batch["input_ids"].long()  # a cross entropy takes no int32
        batch["labels"] = ids if mask is None else ids.masked_fill(~mask, -100)
    loss = getattr(_without_cache(model, batch), "loss", None)
    if loss is None:
        raise CalibrationError(
            f"{type(model).__name__} returns no loss for a batch of {', '.join(batch)}: add labels, or pass loss=, a "
            "callable (model, batch) -> scalar"
        )
    return loss


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean cross entropy of every token but the first of each text, from the logits; in float32.

    A model's own loss may have its routers' in it as well, or not compare logits with the token that comes next. That
    of a model that returns no logits is taken all the same. ids: token ids (texts, tokens).
    """
    logits = getattr(_without_cache(model, {"input_ids": ids}), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        return model_loss(model, {"input_ids": ids})
    following = ids.long().roll(-1, 1).to(logits.device)  # a cross entropy takes no int32
    following[:, -1] = -100  # which it leaves out
    return cross_entropy(logits.flatten(0, 1).float(), following.flatten())


def _without_cache(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What a model returns for a batch."""
    more = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    return model(**unshared(batch) | more)


def predicts_the_next_token(model: nn.Module) -> bool:
    """Whether a model is a causal language model, by transformers' own table; one it doesn't know is taken for one."""
    if sys.modules.get("transformers") is None:  # then no model is one of its own
        return True
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = isinstance(model, PreTrainedModel) and type(model).__module__.startswith("transformers.")
    return not known or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def loss_of(loss: Loss, model: nn.Module, batch: Batch) -> Any:
    """What a loss says of a copy of the batch, which the model may change in place; half precision as float32.

    Where the model draws random numbers, such as a mask, they are the same each time that it reads the batch.
    """
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    seed = crc32(repr([tensor.flatten()[:16].tolist() for tensor in tensors[:1]]).encode())
    with torch.random.fork_rng(sorted(device.index for device in devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        return loss(model, unshared(map_tensors(lambda tensor: as_given(tensor, model), batch)))


def gradients_of(loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss. Raises ModelError where it has none at any of the tensors."""
    if loss.requires_grad and tensors:
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        if any(gradient is not None for gradient in gradients):
            return list(gradients)
    raise ModelError(
        "the loss has no gradient: it must be computed from what the model returns, without detach(), item(), "
        "torch.no_grad() or reentrant checkpoints"
    )


class LossNotFiniteError(ModelError):
    """A loss that is NaN or infinite."""


@contextmanager
def naming_sample(batch: int, samples: int, alone: Callable[[int], Any]) -> Iterator[None]:
    """Say in a LossNotFiniteError at which sample of a batch the loss is not finite.

    batch: its index, samples: how many it has; alone: raises the error for a sample that has such a loss by itself.
    """
    try:
        yield
    except LossNotFiniteError as error:
        for sample in range(samples):
            try:
                alone(sample)
            except LossNotFiniteError:
                break
        else:
            sample = 0
        error.add_note(f"at sample {sample} of batch {batch} of the calibration samples that are used")
        raise


def check_scalar(loss: Any) -> None:
    """Raises ModelError for a loss that is no scalar."""
    if not isinstance(loss, Tensor):
        raise ModelError(f"the loss must be a scalar tensor, got {type(loss).__name__}")
    if loss.ndim:
        raise ModelError(f"the loss must be a finite scalar, got {loss.detach()}")


def check_loss(loss: Any) -> float:
    """The value of a loss. Raises ModelError for one that is no scalar, LossNotFiniteError if it is not finite."""
    check_scalar(loss)
    value = float(loss.detach())
    if not isfinite(value):
        largest = " in float16, which holds 65504 at most" if loss.dtype == torch.float16 else ""
        raise LossNotFiniteError(f"the loss must be a finite scalar, got {value}{largest}")
    return value


@torch.no_grad()
def sample_losses(model: nn.Module, batches: list[Batch], loss: Callable[..., Tensor] = model_loss) -> Tensor:
    """The loss of each sample (samples,), on the CPU."""
    with evaluating(model):
        losses = [
            float(loss(model, take(batch, [index])))
            for batch in batches
            for index in range(batch_samples(batch))
        ]
    return torch.tensor(losses, dtype=torch.float32, device="cpu")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[Batch], loss: Callable[..., Tensor] = model_loss) -> float:
    """The mean loss over all samples, each batch in one pass, with the model in the mode that it is in."""
    total = sum(float(loss(model, batch)) * batch_samples(batch) for batch in batches)
    return total / max(sum(batch_samples(batch) for batch in batches), 1)
