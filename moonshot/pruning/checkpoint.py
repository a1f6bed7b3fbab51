"""Layers' answers on disk as soon as there are any, so that an interrupted run can continue."""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moonshot.errors import MoonshotError
from moonshot.pruning.fingerprint import digest
from moonshot.pruning.lock import locked
from moonshot.pruning.report import LayerReport, PartReport, Trial

_WORK, _TRIALS, _LOCK = "work.json", "trials.json", "lock"
_LAYER, _PART, _PARTIAL = ".safetensors", ".refit", ".partial"

AnyReport = TypeVar("AnyReport", LayerReport, PartReport)


class CheckpointError(MoonshotError):
    """A folder that is no checkpoint, or has the answers to other work."""


class Checkpoint:
    """A folder with the answers of the layers that are done and the refits of parts, a file each, and their work.

    work: what the answers depend on apart from the layers' weights, in JSON's types. A folder not there yet is made.
    done: the layers whose answers it has. Each is stored with the digest of the part it was found for, and one of
    its own: what was damaged since is not among them, and a warning names it. used: how many were asked for.

    It is locked until `close`, or the end of the process. Raises CheckpointError for a folder that holds something
    else or answers to other work, LockedError where another process has it, OSError with what to do where it cannot be
    written.
    """

    def __init__(self, folder: str | Path, work: Mapping[str, Any]):
        check_name(Path(folder))
        self.folder = Path(folder).resolve()
        text = json.dumps(dict(work), indent=2)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
        earlier, now = work_of(self.folder), json.loads(text)
        empty = earlier is None
        if earlier is not None:
            refuse_other(self.folder, earlier, {**dict.fromkeys(earlier), **now})
        with ExitStack() as stack, self._writing():
            stack.enter_context(locked(self.folder / _LOCK, self.folder))
            if empty:
                self._write(_WORK, text.encode())
            self.done, self.used = frozenset(self._sound_answers()), 0
            self._held = stack.pop_all()

    def close(self) -> None:
        """Let another process have the folder."""
        self._held.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sound_answers(self) -> Iterable[str]:
        for file in sorted(self.folder.glob(f"*{_LAYER}")):
            if _read(file, LayerReport):
                yield unquote(file.name.removesuffix(_LAYER))
            else:
                self._damaged(file, "the layer is solved")

    def _damaged(self, file: Path, what: str) -> None:
        warnings.warn(f"{file} is damaged: {what} again", stacklevel=2)

    def store(self, name: str, dense: str, weight: Tensor, report: LayerReport) -> None:
        """Write a layer's answer: the pruned weight and its report, and that it is for a part with this digest."""
        self._store(f"{quote(name, safe='')}{_LAYER}", [weight], report, dense)

    def answer(self, name: str, dense: str, shape: tuple[int, int]) -> tuple[Tensor, LayerReport]:
        """The pruned weight and the report of a layer that is done.

        dense: the digest of its part. shape: of the weight. Raises CheckpointError where the answer is for another one,
        or the file can no longer be read.
        """
        file = self.folder / f"{quote(name, safe='')}{_LAYER}"
        found = _read(file, LayerReport)
        if found is None:
            raise CheckpointError(f"{file} was damaged while this runs: start again to do the layer again")
        (weight,), report, before = found
        self._same(before, dense, name)
        if weight.shape != shape:
            raise CheckpointError(f"{file} has another shape than the layer: remove it to do the layer again")
        self.used += 1
        return weight, report

    def store_part(self, name: str, dense: str, fitted: Iterable[Tensor], report: PartReport) -> None:
        """Write a part's refit: its tensors and report, and that they are for a part with this digest."""
        self._store(f"{quote(name, safe='')}{_PART}", fitted, report, dense)

    def part(self, name: str, dense: str, shapes: list[torch.Size]) -> tuple[list[Tensor], PartReport] | None:
        """What `store_part` was given, None if it was not or is damaged. shapes: of the tensors.

        Raises CheckpointError where the part was another before.
        """
        file = self.folder / f"{quote(name, safe='')}{_PART}"
        if not file.exists():
            return None
        found = _read(file, PartReport)
        if found is None or [tensor.shape for tensor in found[0]] != shapes:
            self._damaged(file, "the part is refitted")
            return None
        tensors, report, before = found
        self._same(before, dense, name)
        return tensors, report

    def _same(self, before: str, now: str, name: str) -> None:
        if before != now:
            raise CheckpointError(
                f"{self.folder} has the answers of another model, with other weights in {name} or in what is pruned "
                "with it: choose another folder, or remove it to begin again"
            )

    def store_trials(self, best: str, trials: list[Trial]) -> None:
        """Write the name of the best objective, and what all of them gave."""
        found = [best, [asdict(trial) for trial in trials]]
        self._write(_TRIALS, json.dumps({"found": found, "digest": digest(found)}, indent=2).encode())

    def trials(self) -> tuple[str, list[Trial]] | None:
        """What `store_trials` was given, None if it was not or is damaged."""
        file = self.folder / _TRIALS
        if not file.exists():
            return None
        try:
            stored: Any = _json(file)
            best, trials = stored["found"]
            if stored["digest"] == digest([best, trials]):
                return best, [Trial(**trial) for trial in trials]
        except (ValueError, TypeError, KeyError):
            pass
        self._damaged(file, "objectives are tried")
        return None

    def _store(
        self, name: str, tensors: Iterable[Tensor], report: LayerReport | PartReport, before: str
    ) -> None:
        stored = [tensor.detach().cpu().contiguous() for tensor in tensors]
        about = {"report": json.dumps(asdict(report)), "before": before}
        about["digest"] = digest([*about.values(), *stored])
        names = ["weight"] if len(stored) == 1 else map(str, range(len(stored)))
        self._write(name, save(dict(zip(names, stored, strict=True)), about))

    def _write(self, name: str, content: bytes) -> None:
        """Write a file that is there whole or not at all, even if the power goes."""
        file = self.folder / name
        partial = file.with_suffix(_PARTIAL)
        with self._writing():
            partial.unlink(missing_ok=True)
            with open(partial, "xb") as stream:  # never what a link leads to
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name
            finally:
                os.close(folder)

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot store answers in {self.folder}: {error}; free some space or choose another folder"
            ) from error


def check_name(folder: Path) -> None:
    """Raises CheckpointError for a path without a name, such as "" or ".."."""
    if folder.name in ("", ".."):
        raise CheckpointError(
            f"cannot store answers in {str(folder)!r}: give the name of a folder of their own"
        )


def work_of(folder: Path) -> dict[str, Any] | None:
    """What the answers in a folder depend on; None for one that is empty or not there.

    Raises CheckpointError for a folder that holds something else.
    """
    if not folder.is_dir() or {file.name for file in folder.iterdir()} <= {_LOCK, f"work{_PARTIAL}"}:
        return None
    work = _json(folder / _WORK)
    if not isinstance(work, dict):
        raise CheckpointError(
            f"{folder} is no checkpoint: choose an empty folder, or one that is not there yet"
        )
    return work


def refuse_other(folder: Path, earlier: Mapping[str, Any], work: Mapping[str, Any]) -> None:
    """Raises CheckpointError where anything in `work` is not as it was in the work of a folder's answers."""
    if other := [key for key, value in work.items() if earlier.get(key) != value]:
        raise CheckpointError(
            f"{folder} has the answers of other work, {', '.join(other)} differ: choose another folder, or "
            "remove it to begin again"
        )


def remove(folder: Path) -> None:
    """Remove the files that a checkpoint wrote into a folder, and the folder if nothing else is in it."""
    folder = folder.resolve()
    work = _json(folder / _WORK)
    layers = work.get("patterns") if isinstance(work, dict) else None
    if not isinstance(layers, dict):
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


def _json(file: Path) -> Any:
    """What a file of JSON holds; None where it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def _read(file: Path, kind: type[AnyReport]) -> tuple[list[Tensor], AnyReport, str] | None:
    """The tensors of a file, their report, and the digest of what they are for; None where it is damaged."""
    if not file.is_file():  # a pipe would be waited for
        return None
    try:
        with safe_open(file, "pt") as opened:
            about, names = opened.metadata(), list(opened.keys())
            ordered = names if len(names) == 1 else [str(k) for k in range(len(names))]
            tensors: list[Tensor] = [opened.get_tensor(name) for name in ordered]
        if about["digest"] != digest([about["report"], about["before"], *tensors]):
            return None
        about_it = json.loads(about["report"])
        if "shape" in about_it:
            about_it["shape"] = tuple(about_it["shape"])
        report = kind(**about_it)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    if isinstance(report, LayerReport) and [tuple(tensor.shape) for tensor in tensors] != [report.shape]:
        return None
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    return (tensors, report, about["before"]) if finite else None
