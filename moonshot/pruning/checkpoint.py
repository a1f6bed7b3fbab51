"""Layers' answers on disk as soon as there are any, so that an interrupted run can continue."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_flatten

from moonshot.errors import ArgumentError
from moonshot.pruning.report import LayerReport, PartReport, Trial

_WORK, _TRIALS = "work.json", "trials.json"


class Checkpoint:
    """A folder with the answers of the layers that are done and the refits of parts, a file each, and their work.

    work: what the answers depend on apart from the model's weights, in JSON's types. A folder not there yet is made.
    done: the layers whose answers it has. Each is stored with the digest of the weight it was found for.

    Raises ValueError for a folder that holds something else or answers to other work, OSError with what to do where
    it cannot be written.
    """

    def __init__(self, folder: str | Path, work: Mapping[str, Any]):
        self.folder = Path(folder)
        text = json.dumps(dict(work), indent=2)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            empty = not any(self.folder.iterdir())
        if empty:
            self._write(_WORK, text.encode())
        self._check(json.loads(text))
        self.done = frozenset(
            unquote(file.stem) for file in self.folder.iterdir() if file.suffix == ".safetensors"
        )

    def _check(self, work: Mapping[str, Any]) -> None:
        try:
            earlier = json.loads((self.folder / _WORK).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"{self.folder} is no checkpoint: choose an empty folder, or one that is not there yet"
            ) from error
        if other := [key for key in {**earlier, **work} if earlier.get(key) != work.get(key)]:
            raise ArgumentError(
                f"{self.folder} has the answers of other work, {', '.join(other)} differ: choose another folder, or "
                "remove it to begin again"
            )

    def store(self, name: str, dense: Tensor, weight: Tensor, report: LayerReport) -> None:
        """Write a layer's answer: the pruned weight and its report, and that it is for `dense`."""
        about = {"report": json.dumps(asdict(report)), "dense": _digest([dense])}
        self._write(_file_name(name), save({"weight": weight.detach().cpu().contiguous()}, about))

    def answer(self, name: str, dense: Tensor) -> tuple[Tensor, LayerReport]:
        """The pruned weight and the report of a layer that is done.

        Raises ValueError where `dense` is not what the answer was found for, or the file cannot be read.
        """
        about, tensors = _read(self.folder / _file_name(name), "do the layer again")
        if about["dense"] != _digest([dense]):
            raise ArgumentError(
                f"{self.folder} has the answers of another model, whose {name} has other weights: choose another "
                "folder, or remove it to begin again"
            )
        report = json.loads(about["report"])
        return tensors["weight"], LayerReport(**{**report, "shape": tuple(report["shape"])})

    def store_part(
        self, name: str, pruned: Iterable[Tensor], fitted: Iterable[Tensor], report: PartReport
    ) -> None:
        """Write a part's refit: its tensors and report, and that they are for the part with these `pruned` tensors."""
        about = {"report": json.dumps(asdict(report)), "pruned": _digest(pruned)}
        tensors = {str(k): tensor.detach().cpu().contiguous() for k, tensor in enumerate(fitted)}
        self._write(_part_name(name), save(tensors, about))

    def part(self, name: str, pruned: Iterable[Tensor]) -> tuple[list[Tensor], PartReport] | None:
        """What `store_part` was given, None if it was not.

        Raises ValueError where the part was another before, or the file cannot be read.
        """
        path = self.folder / _part_name(name)
        if not path.exists():
            return None
        about, tensors = _read(path, "refit the part again")
        if about["pruned"] != _digest(pruned):
            raise ArgumentError(
                f"{self.folder} has a refit of another model, whose {name} has other weights: choose another folder, "
                "or remove it to begin again"
            )
        return [tensors[str(k)] for k in range(len(tensors))], PartReport(**json.loads(about["report"]))

    def store_trials(self, best: str, trials: list[Trial]) -> None:
        """Write the name of the best objective, and what all of them gave."""
        found = {"best": best, "trials": [asdict(trial) for trial in trials]}
        self._write(_TRIALS, json.dumps(found, indent=2).encode())

    def trials(self) -> tuple[str, list[Trial]] | None:
        """What `store_trials` was given, None if it was not."""
        if not (self.folder / _TRIALS).exists():
            return None
        found = json.loads((self.folder / _TRIALS).read_text(encoding="utf-8"))
        return found["best"], [Trial(**trial) for trial in found["trials"]]

    def _write(self, name: str, content: bytes) -> None:
        """Write a file that is there whole or not at all."""
        file = self.folder / name
        partial = file.with_suffix(".partial")
        with self._writing():
            partial.write_bytes(content)
            os.replace(partial, file)

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot store answers in {self.folder}: {error}; free some space or choose another folder"
            ) from error


def remove(folder: Path) -> None:
    """Remove the files that a checkpoint wrote into a folder, and the folder if nothing else is in it."""
    folder = folder.resolve()
    try:
        layers = json.loads((folder / _WORK).read_text(encoding="utf-8"))["patterns"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # it is none, or was removed before
    for file in folder.iterdir():
        if _is_ours(file.name, layers):
            file.unlink()
    (folder / _WORK).unlink()
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def _is_ours(name: str, layers: Iterable[str]) -> bool:
    """Whether a file has the name of an answer to one of the layers, of a part with some, or of what else there is."""
    stem, _, kind = name.rpartition(".")
    module = unquote(stem)
    prefix = f"{module}." if module else ""
    known = any(layer == module or layer.startswith(prefix) for layer in layers)
    others = {_TRIALS, "lock", *(str(Path(file).with_suffix(".partial")) for file in (_WORK, _TRIALS))}
    return name in others or (kind in ("safetensors", "refit", "partial") and known)


def _file_name(layer: str) -> str:
    return f"{quote(layer, safe='')}.safetensors"


def _part_name(part: str) -> str:
    return f"{quote(part, safe='')}.refit"


def _read(path: Path, purpose: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"cannot read {path}: {error}; remove it to {purpose}") from error


def data_digest(batches: Iterable[Any]) -> str:
    """A digest of calibration data: batches of tensors in containers of any kind."""
    leaves, structure = tree_flatten(list(batches))
    return _digest([repr(structure), *leaves])


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            content: Any = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.update(content)
        else:
            found.update(repr(part).encode())
    return found.hexdigest()
