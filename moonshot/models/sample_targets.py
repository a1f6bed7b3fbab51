"""How many targets each sample of a batch has: what its loss is the mean over."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.models.calibration import Batch, CalibrationError, batch_samples, next_token_mask, take
from moonshot.models.losses import Loss, model_loss, predicts_the_next_token

_IGNORED = -100  # the label of what is no target, for every loss of transformers and torch


def with_equal_targets(
    model: nn.Module, batches: list[Batch], loss: Loss
) -> tuple[list[Batch], dict[str, str]]:
    """Batches whose samples have as many targets as each other, and why samples are left out, by batch and sample.

    The mean loss of such a batch is the mean of its samples' losses, each the mean over its own targets, so that
    nothing depends on how the samples were batched. A sample without a target has no loss, if that is the model's own,
    and is left out.

    Raises CalibrationError where no sample is left.
    """
    found: list[Batch] = []
    left_out: dict[str, str] = {}
    for index, batch in enumerate(batches):
        counts = _targets(model, batch, loss)
        if counts is None:
            found.append(batch)
            continue
        if len(counts) != batch_samples(batch):
            raise CalibrationError(
                f"calibration batch {index} has {batch_samples(batch)} samples and labels for {len(counts)}"
            )
        if loss is not model_loss:
            counts = [count or -1 for count in counts]  # whatever they mean
        left_out |= {f"batch {index}, sample {k}": "it has no target" for k, n in enumerate(counts) if not n}
        runs = groupby(range(len(counts)), key=counts.__getitem__)
        found += [take(batch, list(run)) for targets, run in runs if targets]
    if not found:
        raise CalibrationError(
            "no calibration sample has a target: a text needs two tokens or more that are no padding, labels one that "
            f"is not {_IGNORED}"
        )
    return found, left_out


def _targets(model: nn.Module, batch: Batch, loss: Loss) -> list[Any] | None:
    """For each sample how many targets it has, None where labels do not say."""
    if not isinstance(batch, Mapping):
        return None
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if isinstance(labels, list | tuple) and labels and all(isinstance(label, Mapping) for label in labels):
        return [
            1 + _length(label) for label in labels
        ]  # of detection: without an object there still is a target
    text = ids if loss is model_loss and isinstance(ids, Tensor) and predicts_the_next_token(model) else None
    if labels is None and text is not None:
        mask = next_token_mask(batch)
        labels = torch.zeros_like(text) if mask is None else torch.where(mask, 0, _IGNORED)
    if not isinstance(labels, Tensor) or not labels.ndim or labels.is_floating_point():
        return None
    if text is not None and labels.shape == text.shape:
        labels = labels[..., 1:]  # each token predicts the next one
    of_maps = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", _IGNORED)
    real = (labels != _IGNORED) & (labels != (of_maps if labels.ndim > 2 else _IGNORED))
    return real.reshape(len(labels), -1).sum(1).tolist()


def _length(label: Mapping) -> int:
    return next((len(value) for value in label.values() if isinstance(value, Tensor) and value.ndim), 0)
