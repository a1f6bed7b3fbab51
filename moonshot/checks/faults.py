"""Faults of a plug-in, collected and raised together."""

from collections.abc import Callable
from typing import Any

import numpy as np

from moonshot.errors import ArgumentTypeError


class CheckError(AssertionError):
    """A plug-in breaks a promise. `faults` lists each in words, as the message does."""

    def __init__(self, subject: str, faults: list[str]):
        super().__init__("\n".join([f"{subject} breaks its promises:", *(f"  - {fault}" for fault in faults)]))
        self.faults = tuple(faults)


class Faults:
    """What was found wrong with one plug-in: each fault once, with where it was seen first and how often."""

    def __init__(self, subject: str):
        self.subject = subject
        self._places: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, fault: str, where: str) -> None:
        self._places.setdefault(fault, []).append(where)

    def run(self, what: str, where: str, call: Callable[[], Any], *expected: type[Exception]) -> Any:
        """What `call` returns; None, and a fault, where it raises something not `expected`."""
        try:
            return call()
        except expected:
            raise
        except Exception as error:  # whatever a plug-in does wrong is what is asked for
            self.add(f"{what} raises {type(error).__name__}: {error}", where)
            return None

    def raise_if_any(self) -> None:
        if self:
            raise CheckError(self.subject, [self._line(*item) for item in self._places.items()])

    @staticmethod
    def _line(fault: str, places: list[str]) -> str:
        more = f", and {len(places) - 1} more" if len(places) > 1 else ""
        return f"{fault} [{places[0]}{more}]"


class Unchanged:
    """A copy of arrays, to see afterwards which of them somebody has written to."""

    def __init__(self, **arrays: Any):
        self._pairs = {name: (array, np.array(array)) for name, array in arrays.items() if array is not None}

    def changed(self) -> list[str]:
        return [
            name
            for name, (now, before) in self._pairs.items()
            if not np.array_equal(now, before, equal_nan=True)
        ]


def is_instance(plugin: Any, protocol: type, example: str) -> None:
    """TypeError unless a plug-in is an object, not a class, with all the methods of its protocol."""
    if isinstance(plugin, type):
        raise ArgumentTypeError(f"pass an instance, such as {example}, not the class {plugin.__name__}")
    if not isinstance(plugin, protocol):
        names = [name for name in dir(protocol) if not name.startswith("_") and not hasattr(plugin, name)]
        missing = f": it is missing {', '.join(names)}" if names else ""
        raise ArgumentTypeError(f"{type(plugin).__name__} is no {protocol.__name__}{missing}")
