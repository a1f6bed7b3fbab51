"""One process at a time for a folder that is written to."""

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moonshot.errors import MoonshotError

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # by a network file system, say


class LockedError(MoonshotError):
    """Another process is at work on the same folder."""


@contextmanager
def locked(file: Path, what: str | Path) -> Iterator[bool]:
    """Hold `file`, made where it is not there and removed afterwards, as a lock on `what`.

    The operating system lets go of it however the process ends; what is left of a file then locks nothing.
    Yields whether the lock is held: False on a file system that has no locks. Raises LockedError, which says who is at
    work, where another has it, and OSError where the file cannot be made.
    """
    handle, held = _opened(file, what)
    with handle:
        try:
            yield held
        finally:
            file.unlink(missing_ok=True)


def _opened(file: Path, what: str | Path) -> tuple[IO[str], bool]:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        handle = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with handle:
                holder = handle.read(200).strip()
            raise LockedError(
                f"{what} is being written to by {holder or 'another process'}: wait until it has ended, or choose "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return handle, False
            handle.close()
            raise
        if _is(handle, file):
            handle.truncate()
            handle.write(f"process {os.getpid()} on {platform.node()}")
            handle.flush()
            return handle, True
        handle.close()  # whoever had it has removed the file since it was opened


def _is(handle: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False
