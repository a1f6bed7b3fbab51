"""What a run has on disk, ended or not: the folder that it saves, and the answers of its checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moonshot.app.arguments import PruneArguments
from moonshot.pruning import checkpoint
from moonshot.pruning.checkpoint import CheckpointError
from moonshot.pruning.fingerprint import digest
from moonshot.pruning.lock import LockedError


@dataclass(frozen=True)
class OnDisk:
    """What there is of the run of a command."""

    asked: PruneArguments

    @cached_property
    def read_from(self) -> str:
        """A digest of which local files the model, all data and --config were at the start, each with its last change.

        What has a hub's or a dataset's name is not looked at.
        """
        asked = self.asked
        ours = [path.resolve() for path in (asked.save, asked.checkpoint) if path is not None]
        data = map(Path, [asked.data, *(asked.held_out or ())])
        found = []
        for place in (Path(asked.model), *data, *([asked.config] if asked.config else [])):
            for path in sorted(filter(Path.is_file, [place, *place.rglob("*")])):
                there, about = path.resolve(), path.stat()
                if not any(there.is_relative_to(folder) for folder in ours):
                    found.append((str(there), about.st_size, about.st_mtime_ns, about.st_ctime_ns))
        return digest(found)

    def is_done(self) -> bool:
        """Whether this command has saved its model already, and was ended before it said so.

        Only with a checkpoint is the same command meant to go on; with --overwrite only where that is still there.
        """
        folder = self.asked.checkpoint
        if folder is None or (self.asked.overwrite and not folder.exists()):
            return False
        return self._is_saved()

    def _is_saved(self) -> bool:
        """Whether --save has what this command gives, from the files that are there now."""
        try:
            recipe = json.loads((self.asked.save / "recipe.json").read_text(encoding="utf-8"))
            same = recipe["command"] == self.asked.command and recipe["read_from"] == self.read_from
            return bool(self.asked.command) and same
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def remove_checkpoint(self) -> None:
        """What the model that is saved makes superfluous."""
        if self.asked.checkpoint is not None:
            checkpoint.remove(self.asked.checkpoint)

    @contextmanager
    def saying_what_there_is(self) -> Iterator[None]:
        """Whatever ends the run says what there is of it, and what goes on with it."""
        try:
            yield
        except BaseException as error:
            folder = self.asked.checkpoint
            answers = 0 if folder is None else len(list(folder.glob("*.safetensors")))
            if self._is_saved():
                error.add_note(f"({self.asked.save} is saved)")
            elif answers and not isinstance(error, CheckpointError | LockedError):  # which are about the folder
                error.add_note(
                    f"(nothing was saved, but {folder} has the answers of {answers} layers, from which the same "
                    f"command continues: {self.asked.command})"
                )
            elif folder is None and isinstance(error, SystemExit):
                error.add_note(
                    "(nothing was saved; with --checkpoint FOLDER an interrupted run goes on where it was)"
                )
            raise
