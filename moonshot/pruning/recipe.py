"""How a model is pruned, whatever its pattern: what `prune` and `allocate` have in common."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moonshot.errors import ArgumentError, ArgumentTypeError, check_count
from moonshot.layer.assembly import check_fraction
from moonshot.layer.objectives import Fisher, Objective, Reconstruction, TokenFisher
from moonshot.models.adapter import Adapter
from moonshot.models.batch_sizes import tokens_at_once
from moonshot.models.calibration import Batch, checked_batches
from moonshot.models.chain import ChainAdapter
from moonshot.models.losses import Loss, model_loss
from moonshot.models.precision import Passes, as_device, home, runs_as_it_is
from moonshot.models.sample_targets import with_equal_targets
from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Solver

OnProgress = Callable[[str, str], None]

DEFAULT_OBJECTIVE = 0.6 * Reconstruction() + 0.2 * TokenFisher() + 0.2 * Fisher()


def unheard(what: str, how_far: str) -> None:
    """What listens to no progress."""


@dataclass(frozen=True)
class Recipe:
    """What makes a layer's problem and its answer; `prune` describes each field.

    Raises TypeError or ValueError for what no layer can be pruned by.
    """

    objective: Objective | str = DEFAULT_OBJECTIVE
    solver: Solver = ADMM()  # noqa: RUF009 - frozen
    targets: str | Iterable[str] | None = None
    ignore: str | Iterable[str] = ()
    factors: int = 16
    dampening_frac: float = 0.01
    seed: int = 0
    loss: Loss = model_loss
    unreached: Literal["error", "skip"] = "error"
    unfit: Literal["error", "skip"] = "error"
    scratch: Path | None = None
    adapter: Adapter | None = None
    device: torch.device | str | None = None
    precision: Literal["model", "float32"] | None = None
    on_progress: OnProgress = unheard

    def __post_init__(self) -> None:
        if self.objective != "auto" and not isinstance(self.objective, Objective):
            raise ArgumentTypeError(
                'objective must be "auto" or such as 0.7 * Reconstruction() + 0.3 * Fisher(), got '
                f"{self.objective!r}"
            )
        if isinstance(self.objective, Objective):
            self.objective.check_needs()
        if isinstance(self.solver, type) or not isinstance(self.solver, Solver):
            raise ArgumentTypeError(f"solver must be an instance such as moonshot.ADMM(), got {self.solver!r}")
        for name in ("unreached", "unfit"):
            if getattr(self, name) not in ("error", "skip"):
                raise ArgumentError(f'{name} must be "error" or "skip", got {getattr(self, name)!r}')
        as_device(self.device)
        if self.precision not in ("model", "float32", None):
            raise ArgumentError(f'precision must be "model" or "float32", got {self.precision!r}')
        check_count("factors", self.factors)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ArgumentError(f"seed must be an integer from 0 to 2**64 - 1, got {self.seed!r}")
        if not callable(self.loss):
            raise ArgumentTypeError(f"loss must be a callable (model, batch) -> scalar, got {self.loss!r}")
        if not isinstance(self.scratch, str | Path | None):
            raise ArgumentTypeError(f"scratch must be a folder, got {self.scratch!r}")
        if self.adapter is not None and not isinstance(self.adapter, Adapter):
            raise ArgumentTypeError(
                f"adapter must be an instance of a subclass of moonshot.Adapter, got {self.adapter!r}"
            )
        check_fraction(self.dampening_frac)

    def passes(self, model: nn.Module) -> Passes:
        """How the parts of a model run."""
        device = as_device(self.device)
        precision = self.precision or ("float32" if (device or home(model)).type == "cpu" else "model")
        return Passes(device, widened=precision == "float32" or not runs_as_it_is(model))

    def batches(self, model: nn.Module, calibration: Any) -> tuple[list[Batch], dict[str, str]]:
        """The calibration data as batches where passes run, and why samples are left out, by batch and sample.

        Raises CalibrationError for texts longer than the model can read, and for tokens that it does not know.
        """
        device = as_device(self.device) or home(model)
        in_pieces = self.loss is model_loss and isinstance(self.adapter, ChainAdapter | None)
        batches = checked_batches(model, calibration, device, tokens_at_once(model, in_pieces))
        return with_equal_targets(model, batches, self.loss)
