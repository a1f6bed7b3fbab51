"""Plots of one value a layer, as SVG that fits any width: places are in percent, type and dots in pixels."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from moonshot.pruning.markup import text

COLOURS = 8  # kinds of layers that have a colour of their own; the rarest share the last one
_HEIGHT, _LABELS = 190, 12  # pixels, and labels below the axis at most


def kinds(names: Sequence[str]) -> dict[str, str]:
    """{layer: its kind}, the last part of its name that is no number, such as q_proj; "other" beyond COLOURS."""
    found = {name: _words(name)[-1] for name in names}
    common = [kind for kind, _ in Counter(found.values()).most_common()]
    rare = set(common[COLOURS - 1 :]) if len(common) > COLOURS else set()
    return {name: "other" if kind in rare else kind for name, kind in found.items()}


def legend(kind_of: Mapping[str, str]) -> str:
    """The colours of the kinds; nothing where there is one."""
    numbers = _numbers(kind_of)
    if len(numbers) < 2:
        return ""
    items = (f'<li><i class="k{number}"></i>{text(kind)}</li>' for kind, number in numbers.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def chart(
    values: Mapping[str, float], kind_of: Mapping[str, str], *, log: bool, top: float | None = None
) -> str:
    """A dot for each layer in the model's order, those of a kind joined by lines.

    log: whether heights are logarithms; values that have none are at the bottom. top: the highest value of the axis.
    """
    names = list(values)
    scale = _LogScale(values.values()) if log else _LinearScale(values.values(), top)
    places = {
        name: (100 * (k + 0.5) / len(names), 100 - scale.height(values[name])) for k, name in enumerate(names)
    }
    radius = 3.5 if len(names) <= 100 else 2.5
    marks = [_grid(value, 100 - scale.height(value)) for value in scale.ticks()]
    marks += _blocks(names)
    for kind, number in _numbers(kind_of).items():
        dots = [name for name in names if kind_of[name] == kind]
        marks += [_line(places[a], places[b], number) for a, b in pairwise(dots)]
        marks += [_dot(name, values[name], places[name], number, radius) for name in dots]
    return f'<div class="plot"><svg width="100%" height="{_HEIGHT}" aria-hidden="true">{"".join(marks)}</svg></div>'


class _LogScale:
    def __init__(self, values: Iterable[float]):
        usable = [value for value in values if 0 < value < math.inf] or [1.0]
        self._low, self._high = math.log(min(usable) / 1.3), math.log(max(usable) * 1.3)

    def height(self, value: float) -> float:
        """Percent of the plot's height, 0 to 100."""
        if not value > 0:  # zero, or no number
            return 0.0
        return min(max(100 * (math.log(value) - self._low) / (self._high - self._low), 0.0), 100.0)

    def ticks(self) -> list[float]:
        powers = range(math.floor(self._low / math.log(10)) - 1, math.ceil(self._high / math.log(10)) + 1)
        for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
            found = [float(f"{digit}e{power}") for power in powers for digit in digits]
            found = [value for value in found if self._low <= math.log(value) <= self._high]
            if len(found) <= 6:
                break
        return found[:: max(len(found) // 6, 1)]


class _LinearScale:
    def __init__(self, values: Iterable[float], top: float | None):
        usable = [value for value in values if 0 <= value < math.inf] or [1.0]
        self._top = top or 1.08 * max(usable) or 1.0

    def height(self, value: float) -> float:
        return min(max(100 * value / self._top, 0.0), 100.0) if value == value else 0.0

    def ticks(self) -> list[float]:
        step = 10 ** math.floor(math.log10(self._top))
        step = next(step * part for part in (2, 1, 0.5, 0.25) if self._top / (step * part) >= 3)
        return [k * step for k in range(int(self._top / step + 1e-9) + 1)]


def _numbers(kind_of: Mapping[str, str]) -> dict[str, int]:
    return {kind: number for number, kind in enumerate(dict.fromkeys(kind_of.values()))}


def _words(name: str) -> list[str]:
    return [part for part in name.split(".") if not part.isdigit()] or [name]


def _blocks(names: Sequence[str]) -> list[str]:
    """Labels below the axis: the number in a layer's name, such as that of its block, where it changes."""
    numbers = [found[1] if (found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)) else "" for name in names]
    starts = [k for k, number in enumerate(numbers) if number and (k == 0 or number != numbers[k - 1])]
    return [
        f'<text class="tick" x="{100 * (k + 0.5) / len(names):.2f}%" y="100%" dy="17">{numbers[k]}</text>'
        for k in starts[:: math.ceil(len(starts) / _LABELS) or 1]
    ]


def _grid(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
        f'<text class="tick left" x="0" y="{y:.2f}%" dx="-8" dy="4">{value:g}</text>'
    )


def _line(a: tuple[float, float], b: tuple[float, float], number: int) -> str:
    return f'<line class="k{number}" x1="{a[0]:.2f}%" y1="{a[1]:.2f}%" x2="{b[0]:.2f}%" y2="{b[1]:.2f}%"/>'


def _dot(name: str, value: float, at: tuple[float, float], number: int, radius: float) -> str:
    title = f"<title>{text(name)}: {value:.4g}</title>"
    return f'<circle class="k{number}" cx="{at[0]:.2f}%" cy="{at[1]:.2f}%" r="{radius}">{title}</circle>'
