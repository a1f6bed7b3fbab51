"""Pictures made of bars: each starts at a reference and has its number at its end, on an axis with plain numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moonshot.extras import from_extra

_INK, _GRID = "#333333", "#e3e3e3"


def blank(width: float, height: float) -> Any:
    """An empty matplotlib Figure of a size in inches, 200 pixels each. Raises ImportError without matplotlib."""
    with from_extra("cli"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def draw_bars(
    axis: Any,
    values: Mapping[str, float],
    reference: float,
    *,
    numbers: Sequence[str],
    colours: Sequence[str],
    bold: Sequence[bool] | None = None,
    spreads: Sequence[float] | None = None,
    log: bool = True,
    size: float = 9,
) -> None:
    """A row for each name, from top to bottom; one whose value is no finite number has no bar.

    numbers, colours, bold: of the rows, what is written at the ends of the bars.
    spreads: of the values, drawn to both sides of the ends. log: whether the axis is. size: of the type, in points.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    names = list(values)
    lengths = [value if math.isfinite(value) else reference for value in values.values()]
    sides = [0.0] * len(names) if spreads is None else list(spreads)
    if log:
        axis.set_xscale("log")
    axis.barh(
        names,
        [value - reference for value in lengths],
        left=reference,
        color=colours,
        height=0.68,
        xerr=sides if any(sides) else None,
        error_kw={"ecolor": _INK, "elinewidth": 1},
    )
    for row, value in enumerate(lengths):
        right = value >= reference
        axis.annotate(
            numbers[row],
            (value + (sides[row] if right else -sides[row]), row),
            (4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=size,
            color=_INK,
            weight="bold" if bold and bold[row] else "normal",
        )
    axis.axvline(reference, color=_INK, linewidth=1.2)
    (_log_range if log else _linear_range)(axis, lengths, reference)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(colors=_INK, labelsize=size, length=0)
    axis.grid(axis="x", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _log_range(axis: Any, lengths: Sequence[float], reference: float) -> None:
    from matplotlib.ticker import LogLocator

    low, high = min(*lengths, reference), max(*lengths, reference * 1.5)
    room = (high / low) ** 0.2  # for the longest bar's number
    axis.set_xlim(low if low == reference else low / room, high * room)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 3 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 7)))


def _linear_range(axis: Any, lengths: Sequence[float], reference: float) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = min(*lengths, reference), max(*lengths, reference)
    room = 0.3 * (high - low or abs(high) or 1.0)  # for the numbers
    axis.set_xlim(low - room, high if high == reference else high + room)
    axis.xaxis.set_major_locator(MaxNLocator(5))
