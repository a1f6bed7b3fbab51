"""A model's folder, for which nobody vouches: which of its files are read, and which go along with the pruned model."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open

from moonshot.errors import MoonshotError, meant_path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONTENTS = "compact.json"  # of a folder without its zeros (files.compact)
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
_LEGAL = ("licen", "notice", "copying", "use_policy")  # how the names of files with terms of use begin
_OURS = {"config.json", "generation_config.json", "recipe.json", "report.json", "README.md"}
_TEMPLATES = "additional_chat_templates"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class FolderError(MoonshotError):
    """A model folder that is not there, cannot be read, or holds what it should not."""


@contextmanager
def reading(what: str, name: str) -> Iterator[None]:
    """Whatever a library raises while it reads a model becomes a FolderError of one line."""
    try:
        yield
    except (FolderError, MemoryError):
        raise
    except UnpicklingError as error:
        raise FolderError(
            f"cannot load {what} from {name!r}: its .bin file holds more than tensors, and a pickle is never executed; "
            "get the model as safetensors"
        ) from error
    except Exception as error:  # what transformers and the libraries below it raise has no common base class
        reason = " ".join(str(error).split("\nException raised from")[0].split()) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = (
                "it needs code of its own: read that, and if you trust it say --trust-remote-code "
                "(trust_remote_code=True in Python)"
            )
        elif not isinstance(error, OSError | ValueError | ImportError):
            reason = f"{type(error).__name__}: {reason}"
        raise FolderError(f"cannot load {what} from {name!r}: {reason}") from error


def find_folder(name: str) -> Path:
    """The folder itself, or where a hub name's files are after what is missing of them was downloaded.

    Raises FolderError where there is no such folder and no such name.
    """
    path = Path(name)
    if not name:
        raise FolderError("the model has no name: give a folder or a hub name")
    if is_hub_name(name):
        return _downloaded(name)
    check_folder(path)
    return path


def check_folder(path: Path) -> None:
    """Raises FolderError for a path that is no folder."""
    if path.is_file():
        raise FolderError(f"{path} is a file: give the folder that it is in")
    if not path.is_dir():
        raise FolderError(f"no such folder: {path}{meant_path(path)}")


def is_hub_name(name: str) -> bool:
    """Whether a name is no folder here, and could be one on the hub."""
    return not Path(name).exists() and _HUB_NAME.fullmatch(name) is not None


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    small = [*(f"*{suffix}" for suffix in sorted(_SUFFIXES)), "*.py", "*.md"]
    legal = [f"{begin}*" for word in _LEGAL for begin in (word, word.upper(), word.title())]
    try:
        folder = Path(snapshot_download(name, allow_patterns=small + legal))
        for wanted in (weight_files(folder, here=False) or [SINGLE], ["pytorch_model*.bin"]):
            snapshot_download(name, revision=folder.name, allow_patterns=wanted)
            if any(folder.glob("*.safetensors")):
                break
    except FolderError:
        raise
    except Exception as error:  # of the network, of the hub, of the disk
        reason = " ".join(str(error).split())
        raise FolderError(
            f"no such folder: {name}, and it cannot be had from the hub: {reason}{meant_path(name)}"
        ) from error
    return folder


def weight_files(folder: Path, here: bool = True) -> list[str]:
    """The safetensors files that hold a model's weights, relative to its folder; [] where it has none.

    here: whether they must all be there. Raises FolderError for an index that cannot be read or that leads out of the
    folder, and for a file that is not there.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX, ".safetensors", here)
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / _PICKLED_INDEX).is_file():
        _indexed(folder / _PICKLED_INDEX, ".bin", here)
    return []


def _indexed(index: Path, suffix: str, here: bool) -> list[str]:
    """The files that an index of shards names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{index} has no weight_map from tensors to files: get it once more") from error
    if refused := [name for name in names if not is_inside(name, suffix)]:
        raise FolderError(f"{index} names {refused[0]!r}, which is no {suffix} file in that folder")
    if missing := [name for name in names if here and not (index.parent / name).is_file()]:
        raise FolderError(f"{index.parent / missing[0]} is not there: get the model once more")
    return sorted(names)


def is_inside(name: Any, suffix: str) -> bool:
    """Whether a name of an index is that of such a file in the folder or below it, on every system."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    plain = all(part.isprintable() and not set(part) & {"\\", ":"} and part != ".." for part in parts)
    return bool(parts) and plain and parts[0] != "/" and name.endswith(suffix)


def check_weights(file: Path) -> None:
    """Raises FolderError where safetensors finds that a file is cut short, or no file of its format."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{file} is no whole safetensors file ({error}): get it once more") from error


def companions(folder: Path, code: bool = False) -> list[str]:
    """What else of a model's folder goes along, by relative name: tokenizer, processor, templates, terms of use.

    code: its Python files too. Raises FolderError for a link out of the folder.
    """
    names = [path for path in sorted(folder.iterdir()) if _goes_along(path, code)]
    names += sorted((folder / _TEMPLATES).glob("*.jinja"))
    files = [path for path in names if path.is_file()]
    for path in (*files, *(folder / name for name in sorted(_OURS))):  # of ours the model may have its own
        check_link(path, folder)
    return [str(path.relative_to(folder)) for path in files]


def _goes_along(path: Path, code: bool) -> bool:
    name = path.name
    if name in _OURS or name.startswith(".") or name.endswith(".index.json"):
        return False
    return path.suffix in _SUFFIXES or name.lower().startswith(_LEGAL) or (code and path.suffix == ".py")


def check_link(path: Path, folder: Path) -> None:
    """Raises FolderError for a link out of the folder, unless it leads to where the hub's cache has its files."""
    target, inside = path.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in inside):
        raise FolderError(f"{path} is a link out of its folder: put the file itself there, or remove it")
