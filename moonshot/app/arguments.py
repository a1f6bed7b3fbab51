"""What `moonshot prune` was asked for, and what can be said of it before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moonshot.app.launch import processes_here
from moonshot.errors import ArgumentError, meant_path
from moonshot.files import plan as planning
from moonshot.files.draft import check_apart
from moonshot.files.hub import Push
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern, Unstructured, as_pattern
from moonshot.models.adapter import Adapter
from moonshot.models.blocks import find_blocks
from moonshot.models.layers import layers_of
from moonshot.models.precision import as_device
from moonshot.models.roles import heads, routers
from moonshot.models.shrink import check_shrinks
from moonshot.models.targets import select
from moonshot.models.units import column_patterns
from moonshot.pruning import checkpoint
from moonshot.pruning.fingerprint import exact
from moonshot.pruning.layer_patterns import check_fits
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE, Recipe
from moonshot.pruning.refit import Refit
from moonshot.solvers import Solver


@dataclass(frozen=True)
class PruneArguments:
    """Everything that `moonshot prune` was asked for, read from the command line (`moonshot prune --help`)."""

    model: str
    data: str
    save: Path
    pattern: Pattern
    objective: Objective | str
    solver: Solver
    text_column: str | None = None
    held_out: list[str] | None = None
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    factors: int = 16
    dampening_frac: float = 0.01
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    allocate: bool = False
    choices: list[str] | None = None
    columns: float | None = None
    shrink: bool = False
    refit: Refit | None = None
    bound: bool = False
    memory: float | None = None
    checkpoint: Path | None = None
    overwrite: bool = False
    compact: bool = False
    push: Push | None = None
    trust_remote_code: bool = False
    command: str = ""
    unreached: Literal["error", "skip"] = "error"
    unfit: Literal["error", "skip"] = "error"
    adapter: Adapter | None = None
    device: str = "auto"
    precision: Literal["model", "float32"] | None = None
    html: Path | None = None
    config: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False

    def _check(self) -> None:
        """Raises ValueError or TypeError for arguments that nothing can be done with."""
        if self.nsamples < 1:
            raise ArgumentError(f"--nsamples is at least one image or window of text, got {self.nsamples}")
        if self.seqlen is not None and self.seqlen < 2:
            raise ArgumentError(f"--seqlen is 2 tokens or more, got {self.seqlen}")
        self._check_html()
        if self.choices and not self.allocate:
            raise ArgumentError("--choice is what --allocate chooses from: add --allocate")
        self._choices()
        if self.allocate and not isinstance(self.pattern, Unstructured):
            raise ArgumentError(
                f"--allocate shares out a fraction of zeros, such as --sparsity 0.5, not {self.pattern}: the patterns "
                "that layers may have go to --choice"
            )
        if self.columns is not None and (self.allocate or self.targets or self.adapter):
            raise ArgumentError(
                "--columns prunes the layers that read hidden units and heads, alike in every block: leave --allocate, "
                "--targets and --adapter out"
            )
        if self.shrink and self.columns is None:
            raise ArgumentError("--shrink cuts out what --columns has made zero: add --columns 0.25")
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise ArgumentError(f"--memory is GiB that pruning may take, more than 0, got {self.memory:g}")
        if not 0 <= self.seed < 2**63:
            raise ArgumentError(f"--seed is a number from 0 to 2^63 - 1, got {self.seed}")
        needed = 8 if self.allocate or self.objective == "auto" else 2 if self.refit else 1
        if self.nsamples < needed:
            why = "--allocate" if self.allocate else "--objective auto" if needed == 8 else "--refit"
            raise ArgumentError(
                f"{why} sets samples aside and needs at least {needed}, got --nsamples {self.nsamples}"
            )
        Recipe(
            self.objective,
            self.solver,
            factors=self.factors,
            dampening_frac=self.dampening_frac,
            device=self.device,
            precision=self.precision,
        )
        if processes_here() > 1 and self.device.startswith("cuda:"):
            raise ArgumentError("--device: each process takes a GPU of its own, write cuda without a number")
        if self.checkpoint is not None:
            checkpoint.check_name(self.checkpoint)
            check_apart("--save", self.save, "--checkpoint", self.checkpoint)
        if self.overwrite:
            check_apart("--save", self.save, "the model", Path(self.model))

    @property
    def _html_inside(self) -> Path | None:
        """The place of the HTML report in the folder that is saved, if it is to be there."""
        here, folder = self.html and self.html.absolute(), self.save.absolute()
        return here.relative_to(folder) if here and here.is_relative_to(folder) else None

    def _check_html(self) -> None:
        """Raises ArgumentError for a report that cannot be written where it should be."""
        if self.html is None:
            return
        if (
            self.html.suffix.lower() != ".html"
            or self.html.is_dir()
            or self.html.absolute() == self.save.absolute()
        ):
            raise ArgumentError(f"--html is a file whose name ends with .html, got {self.html}")
        if not self._html_inside and not self.html.parent.is_dir():
            raise ArgumentError(
                f"--html {self.html}: there is no folder {self.html.parent}{meant_path(self.html.parent)}"
            )

    def _check_checkpoint(self) -> None:
        """Raises CheckpointError for a folder with something else, or answers that cannot be those of this command."""
        if self.checkpoint is None or (earlier := checkpoint.work_of(self.checkpoint)) is None:
            return
        uniform = not self.allocate and self.columns is None
        objects = {
            "objective": self.objective,
            "solver": self.solver,
            "adapter": self.adapter,
            "refit": self.refit,
        }
        now = {what: exact(value, what) for what, value in objects.items()} | {
            "pattern": str(self.pattern) if uniform else "per layer",
            "factors": self.factors,
            "dampening_frac": self.dampening_frac,
            "seed": self.seed,
            "bound": self.bound,
        }
        checkpoint.refuse_other(self.checkpoint, earlier, json.loads(json.dumps(now)))

    def _check_writable(self) -> None:
        """Raises OSError for a place that nothing can be written to."""
        planning.check_writable(self.save.parent)
        if self.html is not None and not self._html_inside:
            planning.check_writable(self.html.parent)
        if self.checkpoint is not None:
            planning.check_writable(self.checkpoint)

    def _check_layers(self, skeleton: nn.Module) -> dict[str, Pattern]:
        """The layers inside a transformer's blocks that are pruned; which others are is found out when it runs.

        Raises TargetError, PatternError or NotSupportedError where that follows from the layers' names and shapes.
        """
        if self.adapter is not None:
            return {}
        views = dict(layers_of("", skeleton))
        patterns: dict[str, Pattern]
        if self.columns is not None:
            names = set(select(views, None, self.ignore))
            columns = {name: p for name, p in column_patterns(skeleton, self.columns).items() if name in names}
            if self.shrink and not any(pattern.sparsity for pattern in columns.values()):
                raise ArgumentError(
                    f"--columns {self.columns:g} prunes no whole unit that --shrink could cut out"
                )
            if self.shrink:
                check_shrinks(skeleton, columns)
            patterns = dict(columns)
            check_fits({name: views[name] for name in patterns}, patterns)
        else:
            others = [name for name, _ in skeleton.named_modules() if name not in views]  # may be named, too
            names = set(select([*views, *others], self.targets, self.ignore))
            inside = [name for block in find_blocks(skeleton) for name, _ in layers_of(*block)]
            if self.targets is None:
                names -= heads(skeleton) | routers(skeleton)
            patterns = {name: self.pattern for name in inside if name in names}
            if not self.allocate and self.unfit == "error":
                check_fits({name: views[name] for name in patterns}, patterns)
        planning.check_supported(
            self.solver,
            {name: views[name].problem_shape for name in patterns},
            {name: self._choices() or [pattern] for name, pattern in patterns.items()},
            "gradients" in self.terms.needed,
            self.used_device,
        )
        return patterns

    def _choices(self) -> list[Pattern]:
        return [as_pattern(choice) for choice in self.choices or ()]

    @property
    def terms(self) -> Objective:
        """The objective, or one with all terms of those that "auto" tries."""
        return DEFAULT_OBJECTIVE if isinstance(self.objective, str) else self.objective

    @property
    def used_device(self) -> torch.device:
        """Where parts run and are solved."""
        return as_device(self.device) or torch.device("cpu")
