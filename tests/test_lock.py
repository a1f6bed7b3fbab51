"""One process at a time for a folder."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from moonshot.pruning.lock import LockedError, locked

HOLD = """
import sys
from pathlib import Path
from moonshot.pruning.lock import locked
with locked(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_holder_is_told_who_is_at_work(tmp_path):
    file = tmp_path / ".out.lock"
    with locked(file, "out") as held:
        assert held
        with (
            pytest.raises(LockedError, match=f"out is being written to by process {os.getpid()} on .*: wait"),
            locked(file, "out"),
        ):
            pass
        assert file.exists()
    assert list(tmp_path.iterdir()) == []
    with locked(file, "out") as held:
        assert held


def test_what_a_killed_process_leaves_locks_nothing(tmp_path):
    file = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {other.pid} "), locked(file, "out"):
            pass
        other.kill()
    assert file.exists()
    with locked(file, "out") as held:
        assert held and file.read_text().startswith(f"process {os.getpid()} ")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", "out") as held:
        assert not held
    assert list(tmp_path.iterdir()) == []
