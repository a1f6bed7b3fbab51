"""What a model is measured on, by its name on the command line: perplexity of text, accuracy on images."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from moonshot.app.data import Windows, held_out_windows, pictures
from moonshot.files import plan as planning
from moonshot.files.load import Source
from moonshot.files.source import FolderError, is_hub_name
from moonshot.models.evaluation import Accuracy, Perplexity, accuracy, perplexity
from moonshot.models.images import ImageBatches


class HeldOut:
    """Data that models are measured on: windows of text, or labelled images.

    source: the model, whose tokenizer or image processor reads the data. samples: windows or images, None for all.
    column: of rows (`read_texts`). Raises ValueError where the data is none for this model.
    """

    def __init__(
        self, source: Source, data: str, samples: int | None, seqlen: int | None, column: str | None = None
    ):
        self._windows: Windows | None = None
        self._images: ImageBatches | None = None
        if source.is_image_classifier:
            found = pictures(data, seqlen, column)
            self._images = ImageBatches(source.skeleton(), source.processor, found, samples, 0)
        else:
            self._windows = held_out_windows(source, data, samples, seqlen, column)
        self.title = self._windows.title if self._windows else data

    def measure(self, model: nn.Module) -> Perplexity | Accuracy:
        """The model's perplexity or accuracy. Raises MemoryError where there is not enough."""
        with saying_what_memory_it_takes():
            if self._images is not None:
                return accuracy(model, self._images)
            assert self._windows is not None
            return perplexity(model, self._windows.ids)

    @property
    def skipped(self) -> list[str]:
        """What of the data is left out: files that are no text; once measured, images that are broken."""
        return self._windows.skipped if self._windows else self._images.skipped if self._images else []


@contextmanager
def saying_what_memory_it_takes() -> Iterator[None]:
    """What torch raises where memory runs out becomes a MemoryError that says what helps."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(
                "there is not enough memory to run the model: give a smaller --seqlen, or run it on a machine with more"
            ) from error
        raise


def check_memory(source: Source) -> None:
    """Raises ResourceError for a model whose weights are more than the memory that is free."""
    dtype = getattr(source.config.get_text_config(), "dtype", None)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    weights = size * sum(parameter.numel() for parameter in source.skeleton().parameters())
    free = planning.free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if weights > free:
        taken, left = planning.told_apart(weights, free)
        raise planning.ResourceError(f"the weights of {source.name} take {taken}, {left} of memory are free")


def dense_source(source: Source) -> Source | None:
    """The model that a pruned folder was made from; None for a folder that moonshot did not write.

    Nothing is downloaded. Raises FolderError where that model is not on this machine, or is of another kind.
    """
    try:
        name = json.loads((source.folder / "recipe.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(name, str):
        return None
    dense = Source(str(_folder(name)))
    dense.name = name
    own, others = (each.config.get_text_config() for each in (source, dense))
    same = type(own) is type(others) and getattr(own, "vocab_size", 0) == getattr(others, "vocab_size", 0)
    if not same:
        raise FolderError(f"{name} is another model now")
    return dense


def _folder(name: str) -> Path:
    """Where a model is on this machine."""
    if Path(name).is_dir():
        return Path(name)
    if is_hub_name(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            pass
    raise FolderError(f"{name} is not on this machine")
