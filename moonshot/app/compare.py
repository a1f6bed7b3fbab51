"""`moonshot compare`: methods side by side on a model from a folder or hub name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moonshot.app.data import calibration_windows, held_out_windows, pictures, text_windows
from moonshot.app.progress import progress
from moonshot.app.terminal import one_line, say
from moonshot.errors import ArgumentError
from moonshot.files.load import Source
from moonshot.files.protocols import PROTOCOLS
from moonshot.files.text import read_texts
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern
from moonshot.models.evaluation import accuracy, perplexity
from moonshot.models.images import ImageBatches, Pictures
from moonshot.pruning.compare import Measure, compare
from moonshot.pruning.comparison import Comparison
from moonshot.pruning.lock import LockedError
from moonshot.pruning.run_store import RunStore
from moonshot.solvers import Solver

_FIFTH = 5  # the share of the data that is measured on where no other data is given


@dataclass(frozen=True)
class CompareCommand:
    """Everything that `moonshot compare` was asked for (`moonshot compare --help`)."""

    model: str
    data: str
    patterns: list[Pattern]
    solvers: list[Solver]
    objectives: dict[str, Objective | str]
    eval_data: str | None = None
    eval_nsamples: int = 0
    nsamples: int = 128
    seqlen: int | None = None
    text_column: str | None = None
    seeds: int = 1
    save: Path | None = None
    trust_remote_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, console: Console) -> None:
        """Draw, prune and measure, and print the table. Raises ValueError, TypeError or OSError with what to do."""
        if self.nsamples < 1 or self.seeds < 1 or self.eval_nsamples < 0:
            raise ArgumentError("--nsamples and --seeds are 1 or more, --eval-nsamples 0 (for all) or more")
        if self.save is not None:
            RunStore(self.save)  # or say what is wrong with the folder
        source = Source(self.model, self.trust_remote_code)
        source.check_files()
        draw, evaluate, metric = (self._images if source.is_image_classifier else self._text)(source)
        draw(0)  # or say what is wrong with the data
        model = source.load()
        with self._saying_what_there_is(), progress(console) as steps:
            found = compare(
                model,
                draw,
                evaluate,
                patterns=self.patterns,
                solvers=self.solvers,
                objectives=self.objectives,
                seeds=self.seeds,
                metric=metric,
                higher_is_better=source.is_image_classifier,
                folder=self.save,
                on_run=lambda run, total: steps.done(str(run), total),
                on_progress=steps.doing if console.is_terminal else None,
                **self.options,
            )
        show(found, console)
        if self.save is not None:
            found.plot(self.save / "comparison.png")
            say(console, f"saved: {self.save} (comparison.csv, .json, .md and .png, and every run)")

    @contextmanager
    def _saying_what_there_is(self) -> Iterator[None]:
        """Whatever ends the comparison says what there is of it."""
        try:
            yield
        except BaseException as error:
            if self.save is not None and not isinstance(error, LockedError):
                done = len(list(self.save.glob("runs/*.json")))
                error.add_note(f"({self.save} has {done} runs: the same command continues from there)")
            elif self.save is None and isinstance(error, SystemExit):
                error.add_note(
                    "(nothing was saved; with --save FOLDER an interrupted comparison goes on where it was)"
                )
            raise

    def _text(self, source: Source) -> tuple[Callable[[int], Tensor], Measure, str]:
        """What draws calibration windows, what measures a model, and what that is called."""
        other = self.eval_data or (self.data if self.data in PROTOCOLS else None)
        if other is not None:
            held_out = held_out_windows(
                source, other, self.eval_nsamples or None, self.seqlen, self.text_column
            ).ids

            def draw(seed: int) -> Tensor:
                found = calibration_windows(
                    source, self.data, self.nsamples, self.seqlen, seed, self.text_column
                )
                return found.ids
        else:
            text = read_texts(self.data, source.processor, self.text_column).text
            cut = len(text) * (_FIFTH - 1) // _FIFTH
            held_out = text_windows(source, text[cut:], self.eval_nsamples or None, self.seqlen, None)

            def draw(seed: int) -> Tensor:
                return text_windows(source, text[:cut], self.nsamples, self.seqlen, seed)

        about = f"perplexity (context {held_out.shape[1]}, {held_out.shape[0]} windows)"
        return draw, partial(_perplexity, held_out), about

    def _images(self, source: Source) -> tuple[Callable[[int], list[Any]], Measure, str]:
        """As `_text`."""
        found = pictures(self.data, self.seqlen, self.text_column)
        split = self.eval_data is None
        skeleton = source.skeleton()

        def draw(seed: int) -> list[Any]:
            here = _part(found, held_out=False) if split else found
            return list(ImageBatches(skeleton, source.processor, here, self.nsamples, seed))

        measured = self.eval_data or self.data
        evaluate = partial(_accuracy, self.model, self.trust_remote_code, measured, split, self.eval_nsamples)
        return draw, evaluate, "accuracy, %"


def show(found: Comparison, console: Console, ideas: dict[str, str] | None = None) -> None:
    """Print a comparison: a table as wide as the terminal, Markdown elsewhere. ideas: of the methods, in a word."""
    if not console.is_terminal and ideas is None:
        say(console, str(found))
        return
    table = Table(title=one_line(found.title))
    table.add_column("method", overflow="fold")
    for pattern in found.patterns:
        table.add_column(one_line(pattern), justify="right", overflow="fold")
    if ideas is not None:
        table.add_column("what it does")
    for method in found.methods:
        cells = [str(found.cell(method, pattern)) for pattern in found.patterns]
        table.add_row(one_line(method), *cells, *([ideas[method]] if ideas is not None else []))
    console.print(table, markup=False)
    for failure in found.failures:
        say(console, one_line(failure))


def _perplexity(windows: Tensor, model: nn.Module) -> float:
    return perplexity(model, windows).value


def _accuracy(name: str, trusted: bool, data: str, split: bool, samples: int, model: nn.Module) -> float:
    """In percent, on the images of a folder or dataset, or on those of them that are set aside."""
    found = pictures(data, None)
    found = _part(found, held_out=True) if split else found
    images = ImageBatches(model, Source(name, trusted).processor, found, samples or None, None)
    return 100 * accuracy(model, images).value


def _part(found: Pictures, held_out: bool) -> Pictures:
    """Every fifth image, or the others."""
    chosen = [k for k in range(len(found.labels)) if (k % _FIFTH == _FIFTH - 1) == held_out]
    return replace(
        found,
        labels=[found.labels[k] for k in chosen],
        names=[found.names[k] for k in chosen],
        read=lambda index: found.read(chosen[index]),
    )
