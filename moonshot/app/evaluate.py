"""`moonshot eval`: how good a model is, beside the dense one that it was made from."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moonshot.app.data import say_skipped
from moonshot.app.measure import HeldOut, check_memory, dense_source, saying_what_memory_it_takes
from moonshot.app.tasks import Harness, TaskResult
from moonshot.app.terminal import say
from moonshot.errors import ArgumentError, MoonshotError
from moonshot.files.compact import load_any
from moonshot.files.load import Source
from moonshot.files.protocols import PROTOCOLS


@dataclass(frozen=True)
class EvalCommand:
    """Everything that `moonshot eval` was asked for, read from the command line (`moonshot eval --help`)."""

    model: str
    data: str | None
    seqlen: int | None = None
    nsamples: int = 0
    tasks: str | None = None
    include_path: Path | None = None
    text_column: str | None = None
    trust_remote_code: bool = False

    def run(self, console: Console) -> None:
        """Measure, and say so; of a folder that moonshot pruned, the dense model too where it is on this machine.

        Raises ValueError, ImportError or OSError with what to do about it.
        """
        if self.data is None and self.tasks is None:
            raise ArgumentError(
                "say what to measure: --data wikitext2, c4, a file or a folder, or --tasks arc_easy"
            )
        if self.nsamples < 0:
            raise ArgumentError(f"--nsamples is how many windows or images, 0 for all, got {self.nsamples}")
        if self.data is None and (self.nsamples or self.seqlen is not None or self.text_column is not None):
            raise ArgumentError(
                "--nsamples, --seqlen and --text-column are of --data, and --tasks have all of theirs: leave them out, "
                "or add --data"
            )
        if self.include_path is not None and self.tasks is None:
            raise ArgumentError("--include-path is where --tasks are found: add --tasks")
        source = Source(self.model, self.trust_remote_code)
        if self.tasks is not None and source.is_image_classifier:
            raise ArgumentError(
                "--tasks are of language models, and the model is an image classifier: give --data"
            )
        held_out = harness = None
        if self.data is not None:
            held_out = HeldOut(source, self.data, self.nsamples or None, self.seqlen, self.text_column)
            if self.data in PROTOCOLS:
                say(console, held_out.title)
        if self.tasks is not None:
            harness = Harness(self.tasks.split(","), self.include_path)
        own = _Measured(source, held_out, harness)
        own.say(console)
        if held_out is not None:
            say_skipped(console, held_out.skipped, source.is_image_classifier)
        dense = None
        try:
            if (base := dense_source(source)) is not None:
                dense = _Measured(base, held_out, harness)
                dense.say(console, f", the dense model {base.name}")
        except (MoonshotError, OSError, MemoryError) as error:
            say(console, f"the dense model was not measured: {str(error) or 'out of memory'}")
        if harness is not None:
            say(console, f"lm-eval {harness.version}, zero-shot unless a task says otherwise")
            console.print(_table(own.tasks, None if dense is None else dense.tasks))


class _Measured:
    """What one model reaches."""

    def __init__(self, source: Source, held_out: HeldOut | None, harness: Harness | None):
        check_memory(source)
        with saying_what_memory_it_takes():
            model = load_any(source)
            self.figure = None if held_out is None else held_out.measure(model)
            self.tasks = [] if harness is None else harness.run(model, source.processor)

    def say(self, console: Console, whose: str = "") -> None:
        if self.figure is not None:
            say(console, f"{self.figure.name} {self.figure}{whose}")


def _table(own: list[TaskResult], dense: list[TaskResult] | None) -> Table:
    """The tasks' metrics, the dense model's beside them where they are known."""
    table = Table()
    others = {} if dense is None else {(result.task, result.metric): result for result in dense}
    for name in ("task", "metric", "value", *(["dense"] if dense is not None else [])):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for result in own:
        other = others.get((result.task, result.metric))
        table.add_row(result.task, result.metric, str(result), *([str(other)] if other is not None else []))
    return table
