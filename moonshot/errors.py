"""The errors a user can make: each module has its own, and all are a MoonshotError."""

from difflib import get_close_matches
from numbers import Real
from pathlib import Path


class MoonshotError(ValueError):
    """Something about the call, the model or the data is wrong; the message says what, and what to do."""


class ArgumentError(MoonshotError):
    """An argument whose value cannot be used."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a kind that cannot be used."""


def meant_path(path: str | Path) -> str:
    """A question, to end the message about a path that is not there, whether one that is nearly called so was meant."""
    try:
        found = _nearest(Path(path))
    except OSError:  # a folder that may not be read, or a name that is too long
        found = None
    return "" if found in (None, Path(path)) else f"; did you mean {found}?"


def _nearest(path: Path) -> Path | None:
    """The path that is there with the names most like these, one after the other; None where one is like nothing."""
    if path.exists():
        return path
    folder = _nearest(path.parent)
    if folder is None or not folder.is_dir():
        return None
    close = get_close_matches(path.name, [each.name for each in folder.iterdir()], 1)
    return folder / close[0] if close else None


def check_count(name: str, value: object) -> None:
    """Raises ArgumentError, which names the argument, for what is no positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name} must be a positive integer, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raises ArgumentTypeError for what is no real number, ArgumentError for an integer beyond the largest float64."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be a number, got {value!r}")
    try:
        float(value)
    except OverflowError:
        raise ArgumentError(f"{name} must be a number that float64 holds, got an integer beyond it") from None
