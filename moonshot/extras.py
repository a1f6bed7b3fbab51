"""Packages that only some uses need, and that `pip install moonshot[...]` brings."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Imports of what an extra brings. Raises ImportError that says what to install where something is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: pip install 'moonshot[{extra}]' brings it"
        ) from error
