"""`compare`: methods side by side on a model of one's own, over draws of the calibration data."""

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from moonshot.errors import ArgumentError, ArgumentTypeError, MoonshotError
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern, as_pattern
from moonshot.models.batch_sizes import tokens_at_once
from moonshot.models.calibration import Batch, as_batches
from moonshot.models.modules import check_model
from moonshot.pruning.comparison import Comparison, Run
from moonshot.pruning.fingerprint import data_digest, exact, state_digest
from moonshot.pruning.layer_patterns import PatternLike
from moonshot.pruning.prune import prune, versions
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE, OnProgress
from moonshot.pruning.run_store import RunStore
from moonshot.solvers.base import Solver
from moonshot.solvers.diagonal import Magnitude

Method = tuple[Solver, Objective | str]
Measure = Callable[[nn.Module], float]
OnRun = Callable[[Run, int], None]
_OURS = {
    "model",
    "calibration",
    "pattern",
    "objective",
    "solver",
    "seed",
    "checkpoint",
    "on_layer",
    "on_progress",
}


class ComparisonError(MoonshotError):
    """A comparison of which nothing came."""


def compare(
    model: nn.Module,
    calibration: Any,
    evaluate: Measure,
    *,
    patterns: PatternLike | Sequence[PatternLike],
    solvers: Solver | Sequence[Solver] | Mapping[str, Solver],
    objectives: Objective | str | Sequence[Objective | str] | Mapping[str, Objective | str] = DEFAULT_OBJECTIVE,
    seeds: int | Sequence[int] = 1,
    metric: str = "value",
    higher_is_better: bool = False,
    folder: str | Path | None = None,
    on_run: OnRun | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Comparison:
    """Prune copies of a model by every solver on every objective to every pattern, and measure each.

    model: stays as it is; there must be memory for a second one.
    calibration: what `prune` takes, or a function from a seed to that, which draws other samples for every seed.
    evaluate: measures a model, such as `lambda model: perplexity(model, held_out).value`.
    patterns, solvers, objectives: one or several of what `prune` takes; of a mapping, the keys are their names in the
    table. Magnitude, which looks at no objective, runs with the first alone.
    seeds: how many there are, or which, for `prune` and the calibration function.
    metric, higher_is_better: what it is that `evaluate` measures.
    folder: where every run is stored as soon as it has ended, and the comparison as JSON, CSV and Markdown. Runs that
    are there already are not repeated; those with other settings, samples or another model are kept apart.
    on_run: called after each run with its result and the number of runs in all.
    on_progress: called in between, with what is being done and how far it is.
    options: what else `prune` takes, such as targets, factors or refit.

    A run that fails has the reason in place of its value, and the others go on; the next call tries it again.
    Raises ComparisonError where all fail, RunStoreError for a folder with other files, LockedError where another
    process has it.
    """
    methods: dict[str, Method] = {}
    chosen = _named(objectives, "objectives")
    for name, solver in _named(solvers, "solvers").items():
        tried = list(chosen.items())[: 1 if isinstance(solver, Magnitude) else None]
        for about, objective in tried:
            methods[name if len(tried) == 1 else f"{name}, {about}"] = solver, objective
    return compare_methods(
        model,
        calibration,
        evaluate,
        patterns=patterns,
        methods=methods,
        seeds=seeds,
        metric=metric,
        higher_is_better=higher_is_better,
        folder=folder,
        on_run=on_run,
        on_progress=on_progress,
        **options,
    )


def compare_methods(
    model: nn.Module,
    calibration: Any,
    evaluate: Measure,
    *,
    patterns: PatternLike | Sequence[PatternLike],
    methods: Mapping[str, Method],
    seeds: int | Sequence[int] = 1,
    metric: str = "value",
    higher_is_better: bool = False,
    folder: str | Path | None = None,
    on_run: OnRun | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Comparison:
    """`compare`, for methods by name, each a solver and an objective."""
    check_model(model)
    _check_options(options)
    wanted = {str(pattern): pattern for pattern in map(as_pattern, _several(patterns))}
    tasks = [_Task(name, pattern, *method) for pattern in wanted.values() for name, method in methods.items()]
    draws = _draws(seeds)
    runs: list[Run] = []
    with nullcontext() if folder is None else RunStore(folder) as store:
        comparison = Comparison(metric, float(evaluate(model)), runs, higher_is_better)
        for seed in draws:
            drawn = calibration(seed) if callable(calibration) else calibration
            batches = as_batches(drawn, tokens_at_once(model))
            settings = _settings(model, batches, evaluate, comparison.dense, options) if store else {}
            for task in tasks:
                work = settings | task.work(seed) if store else {}
                run = store.find(work) if store else None
                if run is None:
                    run = _run(model, batches, evaluate, task, seed, options, on_progress)
                    if store and run.value is not None:
                        store.store(work, run)
                runs.append(replace(run, method=task.method))
                if store:
                    comparison.save(store.folder)
                if on_run is not None:
                    on_run(runs[-1], len(draws) * len(tasks))
    if all(run.value is None for run in runs):
        raise ComparisonError(f"nothing came of it: {'; '.join(comparison.failures) or 'there are no methods'}")
    return comparison


@dataclass(frozen=True)
class _Task:
    """A method and a pattern, whatever the seed."""

    method: str
    pattern: Pattern
    solver: Solver
    objective: Objective | str

    def work(self, seed: int) -> dict[str, Any]:
        """What its result depends on, in JSON's types."""
        objects = {"pattern": self.pattern, "solver": self.solver, "objective": self.objective}
        return {what: exact(value, what) for what, value in objects.items()} | {"seed": seed}


def _settings(
    model: nn.Module, batches: list[Batch], evaluate: Measure, dense: float, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What every run on these samples depends on, in JSON's types.

    dense: it changes with the data that `evaluate` measures on, wherever that is; less rounding, which threads change.
    """
    return {
        "model": state_digest(model),
        "calibration": data_digest(batches),
        "evaluate": exact(evaluate, "evaluate function"),
        "dense": f"{dense:.5g}",
        "options": {name: exact(value, name) for name, value in sorted(options.items())},
        "moonshot": versions()["moonshot"],
    }


def _run(
    model: nn.Module,
    batches: list[Batch],
    evaluate: Measure,
    task: _Task,
    seed: int,
    options: Mapping[str, Any],
    on_progress: OnProgress | None,
) -> Run:
    """Prune a copy of the model and measure it; what goes wrong is in the result."""
    what = f"{task.method}, {task.pattern}, seed {seed}"

    def say(how_far: str) -> None:
        if on_progress is not None:
            on_progress(what, how_far)

    say("")
    pruned, begin = copy.deepcopy(model), time.perf_counter()
    value, sparsity, reason = None, 0.0, ""
    try:
        report = prune(
            pruned,
            batches,
            task.pattern,
            solver=task.solver,
            objective=task.objective,
            seed=seed,
            on_layer=lambda layer, total: say(layer.name),
            on_progress=lambda doing, how_far: say(f"{doing}, {how_far}"),
            **options,
        )
        value, sparsity = float(evaluate(pruned)), report.sparsity
    except Exception as error:  # of a solver, an objective or a pattern of one's own, or for want of memory
        kind = "" if isinstance(error, MoonshotError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error} {' '.join(getattr(error, '__notes__', ()))}".split())
    return Run(task.method, str(task.pattern), seed, value, sparsity, time.perf_counter() - begin, reason)


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _named(given: Any, what: str) -> dict[str, Any]:
    """Solvers or objectives by their names, those that share one by how they are written."""
    if isinstance(given, Mapping):
        return {str(name): value for name, value in given.items()}
    items = _several(given)
    names = [str(getattr(item, "name", item)) for item in items]
    names = [repr(item) if names.count(name) > 1 else name for name, item in zip(names, items, strict=True)]
    if len(set(names)) < len(names):
        raise ArgumentError(f"two {what} have the same name: give them as a mapping, {{name: one of them}}")
    return dict(zip(names, items, strict=True))


def _draws(seeds: int | Sequence[int]) -> list[int]:
    if type(seeds) is int and seeds > 0:
        return list(range(seeds))
    if isinstance(seeds, Sequence) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds):
        return list(dict.fromkeys(seeds))
    raise ArgumentError(f"seeds is how many there are, 1 or more, or a list of them, got {seeds!r}")


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises ArgumentTypeError for what `prune` does not take, or `compare` gives it itself."""
    known = [name for name in inspect.signature(prune).parameters if name not in _OURS]
    if unknown := [name for name in options if name not in known]:
        close = get_close_matches(unknown[0], known, 1)
        meant = f"did you mean {close[0]}?" if close else f"what prune takes besides is {', '.join(known)}"
        raise ArgumentTypeError(f"compare takes no {unknown[0]!r}; {meant}")
