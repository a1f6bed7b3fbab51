"""Calibration data: whatever a caller has, as a list of batches for `model(**batch)`."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moonshot.errors import ArgumentTypeError, MoonshotError, meant_path
from moonshot.extras import from_extra
from moonshot.models.batch_tree import has_position_axes, leaves, map_tensors, samples_of, take_samples
from moonshot.models.ranks import Ranks

Batch = Any  # a mapping or a sequence of tensors, or one tensor: what `loss(model, batch)` takes
_OF_IMAGES = ("pixel_values", "image_", "video_")  # what entries are called that may have several for a text


class CalibrationError(MoonshotError):
    """Calibration data that is empty, too little or of the wrong kind."""


def as_batches(calibration: Any, batch_tokens: int = 2048, batch_samples: int = 16) -> list[Batch]:
    """A list of batches from token ids, another tensor of samples, batches or a DataLoader.

    calibration: an integer tensor (samples, tokens), split into batches {"input_ids": ...} of about `batch_tokens`
    tokens, so that the logits of one batch stay small; any other tensor (samples, ...), split by `batch_samples`; or
    an iterable of batches. A batch is a mapping for `model(**batch)`, or a tensor or sequence for one's own loss.
    """
    if isinstance(calibration, Tensor):
        tokens = _is_integer(calibration)
        calibration = calibration[None] if calibration.ndim == 1 and tokens else calibration
        size = max(batch_tokens // max(calibration.shape[-1], 1), 1) if tokens else batch_samples
        batches: list[Any] = list(calibration.split(size)) if calibration.numel() else []
    elif isinstance(calibration, str | bytes) or not isinstance(calibration, Iterable):
        raise ArgumentTypeError(
            "calibration must be a tensor of token ids, a list of batches or a DataLoader, got "
            f"{type(calibration).__name__}: tokenize text with moonshot.models.calibration.windows"
        )
    else:
        batches = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    if not batches:
        raise CalibrationError("the calibration data is empty: give at least one sample")
    return [_as_batch(batch, index) for index, batch in enumerate(batches)]


def checked_batches(
    model: Any, calibration: Any, device: torch.device, batch_tokens: int = 2048
) -> list[Batch]:
    """`as_batches` for a model, on a device.

    Raises CalibrationError for texts longer than the model can read, and for tokens that it does not know.
    """
    batches = [moved(batch, device) for batch in as_batches(calibration, batch_tokens)]
    check_length(model, batches)
    check_vocabulary(model, batches)
    return batches


def longest_text(model: Any) -> int | None:
    """How many tokens a model can read at most; None where it does not say."""
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config and hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def check_length(model: Any, batches: list[Batch]) -> None:
    """Raises CalibrationError for texts with more tokens than the model has positions."""
    longest = longest_text(model)
    for index, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if longest is not None and isinstance(ids, Tensor) and ids.shape[-1] > longest:
            raise CalibrationError(
                f"calibration batch {index} has texts of {ids.shape[-1]} tokens, the model has {longest} positions: "
                "give shorter texts (seqlen)"
            )


def check_vocabulary(model: Any, batches: list[Batch]) -> None:
    """Raises CalibrationError for token ids that the model has no embedding for.

    Where a batch has more than text, as a model of images does, ids may stand for something else.
    """
    try:
        size = len(model.get_input_embeddings().weight)
    except (AttributeError, TypeError, NotImplementedError):  # a model without, or that does not tell
        return
    for index, batch in enumerate(batches):
        tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or any(tensor.is_floating_point() for tensor in tensors):
            continue
        least, largest = map(int, ids.aminmax())
        if least < 0 or largest >= size:
            raise CalibrationError(
                f"batch {index} has the token id {largest if least >= 0 else least}, the model's vocabulary "
                f"has {size}, from 0 on: use the model's own tokenizer"
            )


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool


def _as_batch(batch: Any, index: int) -> Batch:
    if isinstance(batch, Tensor) and _is_integer(batch):
        batch = {"input_ids": batch}
    if isinstance(batch, Mapping):
        _check_tokens(batch, index)
        _check_images(batch, index)
    elif not isinstance(batch, Tensor | list | tuple):
        raise ArgumentTypeError(
            f"calibration batch {index} must be a mapping or sequence of tensors or a tensor, got "
            f"{type(batch).__name__}"
        )
    if not samples_of(batch):
        raise CalibrationError(f"calibration batch {index} has no samples: give tensors with the samples first")
    return batch


def _check_tokens(batch: Mapping[str, Any], index: int) -> None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor):
        return
    if ids.ndim < 2 or ids.numel() == 0 or not _is_integer(ids):
        raise CalibrationError(
            f"input_ids of calibration batch {index} must be integers (samples, tokens) and not empty, got "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        raise CalibrationError(f"attention_mask of calibration batch {index} must have the shape of input_ids")


def _check_images(batch: Mapping[str, Any], index: int) -> None:
    """Raises CalibrationError where it cannot be told which images belong to which text."""
    count = samples_of(batch)
    for name, value in batch.items():
        of_images = isinstance(value, Tensor) and name.startswith(_OF_IMAGES)
        if count != 1 and "input_ids" in batch and of_images and value.ndim and len(value) != count:
            raise CalibrationError(
                f"{name} of calibration batch {index} has {len(value)} rows for {count} samples, so that it cannot be "
                "told which belong to which: give batches of one sample each"
            )


def batch_samples(batch: Batch) -> int:
    """How many samples a batch has (`batch_tree.samples_of`)."""
    count = samples_of(batch)
    if not count:
        raise CalibrationError("a batch has no samples: give tensors with the samples first")
    return count


def batch_tokens(batch: Batch) -> int:
    """How many tokens a batch has; 0 where it is no text."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else 0


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on a device."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def real_tokens(hidden: Tensor, batch: Batch, decoder: bool = False) -> Tensor:
    """Hidden states of a batch without those of padded tokens; `decoder_mask` says which these are in a decoder."""
    mask = decoder_mask(batch) if decoder else token_mask(batch)
    if mask is not None and hidden.ndim == 2 and len(hidden) == mask.numel():  # one token below the other
        mask = mask.flatten()
    return hidden if mask is None or hidden.shape[: mask.ndim] != mask.shape else hidden[mask]


def token_mask(batch: Batch) -> Tensor | None:
    """True (samples, tokens) where a token is real, False where it is padding; None where nothing is padding."""
    embedded = isinstance(batch, Mapping) and "input_ids" not in batch
    return _mask(batch, "inputs_embeds" if embedded else "input_ids", "attention_mask")


def next_token_mask(batch: Batch) -> Tensor | None:
    """True (samples, tokens) for a real token after a real one, which that one predicts; None where none is padding."""
    mask = token_mask(batch)
    if mask is None:
        return None
    before = mask.roll(1, -1)
    before[..., 0] = True
    return mask & before


def decoder_mask(batch: Batch) -> Tensor | None:
    """The same of the decoder in an encoder-decoder: its own mask, or where labels are not -100."""
    if isinstance(batch, Mapping) and "decoder_attention_mask" not in batch:
        labels = batch.get("labels")
        real = labels != -100 if isinstance(labels, Tensor) and labels.ndim == 2 else None
        return None if real is None or bool(real.all()) else real
    return _mask(batch, "decoder_attention_mask", "decoder_attention_mask")


def _mask(batch: Batch, ids: str, name: str) -> Tensor | None:
    found = (batch.get(ids), batch.get(name)) if isinstance(batch, Mapping) else ()
    if not found or not all(isinstance(value, Tensor) for value in found):
        return None
    mask = batch[name].bool()
    return None if bool(mask.all()) else mask


def count_samples(batches: list[Batch]) -> int:
    return sum(batch_samples(batch) for batch in batches)


def take(batch: Batch, samples: list[int]) -> Batch:
    """The given samples of a batch (`batch_tree.take_samples`)."""
    return take_samples(batch, samples)


def one_by_one(batches: list[Batch], aligned: bool) -> list[Batch]:
    """The same samples in batches of one, so that nothing in a batch belongs to another sample.

    Padding is left out, and so is a sample that is nothing else. aligned: whether all that has an entry for each token,
    labels too, is about the tokens that attention_mask is about; else labels and decoder_* are about a decoder's.
    """
    alone = [take(batch, [k]) for batch in batches for k in range(batch_samples(batch))]
    real = [batch for batch in alone if (mask := token_mask(batch)) is None or bool(mask.any())]
    return [_unpadded(batch, aligned) for batch in real]


def _unpadded(batch: Batch, aligned: bool) -> Batch:
    """A batch of one sample without its padded tokens, those of a decoder at its end."""
    mask, of_decoder = token_mask(batch), None if aligned else decoder_mask(batch)
    short = batch
    if mask is not None and mask.ndim == 2:
        names = [name for name in batch if aligned or not is_of_decoder(name)]
        short = {**short, **{name: _at_tokens(batch[name], mask, mask[0]) for name in names}}
        if has_position_axes(batch):
            short["position_ids"] = batch["position_ids"][:, :, mask[0]]
    if of_decoder is not None and bool(of_decoder.any()):
        until_last = of_decoder[0].flip(0).cumsum(0).flip(0) > 0
        names = [name for name in batch if is_of_decoder(name)]
        short = {**short, **{name: _at_tokens(batch[name], of_decoder, until_last) for name in names}}
    return short


def is_of_decoder(name: str) -> bool:
    """Whether an entry of a batch is about the decoder's tokens in an encoder-decoder, by its name."""
    return name == "labels" or name.startswith("decoder_")


def _at_tokens(leaf: Any, mask: Tensor, real: Tensor) -> Any:
    return leaf[:, real] if isinstance(leaf, Tensor) and leaf.shape[:2] == mask.shape else leaf


def set_aside(batches: list[Batch], seed: int, share: float = 0.25) -> tuple[list[Batch], list[Batch]]:
    """(the batches without, and those with) a random share of the samples. CalibrationError below 8 samples."""
    count = count_samples(batches)
    if count < 8:
        raise CalibrationError(
            f'to compare on samples set aside (objective="auto", allocate) at least 8 are needed, got {count}: '
            "give more, or choose yourself"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = set(torch.randperm(count, generator=generator, device="cpu")[: round(share * count)].tolist())
    rest: list[Batch] = []
    aside: list[Batch] = []
    first = 0
    for batch in batches:
        indices = range(batch_samples(batch))
        for target, wanted in ((rest, False), (aside, True)):
            if samples := [k for k in indices if (first + k in chosen) is wanted]:
                target.append(take(batch, samples))
        first += len(indices)
    return rest, aside


def split(batches: list[Batch], size: int) -> list[Batch]:
    """The same samples in the same order, at most `size` in a batch."""
    return [
        batch
        if batch_samples(batch) <= size
        else take(batch, list(range(first, min(first + size, batch_samples(batch)))))
        for batch in batches
        for first in range(0, batch_samples(batch), size)
    ]


def own_batches(ranks: Ranks, batches: list[Batch]) -> list[Batch]:
    """A rank's share of the batches."""
    own = ranks.share([batch_samples(batch) for batch in batches])
    return batches[own.start : own.stop]


def open_dataset(data: str) -> Any:
    """A dataset by its datasets name[:config[:split]], the split "train" if none is given.

    Raises CalibrationError where it does not load.
    """
    name, configuration, split = [*data.split(":"), "", ""][:3]
    try:
        return load_split(name, split or "train", configuration or None)
    except ConnectionError as error:
        raise CalibrationError(
            f"{data!r} is no file or folder, and as a dataset it cannot be reached: {error}{meant_path(name)}"
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"{data!r} is no file, folder or loadable dataset: {error}{meant_path(name)}"
        ) from error


def load_split(name: str, split: str, configuration: str | None = None, file: str | None = None) -> Any:
    """One split of a dataset by `datasets`, which prints nothing meanwhile.

    name: of the dataset, or a folder. file: of the dataset's files, the one to read.

    Raises ConnectionError where it is not here and cannot be reached, OSError for all else that goes wrong.
    """
    with from_extra("cli"):
        from datasets import load_dataset

    try:
        with _silent():
            return load_dataset(
                name, configuration, split=split, data_files=None if file is None else {split: file}
            )
    except MemoryError:
        raise
    except Exception as error:  # the library has no common base class for what it raises
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise (ConnectionError if isinstance(error, ConnectionError) else OSError)(first) from error


@contextmanager
def _silent() -> Iterator[None]:
    """datasets and huggingface_hub print nothing meanwhile: what they would say of a failure is in its error."""
    import datasets
    import huggingface_hub

    libraries = [datasets.logging, huggingface_hub.utils.logging]
    levels = [logging.get_verbosity() for logging in libraries]
    bars = datasets.are_progress_bars_disabled()
    for logging in libraries:
        logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logging, level in zip(libraries, levels, strict=True):
            logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def windows(tokenizer: Any, text: str, samples: int, length: int, seed: int | None = 0) -> Tensor:
    """Token ids (samples, length) of windows of a text.

    tokenizer: of transformers. samples, length: how many windows, of how many tokens each.
    seed: of their random places; None for one after the other, from the start on.

    Raises CalibrationError where the text is too short.
    """
    if not callable(tokenizer):
        raise ArgumentTypeError(f"tokenizer must be one of transformers', got {tokenizer!r}")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], device="cpu")
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
    generator = torch.Generator("cpu").manual_seed(seed)
    offsets = torch.randperm(len(ids) - length, generator=generator, device="cpu")[:samples]
    return ids[offsets[:, None] + torch.arange(length, device="cpu")]
