"""A pruned model without its zeros: the values that are left and a bit for each weight, without loss.

A compact folder has the files of a saved one, but for the weights. Of each file of weights, `model.safetensors`, there
is `model.compact`, in the same format and under a name that nobody takes for a model's weights. Of a tensor T it has
`T` as it is, or `T.values` (those whose bits are not all zero, in order) and `T.bits` (one for each, eight to a byte).
`compact.json` has the shapes and a digest of every file.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from moonshot.files.draft import check_apart, drafted, saving
from moonshot.files.load import Source, quiet
from moonshot.files.mapped import DTYPE_NAMES, DTYPES
from moonshot.files.source import (
    CONTENTS,
    INDEX,
    FolderError,
    check_folder,
    check_link,
    check_weights,
    is_inside,
    reading,
    weight_files,
)
from moonshot.files.tensors import Entry, write_tensors

_VERSION = 1
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact_folder(folder: str | Path, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder that moonshot saved to `destination` without its zeros. One tensor is in memory at a time.

    overwrite: whether a folder that moonshot wrote may be replaced.
    Raises FolderError for what is no saved folder, FileExistsError, or OSError with what to do.
    """
    source, final = Path(folder), Path(destination)
    check_folder(source)
    names = weight_files(source)
    if not names or not (source / "report.json").is_file():
        raise FolderError(
            f"{source} is no folder that moonshot prune saved with its weights in safetensors files"
        )
    check_apart("the folder", source, "the destination", final)
    with drafted(final, overwrite) as draft, saving(final):
        _copy_others(source, draft.path, {*names, INDEX})
        write_compact(source, draft.path)
        draft.publish()
    return final


def write_compact(source: Path, destination: Path) -> None:
    """Write the weights of a model's folder without their zeros to another, or to the same, and compact.json."""
    contents: dict[str, Any] = {"version": _VERSION, "files": {}, "tensors": {}}
    for name in weight_files(source):
        check_weights(source / name)
        packed = str(Path(name).with_suffix(".compact"))
        (destination / packed).parent.mkdir(parents=True, exist_ok=True)
        with safe_open(source / name, "pt") as file:
            entries: dict[str, Entry] = {}
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                tensor = file.get_tensor(key)
                parts = _packed(key, tensor, partial(file.get_tensor, key))
                entries |= parts
                about = {
                    "dtype": DTYPE_NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "packed": key not in parts,
                }
                contents["tensors"][key] = about
            digest = write_tensors(destination / packed, entries)
            about_file = {"weights": name, "sha256": digest, "metadata": file.metadata()}
        contents["files"][packed] = about_file
    if (source / INDEX).is_file():
        contents["index"] = json.loads((source / INDEX).read_text(encoding="utf-8"))
    (destination / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def weights_size(folder: Path) -> int:
    """Bytes of the tensors of a model's folder, of a compact one as they will be once it is unpacked."""
    if (folder / CONTENTS).is_file():
        tensors = _contents(folder)["tensors"].values()
        return sum(prod(about["shape"]) * DTYPES[about["dtype"]].itemsize for about in tensors)
    return sum(tensor.nbytes for _, tensor in _tensors(folder, weight_files(folder)))


def compact_size(folder: Path) -> int:
    """Bytes of the tensors of a compact folder, or of what a model's folder would be as one."""
    if (folder / CONTENTS).is_file():
        return sum(tensor.nbytes for _, tensor in _tensors(folder, list(_contents(folder)["files"])))
    parts = (_packed(key, tensor, tensor.clone) for key, tensor in _tensors(folder, weight_files(folder)))
    return sum(prod(entry.shape) * entry.dtype.itemsize for part in parts for entry in part.values())


def _tensors(folder: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        check_weights(folder / name)
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                yield key, file.get_tensor(key)


def unpack_folder(folder: str | Path, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Write a compact folder to `destination` as the folder that it was made from, bit for bit.

    Raises what `compact_folder` does; FolderError for a file that was cut short or altered.
    """
    source, final = Path(folder), Path(destination)
    contents = _contents(source)
    check_apart("the compact folder", source, "the destination", final)
    with drafted(final, overwrite) as draft, saving(final):
        _copy_others(source, draft.path, {*contents["files"], CONTENTS})
        for packed, about in contents["files"].items():
            (draft.path / about["weights"]).parent.mkdir(parents=True, exist_ok=True)
            with safe_open(source / packed, "pt") as file:
                entries = {}
                for key in _originals(file.keys(), contents):
                    described = contents["tensors"][key]
                    shape, dtype = tuple(described["shape"]), DTYPES[described["dtype"]]
                    entries[key] = Entry(shape, dtype, partial(_unpacked, file, key, described))
                write_tensors(draft.path / about["weights"], entries, about.get("metadata"))
        if "index" in contents:
            (draft.path / INDEX).write_text(json.dumps(contents["index"], indent=2) + "\n", encoding="utf-8")
        draft.publish()
    return final


def load_compact(folder: str | Path) -> nn.Module:
    """The transformers model of a compact folder, in the dtype it was saved in, on the CPU.

    folder: one that `moonshot prune --compact` saved.

    Raises FolderError for what is no compact folder, and for a file that was cut short or altered.
    """
    path = Path(folder)
    contents, source = _contents(path), Source(str(path))
    tensors = {}
    for packed in contents["files"]:
        with safe_open(path / packed, "pt") as file:
            for key in _originals(file.keys(), contents):
                tensors[key] = _unpacked(file, key, contents["tensors"][key])
    kind = source.model_class
    with reading(source.kind, source.name), quiet():
        model, found = kind.from_pretrained(
            None, config=source.config, state_dict=tensors, dtype="auto", output_loading_info=True
        )
    if missing := set(found["missing_keys"]) & set(model.state_dict()):
        raise FolderError(f"{path} lacks weights that {kind.__name__} has: {', '.join(sorted(missing)[:3])}")
    source.set_generation(model)
    return model


def load_any(source: Source) -> nn.Module:
    """The model of a folder, compact or not."""
    return load_compact(source.folder) if (source.folder / CONTENTS).is_file() else source.load()


def _packed(key: str, tensor: Tensor, read: Callable[[], Tensor]) -> dict[str, Entry]:
    """A tensor as values and bits where that is smaller, or as it is."""
    present, bits = int(_present(tensor).sum()), -(-tensor.numel() // 8)
    if present * tensor.itemsize + bits >= tensor.nbytes:
        return {key: Entry(tuple(tensor.shape), tensor.dtype, read)}
    return {
        f"{key}.values": Entry((present,), tensor.dtype, lambda: _values(read())),
        f"{key}.bits": Entry((bits,), torch.uint8, lambda: _bits(read())),
    }


def _present(tensor: Tensor) -> Tensor:
    """Where a tensor, flattened, has any bit set: minus zero is a value too."""
    return _as_bits(tensor) != 0


def _as_bits(tensor: Tensor) -> Tensor:
    """A tensor, flattened, as integers of its size: what torch can do with any kind of number."""
    return tensor.reshape(-1).view(_AS_BITS[tensor.itemsize])


def _values(tensor: Tensor) -> Tensor:
    return _as_bits(tensor)[_present(tensor)].view(tensor.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(_present(tensor).numpy()))


def _unpacked(file: Any, key: str, described: dict[str, Any]) -> Tensor:
    if not described["packed"]:
        return file.get_tensor(key)
    shape, bits = described["shape"], file.get_tensor(f"{key}.bits").numpy()
    present = np.unpackbits(bits, count=prod(shape)).astype(bool)
    tensor = torch.zeros(prod(shape), dtype=DTYPES[described["dtype"]])
    _as_bits(tensor)[torch.from_numpy(present)] = _as_bits(file.get_tensor(f"{key}.values"))
    return tensor.reshape(shape)


def _originals(keys: list[str], contents: dict[str, Any]) -> list[str]:
    """The tensors that a compact file has, from the names of its parts."""
    there = set(keys)
    tensors: dict[str, Any] = contents["tensors"]
    return [key for key, about in tensors.items() if (f"{key}.bits" if about["packed"] else key) in there]


def _contents(folder: Path) -> dict[str, Any]:
    """What compact.json says, of files that are whole."""
    check_folder(folder)
    try:
        contents: dict[str, Any] = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        files = {name: (about["weights"], about["sha256"]) for name, about in contents["files"].items()}
        known = contents["version"] == _VERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{folder} is no compact folder: it has no {CONTENTS} that can be read") from error
    if not known:
        raise FolderError(f"{folder} is of another version of moonshot: {CONTENTS} must say version {_VERSION}")
    for name, (weights, digest) in files.items():
        if not (is_inside(name, ".compact") and is_inside(weights, ".safetensors")):
            raise FolderError(
                f"{folder / CONTENTS} names {name!r} and {weights!r}, which lead out of the folder"
            )
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise FolderError(f"{folder / name} was cut short or altered: get it once more")
    return contents


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_others(source: Path, destination: Path, without: set[str]) -> None:
    """Copy the files of a folder, and of those below it, but for these. Raises FolderError for a link out of it."""
    for path in sorted(source.rglob("*")):
        name = str(path.relative_to(source))
        if path.is_file() and name not in without:
            check_link(path, source)
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination / name)
