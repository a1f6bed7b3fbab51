"""The figures of a run in a JSON file, and what has changed between two of them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .timing import Figure, Measured

NOISE = 0.05  # a smaller change of a ratio is none, however small the spread of a few rounds
ROUNDING = 1e-3  # likewise of an objective: threads add up in another order


class RecordError(ValueError):
    """A file is not a record of this benchmark."""


@dataclass(frozen=True)
class Record:
    """One run. machine: see machine.machine; two records with the same one can be compared."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, Any]
    cases: dict[str, Measured]

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Raises RecordError where the file is none that `save` wrote."""
        try:
            content = json.loads(path.read_text("utf-8"))
            cases = {
                name: Measured(
                    {key: Figure(**figure) for key, figure in case["ratios"].items()},
                    {key: Figure(**figure) for key, figure in case["seconds"].items()},
                    {key: float(value) for key, value in case["values"].items()},
                )
                for name, case in content["cases"].items()
            }
            return cls(str(content["date"]), dict(content["machine"]), dict(content["versions"]), cases)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordError(
                f"{path} is not a record of this benchmark ({type(error).__name__}: {error}): "
                "delete it or move it away, and the run begins a new one"
            ) from error

    def save(self, path: Path) -> Path | None:
        """Write to `path`. The record that is there is kept beside it, its date in the name: that path, or None."""
        kept = None
        if path.exists():
            date = Record.load(path).date.replace(":", "-")
            kept = path.with_stem(f"{path.stem}-{date}")
            path.replace(kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return kept


@dataclass(frozen=True)
class Change:
    """A figure that moved further than the rounds of both runs spread. kind: "ratios", "seconds" or "values"."""

    kind: str
    case: str
    name: str
    before: Figure
    now: Figure

    @property
    def verdict(self) -> str:
        better, worse = ("better", "worse") if self.kind == "values" else ("faster", "slower")
        return worse if self.now.median > self.before.median else better

    def __str__(self) -> str:
        unit = {"ratios": "", "seconds": " s", "values": " in value"}[self.kind]
        return f"{self.verdict}: {self.case}: {self.name}{unit}: {self.now}, was {self.before}"


def changes(now: Record, before: Record) -> list[Change]:
    """What moved, ratios first, then objectives, then seconds: figures that both have, on the same machine.

    Raises ValueError for records of two machines.
    """
    if now.machine != before.machine:
        raise ValueError("times on two machines, or with other threads, do not compare: measure both on one")
    return [
        change
        for kind, least in (("ratios", NOISE), ("values", ROUNDING), ("seconds", NOISE))
        for change in _shared_figures(kind, now, before)
        if _apart(change.now, change.before, least)
    ]


def _shared_figures(kind: str, now: Record, before: Record) -> Iterator[Change]:
    for case, figures in now.cases.items():
        earlier = getattr(before.cases[case], kind) if case in before.cases else {}
        for name, figure in getattr(figures, kind).items():
            if name in earlier:
                yield Change(kind, case, name, _spread(earlier[name]), _spread(figure))


def _spread(figure: Figure | float) -> Figure:
    return figure if isinstance(figure, Figure) else Figure(figure, figure, figure)


def _apart(a: Figure, b: Figure, least: float) -> bool:
    separate = a.low > b.high or a.high < b.low
    return separate and abs(a.median - b.median) > least * min(a.median, b.median)
