"""A function that remembers its first few values."""

from collections.abc import Callable
from typing import Any

_FEW = 4


class FirstFewCache:
    """`find`, whose values for the first four arguments it is asked for are computed once.

    A solver that goes through the same arguments for every pattern, one after the other, finds the first of them in the
    cache however many there are. A cache of the latest would have none of them.
    """

    def __init__(self, find: Callable):
        self._find = find
        self._values: dict[tuple, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        if arguments in self._values:
            return self._values[arguments]
        value = self._find(*arguments)
        if len(self._values) < _FEW:
            self._values[arguments] = value
        return value
