"""What is timed, one row after the other, within a limit of time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One figure of a table. group: the layer or model; note: why there is no figure, or what is beside it."""

    group: str
    name: str
    seconds: float | None = None
    gibibytes: float | None = None
    note: str = ""


@dataclass
class Rows:
    """Times things on a device and says each figure as soon as it is there.

    device: "cuda" or "cpu". limit: seconds, after which nothing more is begun. say: what is done with each row.
    """

    device: str
    limit: float
    say: Callable[[Row], None] = print
    all: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.limit

    @property
    def ended(self) -> bool:
        """Whether nothing more is begun."""
        return time.monotonic() > self._end

    def time(self, group: str, name: str, run: Callable[[], Any], rounds: int, warm: bool = True) -> Any:
        """The median time of `run` over so many rounds, after one to warm up; returns its last answer, or None.

        What fails is a row that says so, and the next one is begun.
        """
        if self.ended:
            self._add(Row(group, name, note="not run: no time left"))
            return None
        try:
            if warm:
                run()
            self._forget()
            seconds = []
            for _ in range(rounds):
                answer = None  # its memory serves the next
                begin = time.perf_counter()
                answer = run()
                self._wait()
                seconds.append(time.perf_counter() - begin)
        except Exception as error:  # a table with a hole is worth more than none
            self._add(Row(group, name, note=f"failed: {type(error).__name__}: {str(error)[:300]}"))
            return None
        self._add(Row(group, name, statistics.median(seconds), self._peak()))
        return answer

    def _add(self, row: Row) -> None:
        self.all.append(row)
        self.say(row)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _forget(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> float | None:
        """The most that torch's allocator held, which is CuPy's too."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None
