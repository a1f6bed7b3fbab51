"""`moonshot prune`: a model from a folder or hub name to a pruned folder."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from moonshot import pruning
from moonshot.app.config import saved_text
from moonshot.app.data import pictures, text_windows
from moonshot.app.progress import progress
from moonshot.app.terminal import one_line, say
from moonshot.errors import ArgumentError
from moonshot.files import plan as planning
from moonshot.files.draft import check_apart, check_free
from moonshot.files.folder import Opened, opened
from moonshot.files.hub import Push
from moonshot.files.load import Source
from moonshot.files.plan import Plan
from moonshot.files.text import read_text
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern, Unstructured, as_pattern
from moonshot.models.adapter import Adapter
from moonshot.models.blocks import find_blocks
from moonshot.models.calibration import as_batches, tokens_at_once
from moonshot.models.evaluation import accuracy, perplexity
from moonshot.models.images import ImageBatches
from moonshot.models.layers import layers_of
from moonshot.models.roles import heads, routers
from moonshot.models.shrink import shrink
from moonshot.models.targets import listed, select
from moonshot.models.units import column_patterns
from moonshot.pruning import checkpoint
from moonshot.pruning.auto import CANDIDATES
from moonshot.pruning.checkpoint import CheckpointError
from moonshot.pruning.fingerprint import exact
from moonshot.pruning.html import save_html
from moonshot.pruning.layer_patterns import check_fits
from moonshot.pruning.lock import LockedError
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE, Recipe
from moonshot.pruning.refit import Refit
from moonshot.pruning.report import Report
from moonshot.solvers import Solver

SETTINGS = "run.yaml"  # in a saved folder: the options that repeat the run
# Options that do not change what a run gives, and the one that is for each user to allow.
_WHERE = {
    *("save", "overwrite", "push_to_hub", "private", "html", "dry_run", "quiet", "checkpoint", "memory"),
    "trust_remote_code",
}
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
    push: Push | None = None
    trust_remote_code: bool = False
    command: str = ""
    unreached: Literal["error", "skip"] = "error"
    unfit: Literal["error", "skip"] = "error"
    adapter: Adapter | None = None
    html: Path | None = None
    config: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False

    def run(self, console: Console) -> None:
        """Load, plan, prune, save, and say so; with dry_run, no more than plan.

        Raises ValueError, TypeError or OSError with what to do about it.

        What can be known from the arguments, the data and the model's shapes is looked at before weights are copied.
        """
        self._check()
        if self._is_done():
            if not self.dry_run:
                self._remove_checkpoint()
            say(console, f"done already: {self.save}")
            if self.push is not None and not self.dry_run:  # what is there of it is from this command
                self._send(replace(self.push, overwrite=True), console)
            return
        check_free(self.save, self.overwrite)
        self._check_checkpoint()
        if self.push is not None:
            self.push.check(self.model)
        source = Source(self.model, self.trust_remote_code)
        source.check_files()
        skeleton = source.skeleton()
        layers = self._check_layers(skeleton)
        calibration, broken = self._calibration(source, skeleton)
        if broken:
            print_skipped(console, broken)
        if self.dry_run:
            self._say_what_it_would_do(source, skeleton, layers, calibration, console)
            return
        with self._saying_what_there_is():
            self._prune(source, calibration, broken, console)
            self._remove_checkpoint()
        say(console, f"saved: {self.save}")
        if self.html is not None:
            say(console, f"report: {self.html}")
        say(console, _GAINS["shrink" if self.shrink else "compact" if self.compact else "zeros"])
        if self.push is not None:
            self._send(self.push, console)

    def _send(self, push: Push, console: Console) -> None:
        """Push what is saved to the hub."""
        address, others = push.send(self.save)
        say(console, f"pushed: {address}")
        if others:
            say(console, f"not pushed, since nobody knows what it is: {', '.join(map(one_line, others))}")

    def _prune(self, source: Source, calibration: Any, broken: list[str] | None, console: Console) -> None:
        """From the opened model to the saved one."""
        with opened(source, self.save, overwrite=self.overwrite) as work:
            plan = self._plan(work.model, calibration, _device(work.model))
            scratch = self._scratch(plan, work, console)
            before = self._measured(work.model, calibration)
            report = self._pruned(work, calibration, scratch, console)
            report.recipe.update(model=self.model, data=self.data, command=self.command)
            if broken is not None:
                report.recipe["broken_images"] = len(broken)
            report.before, report.after = before, self._measured(work.model, calibration)
            say(console, str(report))
            if self.shrink:
                small = shrink(work.model)
                report.recipe["shrink"] = f"{_parameters(small)} of {_parameters(work.model)} parameters"
                work.replace(small)
            if self._html_inside:
                save_html(report, work.draft / self._html_inside)
            (work.draft / SETTINGS).write_text(self._settings_text(report), encoding="utf-8")
            work.save(report, self.compact)
            if self.html is not None and not self._html_inside:
                save_html(report, self.html)

    def _settings_text(self, report: Report) -> str:
        """A file for --config that repeats the run, wherever it is saved."""
        return saved_text(self.settings, report.versions, without=_WHERE)

    def _measured(self, model: nn.Module, calibration: Any) -> str:
        """How good the model is on the calibration samples, for the HTML report."""
        if self.html is None:
            return ""
        if not isinstance(calibration, Tensor):
            return f"accuracy {accuracy(model, calibration)}, on the calibration images"
        batch_size = max(tokens_at_once(model) // calibration.shape[1], 1)
        return f"perplexity {perplexity(model, calibration, batch_size)}, on the calibration text"

    def _check(self) -> None:
        """Raises ValueError or TypeError for arguments that nothing can be done with."""
        if self.nsamples < 1:
            raise ArgumentError(f"--nsamples is at least one image or window of text, got {self.nsamples}")
        needed = 8 if self.allocate or self.objective == "auto" else 2 if self.refit else 1
        if self.nsamples < needed:
            why = "--allocate" if self.allocate else "--objective auto" if needed == 8 else "--refit"
            raise ArgumentError(
                f"{why} sets samples aside and needs at least {needed}, got --nsamples {self.nsamples}"
            )
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
        Recipe(self.objective, self.solver, factors=self.factors, dampening_frac=self.dampening_frac)
        if self.checkpoint is not None:
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
        if self.html.suffix.lower() not in (".html", ".htm") or self.html.is_dir():
            raise ArgumentError(f"--html is a file whose name ends with .html, got {self.html}")
        if not self._html_inside and not self.html.parent.is_dir():
            raise ArgumentError(f"--html {self.html}: there is no folder {self.html.parent}")

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

    def _check_layers(self, skeleton: nn.Module) -> dict[str, Pattern]:
        """The layers inside a transformer's blocks that are pruned; which others are is found out when it runs.

        Raises TargetError, PatternError or NotSupportedError where that follows from the layers' names and shapes.
        """
        if self.adapter is not None:
            return {}
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
            _default_device(),
        )
        return patterns

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
        paths = [Path(self.model), Path(self.data), *([self.config] if self.config else [])]
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

    def _plan(self, model: nn.Module, calibration: Any, device: torch.device) -> Plan | None:
        """What pruning will take, where that can be said."""
        auto = self.objective == "auto"
        return planning.plan(
            model,
            as_batches(calibration, tokens_at_once(model)),
            objective=self._terms(),
            solver=self.solver,
            pattern=self.pattern,
            targets=self.targets,
            ignore=self.ignore,
            factors=self.factors,
            trials=len(CANDIDATES) if auto else 0,
            refit=Refit() if self.refit else None,
            device=device,
        )

    def _scratch(self, plan: Plan | None, source: Opened, console: Console) -> Path | None:
        """Say what pruning will take; the folder to offload to where it does not fit into memory, None where it does.

        Raises ResourceError where there is not enough memory or disk.
        """
        if plan is None:
            return None
        say(console, str(plan))
        on_disk = plan.needs_offload(planning.free_memory(_device(source.model), self.memory))
        needed = {source.draft: source.unwritten + plan.offloaded * on_disk}
        if self.checkpoint is not None:
            weights = sum(parameter.nbytes for parameter in source.model.parameters())
            needed[self.checkpoint] = weights * (1 + self.refit)
        planning.check_disk(needed)
        return source.draft if on_disk else None

    def _say_what_it_would_do(
        self,
        source: Source,
        skeleton: nn.Module,
        layers: Mapping[str, Pattern],
        calibration: Any,
        console: Console,
    ) -> None:
        """The plan, from shapes alone. Raises ResourceError where there is not enough memory or disk."""
        if layers:
            say(console, f"{len(layers)} layers in blocks would be pruned to {self.pattern}: {listed(layers)}")
        if not layers or source.is_image_classifier:
            say(console, "which layers outside of blocks would be pruned is found out when it runs")
        plan = self._plan(skeleton, calibration, _default_device())
        needed = sum((source.folder / name).stat().st_size for name in source.check_files())
        if plan is None:
            say(console, "what it will take can only be said of a language model")
        else:
            say(console, str(plan))
            on_disk = plan.needs_offload(planning.free_memory(_default_device(), self.memory))
            needed += plan.offloaded * on_disk
        planning.check_disk({self.save.parent: needed})
        say(console, f"it would be saved to {self.save}; nothing was done: leave out --dry-run to prune")

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
            with progress(console, source.release) as steps:
                allocation = pruning.allocate(
                    source.model,
                    calibration,
                    self.pattern,  # type: ignore[arg-type]
                    objective=self._terms(),
                    patterns=self.choices,
                    on_step=steps.done,
                    on_progress=steps.doing,
                    **recipe,
                )
        with progress(console, source.release) as steps:
            report = pruning.prune(
                source.model,
                calibration,
                self._patterns(source.model) if allocation is None else allocation,
                objective=self.objective,
                refit=self.refit,
                bound=self.bound,
                checkpoint=self.checkpoint,
                on_layer=lambda layer, total: steps.done(layer.name, total),
                on_progress=steps.doing,
                **recipe,
            )
        if allocation is not None:
            report.recipe["budget"] = allocation.budget
            report.trials = [*allocation.trials, *report.trials]
        report.recipe["pattern"] = str(self.pattern)
        return report

    def _patterns(self, model: nn.Module) -> Pattern | Mapping[str, Pattern]:
        return self.pattern if self.columns is None else column_patterns(model, self.columns)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def print_skipped(console: Console, skipped: list[str]) -> None:
    """Name the images that could not be read, if there are any."""
    if skipped:
        names = ", ".join(map(one_line, skipped))
        say(console, f"{len(skipped)} broken images skipped: {names}")
