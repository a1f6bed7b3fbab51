"""`moonshot prune`: a model from a folder or hub name to a pruned folder."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from moonshot import pruning
from moonshot.app.data import pictures, text_windows
from moonshot.app.terminal import one_line, say, visible
from moonshot.errors import ArgumentError
from moonshot.files import plan as planning
from moonshot.files.draft import check_apart, check_free
from moonshot.files.folder import Opened, opened
from moonshot.files.load import Source
from moonshot.files.text import read_text
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern, Unstructured, as_pattern
from moonshot.models.adapter import Adapter
from moonshot.models.blocks import find_blocks
from moonshot.models.calibration import as_batches, tokens_at_once
from moonshot.models.images import ImageBatches
from moonshot.models.layers import layers_of
from moonshot.models.roles import heads, routers
from moonshot.models.shrink import shrink
from moonshot.models.targets import select
from moonshot.models.units import column_patterns
from moonshot.pruning import checkpoint
from moonshot.pruning.auto import CANDIDATES
from moonshot.pruning.checkpoint import CheckpointError
from moonshot.pruning.fingerprint import exact
from moonshot.pruning.layer_patterns import check_fits
from moonshot.pruning.lock import LockedError
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE, Recipe
from moonshot.pruning.refit import Refit
from moonshot.pruning.report import Report
from moonshot.solvers import Solver

Advance = Callable[[str, int], None]
_GAINS = {
    "zeros": "its zeros are stored as they are: it is as large and as fast as the dense model",
    "compact": "its zeros take a bit each: moonshot.load_compact reads it, moonshot unpack makes it an ordinary folder",
    "shrink": "what was zero as a whole is cut out: it takes less space and time wherever the dense model runs",
}


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
    columns: float | None = None
    shrink: bool = False
    refit: bool = False
    bound: bool = False
    memory: float | None = None
    checkpoint: Path | None = None
    overwrite: bool = False
    compact: bool = False
    trust_remote_code: bool = False
    command: str = ""
    unreached: Literal["error", "skip"] = "error"
    unfit: Literal["error", "skip"] = "error"
    adapter: Adapter | None = None

    def run(self, console: Console) -> None:
        """Load, plan, prune, save, and say so. Raises ValueError, TypeError or OSError with what to do about it.

        What can be known from the arguments, the data and the model's shapes is looked at before weights are copied.
        """
        self._check()
        if self._is_done():
            self._remove_checkpoint()
            say(console, f"done already: {self.save}")
            return
        check_free(self.save, self.overwrite)
        self._check_checkpoint()
        source = Source(self.model, self.trust_remote_code)
        source.check_files()
        skeleton = source.skeleton()
        self._check_layers(skeleton)
        calibration, broken = self._calibration(source, skeleton)
        if broken:
            print_skipped(console, broken)
        with self._saying_what_there_is():
            self._prune(source, calibration, broken, console)
            self._remove_checkpoint()
        say(console, f"saved: {self.save}")
        say(console, _GAINS["shrink" if self.shrink else "compact" if self.compact else "zeros"])

    def _prune(self, source: Source, calibration: Any, broken: list[str] | None, console: Console) -> None:
        """From the opened model to the saved one."""
        with opened(source, self.save, overwrite=self.overwrite) as work:
            scratch = self._planned(work, calibration, console)
            report = self._pruned(work, calibration, scratch, console)
            report.recipe.update(model=self.model, data=self.data, command=self.command)
            if broken is not None:
                report.recipe["broken_images"] = len(broken)
            say(console, str(report))
            if self.shrink:
                work.replace(shrink(work.model))
            work.save(report, self.compact)

    def _check(self) -> None:
        """Raises ValueError or TypeError for arguments that nothing can be done with."""
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
        Recipe(self.objective, self.solver, factors=self.factors, dampening_frac=self.dampening_frac)
        if self.checkpoint is not None:
            check_apart("--save", self.save, "--checkpoint", self.checkpoint)
        if self.overwrite:
            check_apart("--save", self.save, "the model", Path(self.model))

    def _check_checkpoint(self) -> None:
        """Raises CheckpointError for a folder with something else, or answers that cannot be those of this command."""
        if self.checkpoint is None or (earlier := checkpoint.work_of(self.checkpoint)) is None:
            return
        uniform = not self.allocate and self.columns is None
        objects = {
            "objective": self.objective,
            "solver": self.solver,
            "adapter": self.adapter,
            "refit": Refit() if self.refit else None,
        }
        now = {what: exact(value, what) for what, value in objects.items()} | {
            "pattern": str(self.pattern) if uniform else "per layer",
            "factors": self.factors,
            "dampening_frac": self.dampening_frac,
            "seed": self.seed,
            "bound": self.bound,
        }
        checkpoint.refuse_other(self.checkpoint, earlier, json.loads(json.dumps(now)))

    def _check_layers(self, skeleton: nn.Module) -> None:
        """Raises TargetError, PatternError or NotSupportedError where that follows from the layers' names and shapes.

        Which layers outside a transformer's blocks are pruned is found out when it runs.
        """
        if self.adapter is not None:
            return
        views = dict(layers_of("", skeleton))
        patterns: dict[str, Pattern]
        if self.columns is not None:
            patterns = dict(column_patterns(skeleton, self.columns))
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
            "gradients" in self._terms().needed,
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )

    def _choices(self) -> list[Pattern]:
        return [as_pattern(choice) for choice in self.choices or ()]

    def _terms(self) -> Objective:
        """The objective, or one with all terms of those that "auto" tries."""
        return DEFAULT_OBJECTIVE if isinstance(self.objective, str) else self.objective

    def _calibration(self, source: Source, skeleton: nn.Module) -> tuple[Any, list[str] | None]:
        """The calibration data, and the names of broken images; None for text."""
        if not source.is_image_classifier:
            text = read_text(self.data)
            return text_windows(source, text, self.nsamples, self.seqlen, self.seed), None
        found = pictures(self.data, self.seqlen)
        batches = ImageBatches(skeleton, source.processor, found, self.nsamples, self.seed)
        return list(batches), batches.skipped

    def _is_done(self) -> bool:
        """Whether this command has saved its model already, and was ended before it said so.

        Only with a checkpoint is the same command meant to go on; with --overwrite only where that is still there.
        """
        if self.checkpoint is None or (self.overwrite and not self.checkpoint.exists()):
            return False
        return self._is_saved() and not self._is_outdated()

    def _is_outdated(self) -> bool:
        """Whether a file of the model or the data has changed since --save was written."""
        saved = (self.save / "report.json").stat().st_mtime
        paths = [Path(self.model), Path(self.data)]
        files = [path for folder in paths for path in (folder, *folder.rglob("*")) if path.is_file()]
        return any(path.stat().st_ctime > saved for path in files)

    def _is_saved(self) -> bool:
        """Whether --save has what this command gives."""
        try:
            recipe = json.loads((self.save / "recipe.json").read_text(encoding="utf-8"))
            return bool(self.command) and recipe["command"] == self.command
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _remove_checkpoint(self) -> None:
        if self.checkpoint is not None:
            checkpoint.remove(self.checkpoint)

    @contextmanager
    def _saying_what_there_is(self) -> Iterator[None]:
        """Whatever ends the run says what there is of it."""
        try:
            yield
        except BaseException as error:
            answers = 0 if self.checkpoint is None else len(list(self.checkpoint.glob("*.safetensors")))
            if self._is_saved():
                error.add_note(f"({self.save} is saved)")
            elif answers and not isinstance(error, CheckpointError | LockedError):  # which are about the folder
                error.add_note(
                    f"(nothing was saved, but {self.checkpoint} has the answers of {answers} layers: the same command "
                    "continues from there)"
                )
            raise

    def _planned(self, source: Opened, calibration: Any, console: Console) -> Path | None:
        """Say what pruning will take; the folder to offload to where it does not fit into memory, None where it does.

        Raises ResourceError where there is not enough memory or disk.
        """
        auto = self.objective == "auto"
        plan = planning.plan(
            source.model,
            as_batches(calibration, tokens_at_once(source.model)),
            objective=self._terms(),
            solver=self.solver,
            pattern=self.pattern,
            targets=self.targets,
            ignore=self.ignore,
            factors=self.factors,
            trials=len(CANDIDATES) if auto else 0,
            refit=Refit() if self.refit else None,
        )
        if plan is None:
            return None
        say(console, str(plan))
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
            unfit=self.unfit,
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
                    objective=self._terms(),
                    patterns=self.choices,
                    on_step=advance,
                    **recipe,
                )
        with _progress(console, source.release) as advance:
            report = pruning.prune(
                source.model,
                calibration,
                self._patterns(source.model) if allocation is None else allocation,
                objective=self.objective,
                refit=self.refit,
                bound=self.bound,
                checkpoint=self.checkpoint,
                on_layer=lambda layer, total: advance(layer.name, total),
                **recipe,
            )
        if allocation is not None:
            report.recipe["budget"] = allocation.budget
            report.trials = [*allocation.trials, *report.trials]
        report.recipe["pattern"] = str(self.pattern)
        return report

    def _patterns(self, model: nn.Module) -> Pattern | Mapping[str, Pattern]:
        return self.pattern if self.columns is None else column_patterns(model, self.columns)


@contextmanager
def _progress(console: Console, release: Callable[[], None]) -> Iterator[Advance]:
    """A bar on a terminal, a line for each step in a log. release: called after every step."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("gradients", total=None)

        def advance(what: str, total: int) -> None:
            release()
            what = visible(what)
            progress.update(task, description=what, total=total, advance=1)
            if not console.is_terminal:
                say(console, f"{progress.tasks[0].completed:.0f} of {total}: {what}")

        yield advance


def print_skipped(console: Console, skipped: list[str]) -> None:
    """Name the images that could not be read, if there are any."""
    if skipped:
        names = ", ".join(map(one_line, skipped))
        say(console, f"{len(skipped)} broken images skipped: {names}")
