"""A run and its terminal: names cannot steer it, its end does not end the run, and signals end that cleanly."""

import os
import signal
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

_ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
ENDS = {128 + number: word for number, word in _ENDS.items()}  # by exit code


def visible(text: str) -> str:
    """The text with everything but lines of printable characters escaped, so that names from outside stay text."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def from_own_code(error: BaseException) -> bool:
    """Whether an error went through code that is neither moonshot's nor installed: a plug-in's, whose bug it is."""
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    installed.add(Path(__file__).resolve().parents[1])
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(file.is_file() and installed.isdisjoint(file.resolve().parents) for file in files)


def say(console: Console, text: str) -> None:
    """Print text as it is: no markup, no escape sequences."""
    console.print(Text(visible(text)), soft_wrap=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What other libraries warn of and count is not said, but for downloads on a terminal."""
    silent = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    if sys.stderr is None or not sys.stderr.isatty():
        silent["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for variable, value in silent.items():
        os.environ.setdefault(variable, value)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def unbroken_output() -> Iterator[None]:
    """Standard output and error that may be closed or full meanwhile (`| head`): what is printed then is lost."""
    with redirect_stdout(_Unbroken(sys.stdout)), redirect_stderr(_Unbroken(sys.stderr)):
        yield


class _Unbroken:
    """A stream that is written to for as long as that works."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._tried(lambda: self._stream.write(text)) or 0

    def flush(self) -> None:
        self._tried(lambda: self._stream.flush())

    def _tried(self, action: Any) -> Any:
        if self._stream is None:  # closed from the start
            return None
        try:
            return action()
        except OSError:
            with suppress(OSError), open(os.devnull, "w") as nothing:  # for what is still in the buffer too
                os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs inside as Control-C does: it cleans up, and the exit code says which it was."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # cleaning up is not interrupted
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    for number in _ENDS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
