"""A folder that is written beside its place and gets its name when all of it is on disk."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from moonshot.files.source import FolderError
from moonshot.pruning.lock import locked

_MARK = ".moonshot-draft"  # in a folder that moonshot may remove, whoever made it
_FILES = "files"  # the key in report.json under which a saved folder lists what moonshot wrote


def check_apart(first: str, one: Path, second: str, other: Path) -> None:
    """Raises FolderError where a folder is another one, inside it or around it."""
    here, there = one.resolve(), other.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise FolderError(f"{first} {one} and {second} {other} must be folders apart from one another")


def check_free(final: Path, overwrite: bool = False) -> None:
    """Raises FileExistsError where a folder is there and may not be replaced, FolderError where moonshot must not.

    Only what moonshot wrote is replaced: a folder with its report, and with no other files. Nothing is written to a
    path without a name, such as "" or "..".
    """
    if final.name in ("", ".."):
        raise FolderError(f"cannot save to {str(final)!r}: give the name of a folder to write")
    if not os.path.lexists(final):
        return
    if overwrite and final.is_symlink():
        raise FolderError(f"{final} is a link: give the name of the folder that it leads to, {final.resolve()}")
    if not overwrite:
        raise FileExistsError(
            f"{final} exists: choose another folder, add --overwrite (overwrite=True in Python), or remove it first"
        )
    written = _written(final)
    if written is None:
        raise FolderError(f"{final} is no folder that moonshot wrote: choose another, or remove it first")
    if others := sorted(_files(final) - written):
        raise FolderError(f"{final} has {others[0]!r}, which moonshot did not write: put it elsewhere first")


@dataclass(frozen=True)
class Draft:
    """A temporary folder `path` that becomes `final`. overwrite: whether it may replace what moonshot wrote there."""

    path: Path
    final: Path
    overwrite: bool = False

    def publish(self) -> None:
        """Wait until everything is on disk, and give the folder its name.

        Raises FileExistsError where there is a folder by now that may not be replaced.
        """
        _list_files(self.path)
        self.path.chmod(0o755)
        for path in (*self.path.rglob("*"), self.path):
            _sync(path)
        replaced = _replaced(self.final)
        if os.path.lexists(self.final):
            check_free(self.final, self.overwrite)
            os.rename(self.final, replaced)
        os.rename(self.path, self.final)
        (self.final / _MARK).unlink()
        _sync(self.final.parent)
        _remove_written(replaced)


@contextmanager
def drafted(final: Path, overwrite: bool = False) -> Iterator[Draft]:
    """A draft beside the final folder, gone afterwards where it was not published.

    Meanwhile no other process can have one for the same place. What killed ones left is removed first.
    Raises what `check_free` does, LockedError, or OSError with what to do.
    """
    check_free(final, overwrite)
    with ExitStack() as stack:
        with saving(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            final = final.parent.resolve() / final.name  # wherever a link, or the process, goes meanwhile
            alone = stack.enter_context(locked(final.parent / f".{final.name}.lock", final))
        if alone:
            _clean_up(final)
        check_free(final, overwrite)
        with saving(final):
            path = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        try:
            with saving(final):
                (path / _MARK).touch()
            yield Draft(path, final, overwrite)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _clean_up(final: Path) -> None:
    """Remove the drafts of processes that were killed, and end a replacement that was: nobody is at work here."""
    replaced = _replaced(final)
    if replaced.exists() and not final.exists():
        os.rename(replaced, final)
    _remove_written(replaced)
    if replaced.exists():
        raise FolderError(f"{replaced} has what was in {final} and is not moonshot's: put it elsewhere first")
    for draft in final.parent.glob(f".{escape(final.name)}-????????"):
        if (draft / _MARK).is_file() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)


def _replaced(final: Path) -> Path:
    return final.parent / f".{final.name}.replaced"


def _written(folder: Path) -> set[str] | None:
    """The files that moonshot wrote into a saved folder; None where it is none."""
    try:
        names = json.loads((folder / "report.json").read_text(encoding="utf-8"))[_FILES]
        return {str(name) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_written(folder: Path) -> None:
    """Remove a saved folder but for what others have put into it."""
    for name in sorted(_files(folder) & (_written(folder) or set()), key=lambda name: name == "report.json"):
        (folder / name).unlink()
    for path in (*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder):
        with suppress(OSError):  # it is not empty, or not there
            path.rmdir()


def _files(folder: Path) -> set[str]:
    """Everything in a folder and below it that is no folder, by relative name."""
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }


def _list_files(folder: Path) -> None:
    """Say in the report which files moonshot wrote."""
    report = folder / "report.json"
    content = json.loads(report.read_text(encoding="utf-8")) | {_FILES: sorted(_files(folder) - {_MARK})}
    report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of them, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def saving(final: Path) -> Iterator[None]:
    """What goes wrong with the disk is said with the folder and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"could not save to {final}: {error}; free some space or choose another folder"
        ) from error
