"""Pruned models on disk: a folder that transformers loads as it is, or nothing."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from moonshot.models.calibration import open_dataset
from moonshot.models.layers import layers_of
from moonshot.report import Report


def save(model: nn.Module, processor: object, report: Report, folder: str | Path) -> Path:
    """Write model, processor (of text or images, or None), masks, recipe and report to `folder`, which must not exist.

    Everything goes to a temporary folder beside it first, renamed at the end: a failure or a kill leaves nothing
    under the final name. `masks.safetensors` holds a boolean tensor for each pruned layer, True where its weight is
    not zero.
    Raises FileExistsError, or OSError with what to do where the disk is full or not writable.
    """
    final = Path(folder)
    if final.exists():
        raise FileExistsError(f"{final} exists: choose another folder, or remove it first")
    temporary = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        model.save_pretrained(temporary)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(temporary)  # type: ignore[attr-defined]
        layers = dict(layers_of("", model))
        masks = {name: (layers[name].weight != 0).detach().cpu() for name in report.layers}
        save_file({name: mask.contiguous() for name, mask in masks.items()}, temporary / "masks.safetensors")
        (temporary / "recipe.json").write_text(json.dumps(report.recipe, indent=2) + "\n")
        report.save(temporary / "report.json")
        temporary.chmod(0o755)
        os.rename(temporary, final)
    except OSError as error:
        raise OSError(
            f"could not save to {final}: {error}; free some space or choose another folder"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def load(name: str) -> tuple[nn.Module, object]:
    """(causal language model, tokenizer) of a folder or a hub name, in the dtype it was saved in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return _load(name, "a causal language model", AutoModelForCausalLM, AutoTokenizer)


def load_classifier(name: str) -> tuple[nn.Module, object]:
    """(image classifier, image processor) of a folder or a hub name, in the dtype it was saved in."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    return _load(name, "an image classifier", AutoModelForImageClassification, AutoImageProcessor)


def _load(name: str, kind: str, models: Any, preprocessors: Any) -> tuple[nn.Module, object]:
    try:
        preprocessor = preprocessors.from_pretrained(name)
        model: nn.Module = models.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise _cannot_load(kind, name, error) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), preprocessor


def _cannot_load(kind: str, name: str, error: Exception) -> ValueError:
    return ValueError(f"cannot load {kind} from {name!r}: {str(error).splitlines()[0]}")


def is_image_classifier(name: str) -> bool:
    """Whether the configuration in a folder or under a hub name is that of an image classifier.

    Raises ValueError where there is none.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _cannot_load("a model", name, error) from error
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def read_text(data: str) -> str:
    """The text of a file, of every file in a folder by name, or of a datasets name's first text column.

    A datasets name may carry a configuration and a split: "wikitext:wikitext-2-raw-v1:train".
    """
    path = Path(data)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        return _dataset_text(data)
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise ValueError(f"{data} holds a file that is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{data} holds no text")
    return text


def _dataset_text(data: str) -> str:
    dataset = open_dataset(data)
    columns = [key for key, kind in dataset.features.items() if getattr(kind, "dtype", "") == "string"]
    if not columns:
        raise ValueError(f"the dataset {data!r} has no text column")
    return "\n\n".join(dataset[columns[0]])
