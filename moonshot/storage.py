"""Pruned models on disk: a folder that transformers loads as it is, or nothing."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from moonshot.report import Report


def save(model: nn.Module, tokenizer: object, report: Report, folder: str | Path) -> Path:
    """Write model, tokenizer, masks, recipe and report to `folder`, which must not exist.

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
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)  # type: ignore[attr-defined]
        layers = dict(model.named_modules())
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
    """(model, tokenizer) of a folder or a hub name, in the dtype it was saved in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"cannot load a causal language model from {name!r}: {first}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


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
    from datasets import load_dataset

    name, configuration, split = [*data.split(":"), "", ""][:3]
    try:
        dataset = load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the library has no common base class for what it raises
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{data!r} is no file, folder or loadable dataset: {first}") from error
    columns = [key for key, kind in dataset.features.items() if getattr(kind, "dtype", "") == "string"]
    if not columns:
        raise ValueError(f"the dataset {data!r} has no text column")
    return "\n\n".join(dataset[columns[0]])
