"""`moonshot prune`: a model from a folder or hub name to a pruned folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from moonshot import pruning
from moonshot.app.arguments import PruneArguments
from moonshot.app.config import saved_text
from moonshot.app.data import calibration_windows, pictures, say_skipped
from moonshot.app.launch import console_of, launched
from moonshot.app.measure import HeldOut
from moonshot.app.on_disk import OnDisk
from moonshot.app.progress import progress
from moonshot.app.resources import Resources
from moonshot.app.terminal import one_line, say
from moonshot.errors import MoonshotError
from moonshot.files.draft import check_free
from moonshot.files.folder import Opened, opened
from moonshot.files.hub import Push
from moonshot.files.load import Source
from moonshot.files.protocols import PROTOCOLS
from moonshot.layer.patterns import Pattern
from moonshot.models.evaluation import Accuracy, Perplexity, accuracy, perplexity
from moonshot.models.images import ImageBatches
from moonshot.models.ranks import Ranks
from moonshot.models.shrink import shrink
from moonshot.models.units import column_patterns
from moonshot.pruning.html import save_html
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
        on_disk = OnDisk(self)
        on_disk.read_from  # noqa: B018 - before anything is read
        if ranks.broadcast(ranks.is_first and on_disk.is_done()):
            if ranks.is_first and not self.dry_run:
                on_disk.remove_checkpoint()
            say(console, f"done already: {self.save}")
            if self.push is not None and ranks.is_first and not self.dry_run:
                # what is on the hub already is from this command
                self._send(replace(self.push, overwrite=True), console)
            return
        if ranks.is_first:
            check_free(self.save, self.overwrite)
            self._check_checkpoint()
            self._check_writable()
            if self.push is not None:
                self.push.check(self.model)
        source = Source(self.model, self.trust_remote_code)
        source.check_files()
        skeleton = source.skeleton()
        layers = self._check_layers(skeleton)
        calibration, skipped = self._calibration(source, skeleton)
        say_skipped(console, skipped, source.is_image_classifier)
        held_out = self._held_out(source, console)
        if self.dry_run:
            Resources(self).say_what_it_would_do(source, skeleton, layers, calibration, console)
            return
        with on_disk.saying_what_there_is():
            self._prune(source, calibration, held_out, skipped, on_disk.read_from, ranks, console)
            if ranks.is_first:
                on_disk.remove_checkpoint()
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
        read_from: str,
        ranks: Ranks,
        console: Console,
    ) -> None:
        """From the opened model to the saved one. Ranks but the first have copies beside it that are not saved."""
        resources = Resources(self)
        place = self.save if ranks.is_first else self.save.with_name(f".{self.save.name}.rank{ranks.index}")
        with opened(source, place, overwrite=self.overwrite, on_gpu=resources.fits_on_gpu(source)) as work:
            scratch = resources.scratch(work, calibration, ranks, console)
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
            report.recipe.update(model=self.model, data=self.data, command=self.command, read_from=read_from)
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
            device=None if self.used_device.type == "cpu" else self.used_device,
            precision=self.precision,
        )
        allocation = None
        if self.allocate:
            with progress(console, source.release) as steps:
                allocation = pruning.allocate(
                    source.model,
                    calibration,
                    self.pattern,  # type: ignore[arg-type]
                    objective=self.terms,
                    patterns=self.choices,
                    refit=self.refit or False,
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
                refit=self.refit or False,
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


def _listed(figures: Mapping[str, Perplexity | Accuracy]) -> str:
    return "; ".join(f"{figure.name} {figure}, on {data}" for data, figure in figures.items())
