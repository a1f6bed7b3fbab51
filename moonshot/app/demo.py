"""The demo: methods side by side on the small Llama that comes with the package."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.files.load import load
from moonshot.layer.objectives import Objective, Reconstruction
from moonshot.models.calibration import windows
from moonshot.models.evaluation import Perplexity, perplexity
from moonshot.pruning.picture import blank, draw_bars
from moonshot.pruning.prune import prune
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from moonshot.solvers import ADMM, Magnitude, Solver, SparseGPT, Wanda

DEMO = Path(__file__).parent.parent / "demo"
PATTERNS = ("2:4", "80%")
Method = tuple[str, Solver, Objective | str]  # name, solver, objective
METHODS: tuple[Method, ...] = (
    ("magnitude", Magnitude(), Reconstruction()),
    ("Wanda", Wanda(), Reconstruction()),
    ("SparseGPT", SparseGPT(), Reconstruction()),
    ("SparseGPT, joint", SparseGPT(), DEFAULT_OBJECTIVE),
    ("ADMM", ADMM(), Reconstruction()),
    ("ADMM, joint", ADMM(), DEFAULT_OBJECTIVE),
)
IDEAS = {
    "magnitude": "the largest weights stay",
    "Wanda": "large weights with large inputs stay",
    "SparseGPT": "the others make up for each that goes",
    "SparseGPT, joint": "and the training loss counts too",
    "ADMM": "mask and weights are found together",
    "ADMM, joint": "and the training loss too: the default",
}


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
        """A bar for each method and pattern, from the dense model's perplexity to its own; as PNG."""
        dense, patterns = self.dense.value, list(self.rows[0].perplexities)
        figure = blank(7, 1.1 + 0.3 * len(self.rows))
        axes = figure.subplots(1, len(patterns), sharey=True, squeeze=False)[0]
        for axis, pattern in zip(axes, patterns, strict=True):
            values = {row.method: row.perplexities[pattern] for row in self.rows}
            best = [value == min(values.values()) for value in values.values()]
            draw_bars(
                axis,
                values,
                dense,
                numbers=[f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in values.values()],
                colours=["#1f5fa8" if lowest else "#a9c1db" for lowest in best],
                bold=best,
            )
            axis.set_title(
                f"{pattern[:-1]} % zeros" if pattern.endswith("%") else pattern, fontsize=11, weight="bold"
            )
            axis.set_title(f"dense {dense:.2f}", fontsize=9, loc="left")
        figure.supxlabel("held-out perplexity, log scale", fontsize=9)
        figure.savefig(path)


@dataclass(frozen=True)
class Setting:
    """The shipped Llama in float32, calibration data (samples, tokens) and held-out text (windows, tokens)."""

    model: nn.Module
    calibration: Tensor
    held_out: Tensor
    dense: Perplexity

    def __str__(self) -> str:
        config: Any = self.model.config
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        samples, tokens = self.calibration.shape
        return (
            f"The model is a Llama with {millions:.1f} million parameters in {config.num_hidden_layers} blocks, "
            "trained on the source of the Python standard library. Its perplexity on files that it has never seen is "
            f"{self.dense}; the lower, the better.\n"
            f"Each method now sets weights of all its linear layers to zero, on {samples} samples of {tokens} tokens "
            "and without retraining."
        )

    def compare(
        self,
        patterns: Sequence[str] = PATTERNS,
        methods: Sequence[Method] = METHODS,
        *,
        on_step: Callable[[str], None] = lambda step: None,
        **options: Any,
    ) -> Comparison:
        """Prune the model by every method at every pattern; options go to `prune`."""
        rows = []
        for name, solver, objective in methods:
            values = {}
            for pattern in patterns:
                on_step(f"{name}, {pattern}")
                pruned = copy.deepcopy(self.model)
                prune(pruned, self.calibration, pattern, objective=objective, solver=solver, **options)
                values[pattern] = perplexity(pruned, self.held_out).value
            rows.append(Row(name, values))
        return Comparison(self.dense, rows)


def setting(samples: int = 32, context: int = 256, held_out: int = 64, seed: int = 0) -> Setting:
    """What the demo starts from.

    samples, context: calibration windows and their tokens; held_out: windows to measure on; seed: of the samples.
    """
    model, tokenizer = load(str(DEMO / "model"))
    model = model.to(torch.float32)
    calibration = windows(tokenizer, (DEMO / "calibration.txt").read_text("utf-8"), samples, context, seed)
    test = windows(tokenizer, (DEMO / "heldout.txt").read_text("utf-8"), held_out, context, None)
    return Setting(model, calibration, test, perplexity(model, test))


def compare(
    patterns: Sequence[str] = PATTERNS,
    methods: Sequence[Method] = METHODS,
    *,
    samples: int = 32,
    context: int = 256,
    held_out: int = 64,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """`Setting.compare` from scratch."""
    return setting(samples, context, held_out, seed).compare(patterns, methods, seed=seed, **options)
