"""How far a run is: a bar on a terminal, lines in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moonshot.app.terminal import one_line, say


class Steps:
    """The steps of a run: `done` after each of them, `doing` as often as there is something to say in between.

    after_step: called after each step.
    """

    def __init__(self, console: Console, bar: Progress, task: TaskID, after_step: Callable[[], object]):
        self._console, self._bar, self._task, self._after_step = console, bar, task, after_step
        self._log, self._last = not console.is_terminal, ""

    def done(self, what: str, total: int) -> None:
        """One more of so many steps is done: this one."""
        self._after_step()
        self._last = ""
        self._bar.update(self._task, description=one_line(what), total=total, advance=1)
        if self._log:
            say(self._console, one_line(f"{self._bar.tasks[0].completed:.0f} of {total}: {what}"))

    def doing(self, what: str, detail: str = "") -> None:
        """What is under way, and how far it is; in a log only what, and once."""
        self._bar.update(self._task, description=one_line(f"{what}, {detail}" if detail else what))
        if self._log and what != self._last:
            say(self._console, one_line(what))
        self._last = what


@contextmanager
def progress(console: Console, after_step: Callable[[], object] = lambda: None) -> Iterator[Steps]:
    """A bar on a terminal while the steps inside are done, a line for each of them elsewhere."""
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),  # last, where a narrow terminal cuts it off
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Steps(console, bar, bar.add_task("", total=None), after_step)
