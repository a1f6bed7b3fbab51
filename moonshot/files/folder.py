"""Pruned models on disk: a folder that transformers loads as it is, or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from moonshot.extras import from_extra
from moonshot.files.load import is_image_classifier, load, load_classifier
from moonshot.files.mapped import MappedFile
from moonshot.models.layers import layers_of
from moonshot.pruning.report import Report


def save(model: nn.Module, processor: object, report: Report, folder: str | Path) -> Path:
    """Write model, processor (of text or images, or None), masks, recipe and report to `folder`, which must not exist.

    Everything goes to a temporary folder beside it first, renamed at the end: a failure or a kill leaves nothing
    under the final name. `masks.safetensors` holds a boolean tensor for each pruned layer, True where its weight is
    not zero.
    Raises FileExistsError, or OSError with what to do where the disk is full or not writable.
    """
    final = Path(folder)
    with _draft(final) as draft:
        return Opened(model, processor, final, draft).save(report)


class Opened:
    """A model with its processor (of text or images), and the folder that it will be saved to.

    draft: the temporary folder that becomes `folder`; mapped: whether the weights are in its files, and not in memory.
    """

    def __init__(
        self, model: nn.Module, processor: object, folder: Path, draft: Path, files: Sequence[MappedFile] = ()
    ):
        self.model, self.processor, self.folder, self.draft = model, processor, folder, draft
        self._files = files

    @property
    def mapped(self) -> bool:
        return bool(self._files)

    @property
    def unwritten(self) -> int:
        """Bytes that `save` still has to write, at most: masks, and weights that are not mapped."""
        weights = list(self.model.parameters())
        return sum(w.numel() + (0 if self.mapped else w.nbytes) for w in weights)

    def release(self) -> None:
        """Let the memory go that holds mapped weights, for those in use to come back."""
        for file in self._files:
            file.release()

    def save(self, report: Report) -> Path:
        """What `save` does; mapped weights are there already."""
        with _saving(self.folder):
            if self._files:
                for file in self._files:
                    file.flush()
                self.model.config.save_pretrained(self.draft)  # type: ignore[union-attr, operator]
                if self.model.can_generate():  # type: ignore[operator]
                    self.model.generation_config.save_pretrained(self.draft)  # type: ignore[union-attr, operator]
            else:
                self.model.save_pretrained(self.draft)  # type: ignore[operator]
            self._publish(report)
        return self.folder

    def _publish(self, report: Report) -> None:
        """Put everything but the weights into the draft and give it its name."""
        if self.processor is not None:
            self.processor.save_pretrained(self.draft)  # type: ignore[attr-defined]
        layers = dict(layers_of("", self.model))
        masks = {name: (layers[name].weight != 0).detach().cpu() for name in report.layers}
        save_file({name: mask.contiguous() for name, mask in masks.items()}, self.draft / "masks.safetensors")
        (self.draft / "recipe.json").write_text(json.dumps(report.recipe, indent=2) + "\n")
        report.save(self.draft / "report.json")
        self.draft.chmod(0o755)
        os.rename(self.draft, self.folder)


@contextmanager
def opened(name: str, folder: str | Path) -> Iterator[Opened]:
    """A model of a folder or a hub name, to be pruned and saved to `folder`, which must not exist.

    It is an image classifier where its configuration says so, a causal language model otherwise. On the CPU its weights
    are mapped from copies of its safetensors files in a temporary folder beside `folder`, so that they need not fit
    into memory. On a GPU, or where the files are of another kind than the model, it is loaded. What has not been
    saved is gone afterwards.
    """
    final = Path(folder)
    images = is_image_classifier(name)
    with _draft(final) as draft:
        found = None if torch.cuda.is_available() else _mapped(name, images, draft, final)
        yield found or Opened(*(load_classifier if images else load)(name), final, draft)


def _mapped(name: str, images: bool, draft: Path, final: Path) -> Opened | None:
    """None where what a model saves are not all tensors of its safetensors files."""
    with from_extra("cli"):
        import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    kinds: Any
    processors: Any
    if images:
        kinds, processors = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.AutoImageProcessor
    else:
        kinds, processors = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoTokenizer
    files = _safetensors(name)
    if type(config) not in kinds or not files:
        return None
    with _saving(final):
        for file in files:
            shutil.copyfile(file, draft / file.name)
    try:
        maps = [MappedFile(draft / file.name) for file in files if file.suffix == ".safetensors"]
        tensors = {key: tensor for file in maps for key, tensor in file.tensors.items()}
        model = kinds[type(config)].from_pretrained(None, config=config, state_dict=tensors, dtype="auto")
        places = {(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors.values()}
        if all((t.data_ptr(), t.dtype, t.shape) in places for t in model.state_dict().values()):
            return Opened(model, processors.from_pretrained(name), final, draft, maps)
    except (OSError, ValueError, RuntimeError):
        pass  # loading it says what is wrong, if anything is
    for file in files:
        (draft / file.name).unlink()
    return None


def _safetensors(name: str) -> list[Path]:
    """The files that hold a model's weights, with their index if there is one; [] where they are of another kind."""
    with from_extra("cli"):
        from huggingface_hub import snapshot_download

    folder = Path(name)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = {index.name, *json.loads(index.read_text())["weight_map"].values()}
        else:
            names = {"model.safetensors"}
    except (OSError, ValueError, KeyError):
        return []
    files = [folder / name for name in sorted(names)]
    return files if all(file.is_file() for file in files) else []


@contextmanager
def _draft(final: Path) -> Iterator[Path]:
    """A temporary folder beside the final one, gone afterwards where it was not renamed."""
    if final.exists():
        raise FileExistsError(f"{final} exists: choose another folder, or remove it first")
    with _saving(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _saving(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"could not save to {final}: {error}; free some space or choose another folder"
        ) from error
