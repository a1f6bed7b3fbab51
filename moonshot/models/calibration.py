"""Calibration data: whatever a caller has, as a list of batches for `model(**batch)`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class CalibrationError(ValueError):
    """Calibration data that is empty, too little or of the wrong kind."""


def as_batches(calibration: Any, batch_tokens: int = 2048) -> list[Batch]:
    """A list of dict batches, each with `input_ids` (samples, tokens), from token ids, batches or a DataLoader.

    calibration: an integer tensor (samples, tokens), split into batches of about `batch_tokens` tokens, so that the
    logits of one batch stay small; or an iterable whose elements are such tensors or mappings of tensors.
    """
    if isinstance(calibration, Tensor):
        calibration = calibration[None] if calibration.ndim == 1 else calibration
        size = max(batch_tokens // max(calibration.shape[-1], 1), 1)
        batches: list[Any] = list(calibration.split(size)) if calibration.numel() else []
    elif isinstance(calibration, str | bytes) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be a tensor of token ids, a list of batches or a DataLoader, got "
            f"{type(calibration).__name__}: tokenize text with moonshot.models.calibration.windows"
        )
    else:
        batches = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    if not batches:
        raise CalibrationError("the calibration data is empty: give at least one sample")
    return [_as_batch(batch, index) for index, batch in enumerate(batches)]


def _as_batch(batch: Any, index: int) -> Batch:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"calibration batch {index} must be a tensor or a mapping of tensors, got {type(batch).__name__}"
        )
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    ids = tensors.get("input_ids")
    if ids is None:
        raise CalibrationError(f"calibration batch {index} has no input_ids")
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise CalibrationError(
            f"input_ids of calibration batch {index} must be integers (samples, tokens) and not empty, got "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    mask = tensors.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise CalibrationError(f"attention_mask of calibration batch {index} must have the shape of input_ids")
    if mask is not None and not bool(mask.any()):
        raise CalibrationError(f"calibration batch {index} is padding only")
    return tensors


def token_mask(batch: Batch) -> Tensor:
    """True (samples, tokens) where a token is real, False where it is padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return mask.bool()


def count_samples(batches: list[Batch]) -> int:
    return sum(len(batch["input_ids"]) for batch in batches)


def take(batch: Batch, samples: list[int]) -> Batch:
    """The given samples of a batch; what is not one entry a sample is kept as it is."""
    count = len(batch["input_ids"])
    return {
        name: tensor[samples] if tensor.ndim and len(tensor) == count else tensor
        for name, tensor in batch.items()
    }


def set_aside(batches: list[Batch], seed: int, share: float = 0.25) -> tuple[list[Batch], list[Batch]]:
    """(the batches without, and those with) a random share of the samples. CalibrationError below 8 samples."""
    count = count_samples(batches)
    if count < 8:
        raise CalibrationError(
            f'objective="auto" sets a quarter of the samples aside and needs at least 8, got {count}: '
            "give more, or choose the weights yourself"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = set(torch.randperm(count, generator=generator)[: round(share * count)].tolist())
    rest: list[Batch] = []
    aside: list[Batch] = []
    first = 0
    for batch in batches:
        indices = range(len(batch["input_ids"]))
        for target, wanted in ((rest, False), (aside, True)):
            if samples := [k for k in indices if (first + k in chosen) is wanted]:
                target.append(take(batch, samples))
        first += len(indices)
    return rest, aside


def open_dataset(data: str) -> Any:
    """A dataset by its datasets name[:config[:split]], the split "train" if none is given.

    Raises CalibrationError where it does not load.
    """
    from datasets import load_dataset

    name, configuration, split = [*data.split(":"), "", ""][:3]
    try:
        return load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the library has no common base class for what it raises
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"{data!r} is no file, folder or loadable dataset: {first}") from error


def windows(tokenizer: Any, text: str, samples: int, length: int, seed: int | None = 0) -> Tensor:
    """Token ids (samples, length) of windows of a text: at seeded random offsets, or from its start on for None.

    Raises CalibrationError where the text is too short.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if samples < 1 or length < 2:
        raise CalibrationError("at least one sample of at least two tokens is needed")
    needed = samples * length if seed is None else length + samples
    if len(ids) < needed:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, {samples} samples of {length} need {needed}: give more text, "
            "or lower nsamples or seqlen"
        )
    if seed is None:
        return ids[:needed].reshape(samples, length)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randperm(len(ids) - length, generator=generator)[:samples]
    return ids[offsets[:, None] + torch.arange(length)]


def language_model_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The model's own next-token loss, its mean over the batch's real tokens."""
    batch = dict(batch)
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].masked_fill(~token_mask(batch), -100)
    return model(**batch, use_cache=False).loss
