"""`moonshot prune`: a model from a folder or hub name to a pruned folder."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moonshot import pruning
from moonshot.app.data import pictures, text_windows
from moonshot.files import plan as planning
from moonshot.files.folder import Opened, opened
from moonshot.files.load import is_image_classifier
from moonshot.files.text import read_text
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern
from moonshot.models.adapter import Adapter
from moonshot.models.calibration import as_batches, tokens_at_once
from moonshot.models.images import ImageBatches
from moonshot.pruning.auto import CANDIDATES
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from moonshot.pruning.refit import Refit
from moonshot.pruning.report import Report
from moonshot.solvers import Solver

Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class PruneCommand:
    """Everything that `moonshot prune` was asked for, read from the command line (`moonshot prune --help`)."""

    model: str
    data: str
    save: Path
    pattern: Pattern
    objective: Objective | str
    solver: Solver
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    factors: int = 16
    dampening_frac: float = 0.01
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    allocate: bool = False
    choices: list[str] | None = None
    refit: bool = False
    bound: bool = False
    memory: float | None = None
    checkpoint: Path | None = None
    unreached: Literal["error", "skip"] = "error"
    adapter: Adapter | None = None

    def run(self, console: Console) -> None:
        """Load, plan, prune, save, and say so. Raises ValueError, TypeError or OSError with what to do about it."""
        if self.choices and not self.allocate:
            raise ValueError("--choice is what --allocate chooses from: add --allocate")
        if self.save.exists():
            raise FileExistsError(f"{self.save} exists: choose another folder, or remove it first")
        images = is_image_classifier(self.model)
        found: Any = pictures(self.data, self.seqlen) if images else read_text(self.data)
        with opened(self.model, self.save) as source:
            calibration, broken = self._calibration(source, found, images)
            if broken:
                print_skipped(console, broken)
            scratch = self._planned(source, calibration, console)
            report = self._pruned(source, calibration, scratch, console)
            report.recipe.update(model=self.model, data=self.data)
            if broken is not None:
                report.recipe["broken_images"] = len(broken)
            console.print(str(report), highlight=False, soft_wrap=True)
            source.save(report)
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint)
        console.print(f"saved: {self.save}")

    def _calibration(self, source: Opened, found: Any, images: bool) -> tuple[Any, list[str] | None]:
        """The calibration data, and the names of broken images; None for text."""
        if not images:
            return text_windows(source.processor, found, self.nsamples, self.seqlen, self.seed), None
        batches = ImageBatches(source.model, source.processor, found, self.nsamples, self.seed)
        return list(batches), batches.skipped

    def _planned(self, source: Opened, calibration: Any, console: Console) -> Path | None:
        """Say what pruning will take; the folder to offload to where it does not fit into memory, None where it does.

        Raises ResourceError where there is not enough memory or disk.
        """
        auto = self.objective == "auto"
        plan = planning.plan(
            source.model,
            as_batches(calibration, tokens_at_once(source.model)),
            objective=DEFAULT_OBJECTIVE if isinstance(self.objective, str) else self.objective,
            solver=self.solver,
            targets=self.targets,
            ignore=self.ignore,
            factors=self.factors,
            trials=len(CANDIDATES) if auto else 0,
            refit=Refit() if self.refit else None,
        )
        if plan is None:
            return None
        console.print(str(plan), highlight=False, soft_wrap=True)
        device = next(source.model.parameters()).device
        on_disk = plan.needs_offload(planning.free_memory(device, self.memory))
        needed = {source.draft: source.unwritten + plan.offloaded * on_disk}
        if self.checkpoint is not None:
            weights = sum(parameter.nbytes for parameter in source.model.parameters())
            needed[self.checkpoint] = weights * (1 + self.refit)
        planning.check_disk(needed)
        return source.draft if on_disk else None

    def _pruned(self, source: Opened, calibration: Any, scratch: Path | None, console: Console) -> Report:
        """Prune the opened model, its zeros allocated first if that was asked for."""
        recipe: dict[str, Any] = dict(
            solver=self.solver,
            targets=self.targets,
            ignore=self.ignore,
            factors=self.factors,
            dampening_frac=self.dampening_frac,
            seed=self.seed,
            unreached=self.unreached,
            scratch=scratch,
            adapter=self.adapter,
        )
        allocation = None
        if self.allocate:
            with _progress(console, source.release) as advance:
                allocation = pruning.allocate(
                    source.model,
                    calibration,
                    self.pattern,  # type: ignore[arg-type]
                    objective=DEFAULT_OBJECTIVE if isinstance(self.objective, str) else self.objective,
                    patterns=self.choices,
                    on_step=advance,
                    **recipe,
                )
        with _progress(console, source.release) as advance:
            report = pruning.prune(
                source.model,
                calibration,
                self.pattern if allocation is None else allocation,
                objective=self.objective,
                refit=self.refit,
                bound=self.bound,
                checkpoint=self.checkpoint,
                on_layer=lambda layer, total: advance(layer.name, total),
                **recipe,
            )
        if allocation is not None:
            report.recipe.update(pattern=str(self.pattern), budget=allocation.budget)
            report.trials = [*allocation.trials, *report.trials]
        return report


@contextmanager
def _progress(console: Console, release: Callable[[], None]) -> Iterator[Advance]:
    """A bar on a terminal, a line for each step in a log. release: called after every step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("gradients", total=None)

        def advance(what: str, total: int) -> None:
            release()
            progress.update(task, description=what, total=total, advance=1)
            if not console.is_terminal:
                console.print(f"{progress.tasks[0].completed:.0f} of {total}: {what}", highlight=False)

        yield advance


def print_skipped(console: Console, skipped: list[str]) -> None:
    """Name the images that could not be read, if there are any."""
    if skipped:
        names = ", ".join(skipped)
        console.print(f"{len(skipped)} broken images skipped: {names}", highlight=False, soft_wrap=True)
