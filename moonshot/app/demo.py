"""The demo: methods side by side on the small Llama that comes along."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moonshot.files.load import load
from moonshot.layer.objectives import Objective, Reconstruction
from moonshot.models.calibration import windows
from moonshot.models.evaluation import Perplexity, perplexity
from moonshot.pruning.prune import prune
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from moonshot.solvers import ADMM, Magnitude, Solver, SparseGPT, Wanda

DEMO = Path(__file__).parent.parent / "demo"
Method = tuple[str, Solver, Objective | str]  # name, solver, objective
METHODS: tuple[Method, ...] = (
    ("magnitude", Magnitude(), Reconstruction()),
    ("Wanda", Wanda(), Reconstruction()),
    ("SparseGPT", SparseGPT(), Reconstruction()),
    ("SparseGPT, joint", SparseGPT(), DEFAULT_OBJECTIVE),
    ("ADMM", ADMM(), Reconstruction()),
    ("ADMM, joint", ADMM(), DEFAULT_OBJECTIVE),
)


@dataclass(frozen=True)
class Row:
    """One method: held-out perplexity at each pattern."""

    method: str
    perplexities: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """dense: the model before pruning, with context and number of windows."""

    dense: Perplexity
    rows: list[Row]

    def plot(self, path: Path) -> None:
        """A bar chart, as PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        patterns = list(self.rows[0].perplexities)
        figure, axes = pyplot.subplots(1, len(patterns), figsize=(5 * len(patterns), 3.5), squeeze=False)
        for axis, pattern in zip(axes[0], patterns, strict=True):
            names = [row.method for row in self.rows]
            axis.barh(names, [row.perplexities[pattern] for row in self.rows])
            axis.axvline(self.dense.value, color="black", linestyle="--", label="dense")
            axis.set(xscale="log", title=pattern, xlabel=f"perplexity, context {self.dense.context}")
            axis.invert_yaxis()
            axis.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def compare(
    patterns: Sequence[str] = ("2:4", "70%"),
    methods: Sequence[Method] = METHODS,
    *,
    samples: int = 32,
    context: int = 256,
    held_out: int = 64,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda step: None,
    **options: Any,
) -> Comparison:
    """Prune the demo model by every method at every pattern; perplexity on files it never saw.

    samples, context: calibration windows and their tokens; held_out: windows to measure on; options go to `prune`.
    """
    model, tokenizer = load(str(DEMO / "model"))
    model = model.to(torch.float32)
    calibration = windows(tokenizer, (DEMO / "calibration.txt").read_text("utf-8"), samples, context, seed)
    test = windows(tokenizer, (DEMO / "heldout.txt").read_text("utf-8"), held_out, context, None)
    rows = []
    for name, solver, objective in methods:
        values = {}
        for pattern in patterns:
            on_step(f"{name} at {pattern}")
            pruned = copy.deepcopy(model)
            prune(pruned, calibration, pattern, objective=objective, solver=solver, seed=seed, **options)
            values[pattern] = perplexity(pruned, test).value
        rows.append(Row(name, values))
    return Comparison(perplexity(model, test), rows)
