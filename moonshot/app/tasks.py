"""Zero-shot tasks by lm-eval, the field's harness."""

import fnmatch
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from moonshot.errors import ArgumentError, meant_path
from moonshot.extras import from_extra


@dataclass(frozen=True)
class TaskResult:
    """One metric of a task; error: its standard error, None where the harness gives none."""

    task: str
    metric: str
    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.error is None else f" +- {self.error:.4f}")


class Harness:
    """lm-eval with the tasks that were asked for.

    tasks: names of the harness's tasks or of one's own, groups and globs too.
    include_path: a folder with YAML files of one's own tasks.

    Raises ImportError where lm-eval is not installed, ArgumentError for tasks that there are not.
    """

    def __init__(self, tasks: list[str], include_path: Path | None = None):
        if include_path is not None and not include_path.is_dir():
            raise ArgumentError(
                f"--include-path {include_path} is no folder: give one with YAML files of tasks"
                f"{meant_path(include_path)}"
            )
        with from_extra("eval"), _silent():
            import lm_eval
            from lm_eval.models import huggingface  # noqa: F401 - says now what it lacks
            from lm_eval.tasks import TaskManager

        self.version = lm_eval.__version__
        with _silent():
            if include_path is not None:  # alone, for the harness's own are thousands of files
                self._manager = TaskManager(include_path=str(include_path), include_defaults=False)
            if include_path is None or not all(map(self._matching, tasks)):
                self._manager = TaskManager(include_path=include_path and str(include_path))
        self._tasks = [name for task in tasks for name in self._matching(task) or self._refuse(task)]

    def _matching(self, task: str) -> list[str]:
        return fnmatch.filter(self._manager.all_tasks, task)

    def _refuse(self, task: str) -> NoReturn:
        close = get_close_matches(task, self._manager.all_tasks, 1)
        raise ArgumentError(
            f"--tasks: lm-eval {self.version} has no task {task!r}"
            + (
                f"; did you mean {close[0]}?"
                if close
                else "; one of your own is found by --include-path FOLDER"
            )
        )

    def run(self, model: nn.Module, tokenizer: Any) -> list[TaskResult]:
        """What a causal language model of transformers reaches. Raises ArgumentError where a task cannot be run."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        batch = "auto" if torch.cuda.is_available() else 1
        try:
            with _silent():
                harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
                found = simple_evaluate(
                    harness, tasks=self._tasks, task_manager=self._manager, log_samples=False
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what the harness and the data sets' library raise has no common base class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArgumentError(f"lm-eval cannot run {', '.join(self._tasks)}: {reason}") from error
        return list(_results(found["results"]))


def _results(found: dict[str, dict[str, Any]]) -> Iterator[TaskResult]:
    for task, values in found.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{kind}")
                yield TaskResult(task, metric, float(value), error if isinstance(error, float) else None)


@contextmanager
def _silent() -> Iterator[None]:
    """The harness, what it needs and the programs that it starts print nothing meanwhile."""
    before, error = logging.root.manager.disable, os.dup(2)
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(error, 2)
        os.close(error)
        logging.disable(before)
