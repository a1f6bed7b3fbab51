"""Time every solver beside its peers and beside the products that it cannot avoid.

    python -m benchmarks.speed [--size 2048 [2048]] [--factors 16] [--runs 5] [--cases sweep admm ...] [--large]

Prints ratios of times and objectives: the median over the rounds, the least and the largest. A run of all cases is
written to a JSON file. Where an earlier one of the same machine is there, what got slower or faster than both runs'
rounds spread is said, and the earlier one is kept beside it.
"""

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .cases import NAMES, cases, large_cases
from .machine import machine, versions
from .record import Record, changes
from .timing import Case, Measured, measured

OUTPUT = Path(__file__).parent.parent / "outputs" / "speed.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[2048], help="rows and columns of the layer, or both at once"
    )
    parser.add_argument("--factors", type=int, default=16, help="factors of a row, 1 or more")
    parser.add_argument("--runs", type=int, default=5, help="rounds of each case")
    parser.add_argument("--seconds", type=float, default=60, help="no fourth round of a case after that long")
    parser.add_argument("--cases", nargs="+", default=NAMES, choices=NAMES, help="compared, but not written")
    parser.add_argument("--large", action="store_true", help="layers of a Llama as well, two rounds: hours")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if len(options.size) > 2 or any(size < 4 or size % 4 for size in options.size):
        parser.error(f"--size must be one or two numbers, each a positive multiple of 4, got {options.size}")
    if options.factors < 1 or options.runs < 1:
        parser.error("--factors and --runs must be 1 or more")
    before = Record.load(options.output) if options.output.exists() else None
    console = Console()
    names, whole = tuple(options.cases), set(options.cases) == set(NAMES)
    runs = _measured(
        cases(names, options.size[0], options.size[-1], options.factors), options.runs, options.seconds
    )
    if options.large:
        runs = chain(runs, _measured(large_cases(names, options.factors), 2, options.seconds))
    results = {}
    for name, result in runs:
        results[name] = result
        console.print(table(name, result))
    now = Record(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", machine(), versions(), results)
    for line in comparison(now, before):
        console.print(line, markup=False, soft_wrap=True)
    if whole:
        kept = now.save(options.output)
        console.print(
            f"written to {options.output}" + (f", the earlier run is {kept.name}" if kept else ""), markup=False
        )


def _measured(some: Iterator[Case], rounds: int, seconds: float) -> Iterator[tuple[str, Measured]]:
    for case in some:
        yield case.name, measured(case, rounds, seconds)


def table(name: str, result: Measured) -> Table:
    """The figures of a case: ratios of times, beside them those of objectives where there are some, and seconds."""
    out = Table("", "time", "objective", title=name, title_justify="left")
    for pair, figure in result.ratios.items():
        value = result.values.get(pair)
        out.add_row(pair, str(figure), "" if value is None else f"{value:.6f}")
    out.add_section()
    for run, figure in result.seconds.items():
        out.add_row(run, f"{figure} s", "")
    return out


def comparison(now: Record, before: Record | None) -> list[str]:
    """What changed since the earlier run, in lines to print."""
    if before is None:
        return ["no earlier run to compare with"]
    if before.machine != now.machine:
        return [
            f"the run of {before.date} was on another machine or with other threads, so nothing is compared:",
            f"  then {before.machine}",
            f"  now  {now.machine}",
        ]
    if not set(now.cases) & set(before.cases):
        return [f"the run of {before.date} has none of these cases"]
    found = changes(now, before)
    compared = [f"  {change}" for change in found if change.kind != "seconds"]
    seconds = [f"  {change}" for change in found if change.kind == "seconds"]
    return [
        f"since {before.date}, commit {before.versions.get('commit')}:",
        *(compared or ["  no ratio has changed"]),
        *(["seconds, which all else that the machine does moves too:", *seconds] if seconds else []),
    ]


if __name__ == "__main__":
    main()
