"""What methods cost a model, side by side: as a table, as a picture, as CSV and JSON."""

import csv
import io
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap

from moonshot.pruning.markup import printable
from moonshot.pruning.picture import blank, draw_bars
from moonshot.pruning.whole_file import write_whole


@dataclass(frozen=True)
class Run:
    """A model pruned once by a method.

    value: what was measured afterwards; None where it failed, for the reason `error`.
    sparsity: the fraction of zeros in the pruned layers. seconds: of pruning and measuring.
    """

    method: str
    pattern: str
    seed: int
    value: float | None
    sparsity: float = 0.0
    seconds: float = 0.0
    error: str = ""

    def __str__(self) -> str:
        result = f"failed: {self.error}" if self.value is None else number(self.value)
        return f"{self.method}, {self.pattern}, seed {self.seed}: {result} ({self.seconds:.0f} s)"


@dataclass(frozen=True)
class Cell:
    """A method at a pattern. values: by seed, of the runs that did not fail; errors: of those that did."""

    values: list[float]
    errors: list[str]

    @property
    def mean(self) -> float:
        """Not a number where all failed."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds (of a sample: n - 1), where there are two finite values or more."""
        return statistics.stdev(self.values) if len(self.values) > 1 and math.isfinite(self.mean) else None

    def __str__(self) -> str:
        if not self.values:
            return "failed"
        spread = "" if self.deviation is None else f" ± {number(self.deviation, like=self.mean)}"
        failed = f" ({len(self.errors)} failed)" if self.errors else ""
        return f"{number(self.mean)}{spread}{failed}"


@dataclass(frozen=True)
class Comparison:
    """Every method at every pattern, once for each seed.

    metric: what was measured, such as "perplexity"; dense: that of the model before pruning.
    """

    metric: str
    dense: float
    runs: list[Run]
    higher_is_better: bool = False

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def patterns(self) -> list[str]:
        return list(dict.fromkeys(run.pattern for run in self.runs))

    def cell(self, method: str, pattern: str) -> Cell:
        """A method at a pattern, over all seeds."""
        runs = [run for run in self.runs if (run.method, run.pattern) == (method, pattern)]
        values = [run.value for run in runs if run.value is not None]
        return Cell(values, [run.error for run in runs if run.value is None])

    def best(self, pattern: str) -> str | None:
        """The method with the best mean."""
        means = {method: self.cell(method, pattern).mean for method in self.methods}
        known = {method: mean for method, mean in means.items() if not math.isnan(mean)}
        return (max if self.higher_is_better else min)(known, key=known.__getitem__, default=None)

    @property
    def title(self) -> str:
        seeds = len({run.seed for run in self.runs})
        over = f"; mean ± standard deviation over {seeds} calibration draws" if seeds > 1 else ""
        return f"{self.metric}, dense {number(self.dense)}{over}"

    @property
    def failures(self) -> list[str]:
        """Why runs failed, each reason once."""
        reasons = {
            run.error: f"{run.method}, {run.pattern}" for run in reversed(self.runs) if run.value is None
        }
        return [f"{who} failed: {reason}" for reason, who in reversed(reasons.items())]

    def __str__(self) -> str:
        """As Markdown, the best of each pattern in bold."""
        lines = [self.title, "", f"| method | {' | '.join(self.patterns)} |"]
        lines.append("|---" * (len(self.patterns) + 1) + "|")
        best = {pattern: self.best(pattern) for pattern in self.patterns}
        for method in self.methods:
            cells = {pattern: str(self.cell(method, pattern)) for pattern in self.patterns}
            shown = (f"**{cell}**" if best[pattern] == method else cell for pattern, cell in cells.items())
            lines.append(f"| {printable(method).replace('|', '/')} | {' | '.join(shown)} |")
        return "\n".join(lines + [""] * bool(self.failures) + self.failures)

    def to_json(self) -> str:
        """Every run, and what they have in common; a value that is no finite number is null."""
        about = {"metric": self.metric, "higher_is_better": self.higher_is_better, "dense": _finite(self.dense)}
        runs = [asdict(run) | {"value": _finite(run.value)} for run in self.runs]
        return json.dumps(about | {"runs": runs}, indent=2)

    def to_csv(self) -> str:
        """A line for each run, under a line of names."""
        text = io.StringIO()
        names = list(Run.__dataclass_fields__)
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(run) for run in self.runs)
        return text.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write comparison.json, comparison.csv and comparison.md into a folder."""
        for kind, text in {"json": self.to_json(), "csv": self.to_csv(), "md": str(self)}.items():
            write_whole(Path(folder) / f"comparison.{kind}", text.rstrip("\n") + "\n")

    def plot(self, path: str | Path) -> None:
        """A bar for each method and pattern, from the dense model's value to its own; as PNG."""
        names = {method: _label(method) for method in self.methods}
        width = max(len(line) for name in names.values() for line in name.splitlines())
        lines = sum(1 + 0.5 * name.count("\n") for name in names.values())
        figure = blank(0.5 + 0.08 * width + min(2.6 * len(self.patterns), 12), 1.1 + 0.3 * lines)
        axes = figure.subplots(1, len(self.patterns), sharey=True, squeeze=False)[0]
        for axis, pattern in zip(axes, self.patterns, strict=True):
            cells = {method: self.cell(method, pattern) for method in self.methods}
            best = [method == self.best(pattern) for method in cells]
            draw_bars(
                axis,
                {names[method]: cell.mean for method, cell in cells.items()},
                self.dense,
                numbers=[_short(cell) for cell in cells.values()],
                colours=["#1f5fa8" if is_best else "#a9c1db" for is_best in best],
                bold=best,
                spreads=[cell.deviation or 0.0 for cell in cells.values()],
                log=not self.higher_is_better,
            )
            zeros = f"{pattern[:-1]} % zeros" if pattern.endswith("%") else pattern
            axis.set_title(zeros, fontsize=11, weight="bold", loc="left")
        scale = "" if self.higher_is_better else ", log scale"
        figure.supxlabel(
            f"{self.metric}{scale}; bars begin at the dense model's {number(self.dense)}", fontsize=9
        )
        figure.savefig(path)


def number(value: float, like: float | None = None) -> str:
    """A value as it is printed, with the decimals of one `like` it, or of its own size."""
    size = abs(value if like is None else like)
    for limit, decimals in ((1, 4), (1000, 2), (1e6, 0)):
        if size < limit:
            return f"{value:.{decimals}f}"
    return f"{value:.3g}"


def _label(method: str) -> str:
    """A method's name beside its bar."""
    return "\n".join(wrap(printable(method), 34)).replace("$", r"\$")


def _short(cell: Cell) -> str:
    """What is written at the end of a bar."""
    if not cell.values:
        return "failed"
    return f"{cell.mean:.0f}" if 100 <= cell.mean < 1000 else number(cell.mean)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
