"""A folder of finished runs of a comparison, a file each, so that none is repeated."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from moonshot.errors import MoonshotError
from moonshot.pruning.comparison import Run
from moonshot.pruning.lock import locked
from moonshot.pruning.whole_file import write_whole

_RUNS, _LOCK = "runs", "lock"


class RunStoreError(MoonshotError):
    """A folder that holds something else than a comparison."""


class RunStore:
    """Finished runs by what they depend on, in JSON's types: those with other settings are kept apart.

    folder: made where it is not there. Inside `with` no other process has it.
    Raises RunStoreError for a folder with other files, LockedError where another process has it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise RunStoreError(f"{folder} is a file: give a folder for the comparison")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / _RUNS).is_dir():
            raise RunStoreError(f"{folder} has other files than a comparison: choose another folder")
        self._held = ExitStack()

    def __enter__(self) -> "RunStore":
        (self.folder / _RUNS).mkdir(parents=True, exist_ok=True)
        if self._held.enter_context(locked(self.folder / _LOCK, self.folder)):
            for file in (*self.folder.glob(".comparison.*"), *(self.folder / _RUNS).glob(".*")):
                file.unlink()  # what a killed process was writing
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._held.close()

    def find(self, work: Mapping[str, Any]) -> Run | None:
        """The run that was stored for this work; None where there is none, or none that can be read."""
        try:
            stored = json.loads(self._file(work).read_text(encoding="utf-8"))
            return Run(**stored["run"]) if stored["work"] == json.loads(json.dumps(dict(work))) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store(self, work: Mapping[str, Any], run: Run) -> None:
        write_whole(self._file(work), json.dumps({"run": asdict(run), "work": dict(work)}, indent=2) + "\n")

    def _file(self, work: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(dict(work), sort_keys=True).encode()).hexdigest()
        return self.folder / _RUNS / f"{digest[:24]}.json"
