"""`moonshot prune`: a model from a folder or hub name to a pruned folder."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from moonshot import pruning
from moonshot.app.arguments import PruneArguments
from moonshot.app.config import saved_text
from moonshot.app.data import calibration_windows, pictures
from moonshot.app.launch import console_of, launched, processes_here
from moonshot.app.measure import HeldOut
from moonshot.app.progress import progress
from moonshot.app.terminal import one_line, say
from moonshot.errors import MoonshotError
from moonshot.files import plan as planning
from moonshot.files.draft import check_free
from moonshot.files.folder import Opened, opened
from moonshot.files.hub import Push
from moonshot.files.load import Source
from moonshot.files.plan import Plan
from moonshot.files.protocols import PROTOCOLS
from moonshot.layer.patterns import Pattern
from moonshot.models.calibration import as_batches, tokens_at_once
from moonshot.models.evaluation import Accuracy, Perplexity, accuracy, perplexity
from moonshot.models.images import ImageBatches
from moonshot.models.ranks import Ranks
from moonshot.models.shrink import shrink
from moonshot.models.targets import listed
from moonshot.models.units import column_patterns
from moonshot.pruning import checkpoint
from moonshot.pruning.auto import CANDIDATES
from moonshot.pruning.checkpoint import CheckpointError
from moonshot.pruning.fingerprint import digest
from moonshot.pruning.html import save_html
from moonshot.pruning.lock import LockedError
from moonshot.pruning.refit import Refit
from moonshot.pruning.report import Evaluation, Report

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
class PruneCommand(PruneArguments):
    """`moonshot prune`, from its arguments to a saved folder."""

    def run(self, console: Console) -> None:
        """Load, plan, prune, save, and say so; with dry_run, no more than plan.

        Raises ValueError, TypeError or OSError with what to do about it.

        What can be known from the arguments, the data and the model's shapes is looked at before weights are copied.
        Under torchrun the processes share the work, of which the first one writes and prints.
        """
        with launched() as ranks:
            self._run(ranks, console_of(ranks, console))

    def _run(self, ranks: Ranks, console: Console) -> None:
        self._check()
        self._read_from  # noqa: B018 - before anything is read
        if ranks.broadcast(ranks.is_first and self._is_done()):
            if ranks.is_first and not self.dry_run:
                self._remove_checkpoint()
            say(console, f"done already: {self.save}")
            if self.push is not None and ranks.is_first and not self.dry_run:
                # what is on the hub already is from this command
                self._send(replace(self.push, overwrite=True), console)
            return
        if ranks.is_first:
            check_free(self.save, self.overwrite)
            self._check_checkpoint()
            if self.push is not None:
                self.push.check(self.model)
        source = Source(self.model, self.trust_remote_code)
        source.check_files()
        skeleton = source.skeleton()
        layers = self._check_layers(skeleton)
        calibration, skipped = self._calibration(source, skeleton)
        print_skipped(console, skipped, source.is_image_classifier)
        held_out = self._held_out(source, console)
        if self.dry_run:
            self._say_what_it_would_do(source, skeleton, layers, calibration, console)
            return
        with self._saying_what_there_is():
            self._prune(source, calibration, held_out, skipped, ranks, console)
            if ranks.is_first:
                self._remove_checkpoint()
        say(console, f"saved: {self.save}")
        if self.html is not None:
            say(console, f"report: {self.html}")
        say(console, _GAINS["shrink" if self.shrink else "compact" if self.compact else "zeros"])
        if self.push is not None and ranks.is_first:
            self._send(self.push, console)

    def _send(self, push: Push, console: Console) -> None:
        """Push what is saved to the hub."""
        address, others = push.send(self.save)
        say(console, f"pushed: {address}")
        if others:
            say(console, f"not pushed, since nobody knows what it is: {', '.join(map(one_line, others))}")

    def _prune(
        self,
        source: Source,
        calibration: Any,
        held_out: list[HeldOut],
        skipped: list[str],
        ranks: Ranks,
        console: Console,
    ) -> None:
        """From the opened model to the saved one. Ranks but the first have copies beside it that are not saved."""
        place = self.save if ranks.is_first else self.save.with_name(f".{self.save.name}.rank{ranks.index}")
        with opened(source, place, overwrite=self.overwrite, on_gpu=self._fits_on_gpu(source)) as work:
            plan = self._plan(work.model, calibration)
            scratch = self._scratch(plan, work, ranks, console)
            if scratch is not None and held_out:
                say(console, "the model does not fit into memory: measure it afterwards, by moonshot eval")
                held_out = []
            before = self._measured(work.model, calibration, held_out) if ranks.is_first else {}
            for data, figure in before.items():
                say(console, f"{data}: {figure.name} {figure} dense")
            work.release()
            report = self._pruned(work, calibration, scratch, console)
            if not ranks.is_first:
                return
            report.recipe.update(
                model=self.model, data=self.data, command=self.command, read_from=self._read_from
            )
            if source.is_image_classifier:
                report.recipe["broken_images"] = len(skipped)
            after = self._measured(work.model, calibration, held_out)
            report.before, report.after = _listed(before), _listed(after)
            if held_out:
                report.evaluations = [
                    Evaluation(data, before[data].name, before[data], after[data]) for data in after
                ]
            say(console, str(report))
            if self.shrink:
                small = shrink(work.model)
                report.recipe["shrink"] = f"{_parameters(small)} of {_parameters(work.model)} parameters"
                work.replace(small)
            if self._html_inside:
                (work.draft / self._html_inside).parent.mkdir(parents=True, exist_ok=True)
                save_html(report, work.draft / self._html_inside)
            (work.draft / SETTINGS).write_text(self._settings_text(report), encoding="utf-8")
            work.save(report, self.compact)
            if self.html is not None and not self._html_inside:
                save_html(report, self.html)

    def _settings_text(self, report: Report) -> str:
        """A file for --config that repeats the run, wherever it is saved."""
        return saved_text(self.settings, report.versions, without=_WHERE)

    def _measured(
        self, model: nn.Module, calibration: Any, held_out: list[HeldOut]
    ) -> dict[str, Perplexity | Accuracy]:
        """How good the model is: on held-out data, or on the calibration samples where an HTML report is to say it."""
        if held_out or self.html is None:
            return {each.title: each.measure(model) for each in held_out}
        if isinstance(calibration, Tensor):
            return {"the calibration text": perplexity(model, calibration)}
        return {"the calibration images": accuracy(model, calibration)}

    def _calibration(self, source: Source, skeleton: nn.Module) -> tuple[Any, list[str]]:
        """The calibration data, and what of it is left out: images that are broken, files that are no text."""
        if not source.is_image_classifier:
            found = calibration_windows(
                source, self.data, self.nsamples, self.seqlen, self.seed, self.text_column
            )
            return found.ids, found.skipped
        images = pictures(self.data, self.seqlen, self.text_column)
        batches = ImageBatches(skeleton, source.processor, images, self.nsamples, self.seed)
        return list(batches), batches.skipped

    def _held_out(self, source: Source, console: Console) -> list[HeldOut]:
        """What to measure before and after: the test part of a data set of the field unless something is named."""
        names = self.held_out
        if names is None and self.data in PROTOCOLS:
            names = [self.data]
        elif names is None and not source.is_image_classifier:
            say(console, "perplexity can be measured with --eval wikitext2, c4 or a file, before and after")
        try:
            return [
                HeldOut(source, name, None, self.seqlen, self.text_column)
                for name in names or ()
                if name != "none"
            ]
        except MoonshotError as error:
            error.add_note("(--eval none prunes without measuring)")
            raise

    def _is_done(self) -> bool:
        """Whether this command has saved its model already, and was ended before it said so.

        Only with a checkpoint is the same command meant to go on; with --overwrite only where that is still there.
        """
        if self.checkpoint is None or (self.overwrite and not self.checkpoint.exists()):
            return False
        return self._is_saved()

    @cached_property
    def _read_from(self) -> str:
        """A digest of which local files the model, all data and --config were at the start, each with its last change.

        What has a hub's or a dataset's name is not looked at.
        """
        ours = [path.resolve() for path in (self.save, self.checkpoint) if path is not None]
        found = []
        data = map(Path, [self.data, *(self.held_out or ())])
        for place in (Path(self.model), *data, *([self.config] if self.config else [])):
            for path in sorted(filter(Path.is_file, [place, *place.rglob("*")])):
                there, about = path.resolve(), path.stat()
                if not any(there.is_relative_to(folder) for folder in ours):
                    found.append((str(there), about.st_size, about.st_mtime_ns, about.st_ctime_ns))
        return digest(found)

    def _is_saved(self) -> bool:
        """Whether --save has what this command gives, from the files that are there now."""
        try:
            recipe = json.loads((self.save / "recipe.json").read_text(encoding="utf-8"))
            same = recipe["command"] == self.command and recipe["read_from"] == self._read_from
            return bool(self.command) and same
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _remove_checkpoint(self) -> None:
        if self.checkpoint is not None:
            checkpoint.remove(self.checkpoint)

    @contextmanager
    def _saying_what_there_is(self) -> Iterator[None]:
        """Whatever ends the run says what there is of it, and what goes on with it."""
        try:
            yield
        except BaseException as error:
            answers = 0 if self.checkpoint is None else len(list(self.checkpoint.glob("*.safetensors")))
            if self._is_saved():
                error.add_note(f"({self.save} is saved)")
            elif answers and not isinstance(error, CheckpointError | LockedError):  # which are about the folder
                error.add_note(
                    f"(nothing was saved, but {self.checkpoint} has the answers of {answers} layers, from which the "
                    f"same command continues: {self.command})"
                )
            elif self.checkpoint is None and isinstance(error, SystemExit):
                error.add_note(
                    "(nothing was saved; with --checkpoint FOLDER an interrupted run goes on where it was)"
                )
            raise

    def _fits_on_gpu(self, source: Source) -> bool:
        """Whether the model can be on the GPU as a whole: it may take half, unless a GPU was asked for by name.

        Otherwise it stays on the CPU, and moves there part by part.
        """
        if self.device != "auto" or self._device.type == "cpu":
            return False
        size = sum((source.folder / name).stat().st_size for name in source.check_files())
        return 2 * size < planning.free_memory(self._device, self.memory)

    def _needs_disk(self, plan: Plan) -> bool:
        """Whether what can be offloaded goes to disk, for lack of memory. Raises ResourceError as the plan does."""
        device, on_host = self._device, torch.device("cpu")
        if device.type == "cpu":
            return plan.needs_offload(planning.free_memory(on_host, self.memory) // processes_here())
        plan.needs_offload(planning.free_memory(device, self.memory))
        return plan.offloaded > planning.free_memory(on_host) // processes_here()

    def _plan(self, model: nn.Module, calibration: Any) -> Plan | None:
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
            device=self._device,
        )

    def _scratch(self, plan: Plan | None, source: Opened, ranks: Ranks, console: Console) -> Path | None:
        """Say what pruning will take; the folder to offload to where it does not fit into memory, None where it does.

        Raises ResourceError where there is not enough memory or disk.
        """
        if plan is None:
            return None
        say(console, f"{plan}{f', by one process where {ranks.count} share the work' * (ranks.count > 1)}")
        on_disk = self._needs_disk(plan)
        needed = {source.draft: source.unwritten + plan.offloaded * on_disk}
        if self.checkpoint is not None and ranks.is_first:
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
        plan = self._plan(skeleton, calibration)
        needed = sum((source.folder / name).stat().st_size for name in source.check_files())
        if plan is None:
            say(console, "what it will take can only be said of a language model")
        else:
            say(console, str(plan))
            needed += plan.offloaded * self._needs_disk(plan)
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
            device=None if self._device.type == "cpu" else self._device,
            precision=self.precision,
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
                    refit=self.refit,
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


def print_skipped(console: Console, skipped: list[str], images: bool) -> None:
    """Name what of the data could not be read, if there is anything."""
    if skipped:
        names = ", ".join(map(one_line, skipped))
        say(console, f"{len(skipped)} {'broken images' if images else 'files'} skipped: {names}")


def _listed(figures: Mapping[str, Perplexity | Accuracy]) -> str:
    return "; ".join(f"{figure.name} {figure}, on {data}" for data, figure in figures.items())
