"""The demo: methods side by side on the small Llama that comes with the package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.files.load import load
from moonshot.layer.objectives import Reconstruction
from moonshot.models.calibration import windows
from moonshot.models.evaluation import Perplexity, perplexity
from moonshot.pruning.compare import Method, compare_methods
from moonshot.pruning.comparison import Comparison
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from moonshot.solvers import ADMM, Magnitude, SparseGPT, Wanda

DEMO = Path(__file__).parent.parent / "demo"
PATTERNS = ("2:4", "80%")
METHODS: dict[str, Method] = {
    "magnitude": (Magnitude(), Reconstruction()),
    "Wanda": (Wanda(), Reconstruction()),
    "SparseGPT": (SparseGPT(), Reconstruction()),
    "SparseGPT, joint": (SparseGPT(), DEFAULT_OBJECTIVE),
    "ADMM": (ADMM(), Reconstruction()),
    "ADMM, joint": (ADMM(), DEFAULT_OBJECTIVE),
}
IDEAS = {
    "magnitude": "the largest weights stay",
    "Wanda": "large weights with large inputs stay",
    "SparseGPT": "the others make up for each that goes",
    "SparseGPT, joint": "and the training loss counts too",
    "ADMM": "mask and weights are found together",
    "ADMM, joint": "and the training loss too: the default",
}


@dataclass(frozen=True)
class Setting:
    """The shipped Llama in float32, what its calibration data is drawn from, and held-out text (windows, tokens).

    samples, context: calibration windows and their tokens.
    """

    model: nn.Module
    tokenizer: Any
    samples: int
    context: int
    held_out: Tensor
    dense: Perplexity

    def __str__(self) -> str:
        config: Any = self.model.config
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        return (
            f"The model is a Llama with {millions:.1f} million parameters in {config.num_hidden_layers} blocks, "
            "trained on the source of the Python standard library. Its perplexity on files that it has never seen is "
            f"{self.dense}; the lower, the better.\n"
            f"Each method now sets weights of all its linear layers to zero, on {self.samples} samples of "
            f"{self.context} tokens and without retraining."
        )

    def draw(self, seed: int) -> Tensor:
        """Calibration data (samples, context)."""
        text = (DEMO / "calibration.txt").read_text("utf-8")
        return windows(self.tokenizer, text, self.samples, self.context, seed)

    def compare(
        self,
        patterns: Sequence[str] = PATTERNS,
        methods: Mapping[str, Method] = METHODS,
        seeds: int | Sequence[int] = 1,
        **options: Any,
    ) -> Comparison:
        """The model pruned by every method at every pattern; options as in `moonshot.compare`."""
        held_out = self.held_out
        return compare_methods(
            self.model,
            self.draw,
            lambda model: perplexity(model, held_out).value,
            patterns=patterns,
            methods=methods,
            seeds=seeds,
            metric="held-out perplexity",
            **options,
        )


def setting(samples: int = 32, context: int = 256, held_out: int = 64) -> Setting:
    """What the demo starts from. held_out: windows to measure on."""
    model, tokenizer = load(str(DEMO / "model"))
    model = model.to(torch.float32)
    test = windows(tokenizer, (DEMO / "heldout.txt").read_text("utf-8"), held_out, context, None)
    return Setting(model, tokenizer, samples, context, test, perplexity(model, test))


def compare(
    patterns: Sequence[str] = PATTERNS,
    methods: Mapping[str, Method] = METHODS,
    *,
    samples: int = 32,
    context: int = 256,
    held_out: int = 64,
    seeds: int | Sequence[int] = 1,
    **options: Any,
) -> Comparison:
    """`Setting.compare` from scratch."""
    return setting(samples, context, held_out).compare(patterns, methods, seeds, **options)
