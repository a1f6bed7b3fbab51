"""`prune`: a model, block by block, in place."""

import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moonshot.auto import CANDIDATES, DEFAULT_OBJECTIVE, best_objective
from moonshot.checkpoint import Checkpoint, data_digest
from moonshot.layerwise import Recipe, check_fit, check_reached, chosen_layers
from moonshot.models.blocks import Loss
from moonshot.models.calibration import (
    Batch,
    as_batches,
    batch_tokens,
    count_samples,
    model_loss,
    moved,
    tokens_at_once,
)
from moonshot.models.cut import Cut, cut_open
from moonshot.models.targets import TargetError, select
from moonshot.objectives import Objective
from moonshot.patterns import Pattern, as_pattern
from moonshot.report import LayerReport, Report, Trial
from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Solver
from moonshot.walk import Walk

PatternLike = Pattern | str | float
OnLayer = Callable[[LayerReport, int], None]


def prune(
    model: nn.Module,
    calibration: Any,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    objective: Objective | str = DEFAULT_OBJECTIVE,
    solver: Solver | None = None,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    factors: int = 16,
    dampening_frac: float = 0.01,
    seed: int = 0,
    loss: Loss = model_loss,
    bound: bool = False,
    batch_norm: bool = True,
    unreached: Literal["error", "skip"] = "error",
    scratch: Path | None = None,
    checkpoint: Path | str | None = None,
    on_layer: OnLayer | None = None,
) -> Report:
    """Prune the linear and convolutional layers of a model in place, and say how good every layer's answer is.

    calibration: token ids (samples, tokens), a list of batches, or a DataLoader (models.calibration.as_batches).
    pattern: one for all layers, or {layer name: pattern} for those to prune.
    objective: what the layers' answers are judged by; "auto" tries those in auto.CANDIDATES on three quarters of the
    samples, on one walk through the model, and takes the one that does best on the rest (auto.best_objective).
    targets, ignore: names, globs or `re:` expressions of layers (models.targets.select).
    factors: per-sample gradients are reduced to this many by random signs, without bias, for terms that need them.
    seed: of the signs and of the samples set aside; the same seed gives the same model.
    loss: (model, batch) -> scalar, the mean over the batch; the model's own by default, for which batches other
    than a causal language model's have labels.
    bound: whether to prove for every layer how far from the optimum its answer is at most (LayerReport.gap); it can
    take several times as long as pruning.
    batch_norm: whether running statistics are estimated again on the calibration data (models.batchnorm), where there
    are any; the report's recipe says so.
    unreached: what becomes of layers that no calibration sample reached: "skip" leaves them as they are, and
    Report.skipped names them.
    scratch: a folder for what otherwise waits in memory, in files that are gone afterwards: the layers' weights as they
    were, and the hidden states and gradients between the model's parts.
    checkpoint: a folder for every layer's answer, written as soon as there is one. A call with the same arguments
    and model takes up from there what an earlier one was cut off from, with the same result.
    on_layer: called after each layer with its report and the number of layers in all, trials included.

    A transformer's blocks, or the parts that a model can be cut into (models.cut), take their turns: inputs come from
    the model with its earlier parts pruned, gradients from the dense model. Left alone by default are embeddings,
    what a transformers model has on top of its base model, the routers of a mixture of experts, and all that lies
    outside a transformer's blocks.
    Weights keep their dtype; everything is computed in float32 or better. If it fails, the weights are as they were.
    """
    solver = ADMM() if solver is None else solver
    check_method(objective, solver, unreached)
    recipe = Recipe(factors, dampening_frac, seed, loss, scratch)
    batches = [moved(batch, device_of(model)) for batch in as_batches(calibration, tokens_at_once(model))]
    cut = cut_open(model, batches, loss)
    patterns = _patterns(cut, pattern, targets, ignore)
    if unreached == "error":
        check_reached(cut, patterns)
    skipped = {name: "no calibration sample reached it" for name in patterns if name in cut.unreached}
    patterns = {name: chosen for name, chosen in patterns.items() if name not in skipped}
    report = Report(
        recipe={
            "pattern": "per layer" if isinstance(pattern, Mapping) else str(pattern),
            "solver": repr(solver),
            "samples": count_samples(batches),
            "tokens": sum(batch_tokens(batch) for batch in batches),
            "factors": factors,
            "dampening_frac": dampening_frac,
            "seed": seed,
        },
        versions=_versions(),
        skipped=skipped,
    )
    kept = None
    if checkpoint is not None:
        kept = Checkpoint(checkpoint, _work(report, objective, patterns, batches, loss, bound))
        report.resumed = len(kept.done)
    begin = time.perf_counter()
    trials = len(CANDIDATES) if isinstance(objective, str) else 0
    total = (trials + 1) * len(patterns)

    def advance(layer: LayerReport) -> None:
        if on_layer is not None:
            on_layer(layer, total)

    walk = Walk(model, cut, patterns, solver, recipe, batch_norm, advance)
    with walk.restored_on_failure() as restore:
        if isinstance(objective, str):
            objective, report.trials = _tried(walk, batches, kept)
            restore()
        report.recipe["objective"] = objective.name
        report.layers = walk.prune([objective], batches, bound, checkpoint=kept)
    if walk.estimates_again:
        report.recipe["batch_norm"] = "estimated again"
    report.seconds = time.perf_counter() - begin
    report.peak_memory = _peak_memory()
    return report


def device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def check_method(objective: Objective | str, solver: Solver, unreached: str) -> None:
    """Raises TypeError or ValueError for what `prune` and `allocate` cannot work by."""
    if objective != "auto" and not isinstance(objective, Objective):
        raise TypeError(
            f'objective must be "auto" or such as 0.7 * Reconstruction() + 0.3 * Fisher(), got {objective!r}'
        )
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(f"solver must be an instance such as moonshot.ADMM(), got {solver!r}")
    if unreached not in ("error", "skip"):
        raise ValueError(f'unreached must be "error" or "skip", got {unreached!r}')


def _patterns(
    cut: Cut,
    pattern: PatternLike | Mapping[str, PatternLike],
    targets: str | Iterable[str] | None,
    ignore: str | Iterable[str],
) -> dict[str, Pattern]:
    """{layer name: pattern}, checked against every layer's shape before anything is pruned."""
    layers = cut.layers()
    if isinstance(pattern, Mapping):
        if unknown := [name for name in pattern if name not in layers]:
            raise TargetError(
                f"no such layer: {', '.join(unknown)}; layers are {', '.join(list(layers)[:4])}, ..."
            )
        names = select(list(pattern), targets, ignore)
        patterns = {name: as_pattern(pattern[name]) for name in names}
    else:
        one = as_pattern(pattern)
        patterns = dict.fromkeys(chosen_layers(cut, targets, ignore), one)
    for name, chosen in patterns.items():
        check_fit(name, layers[name], chosen)
    return patterns


def _tried(walk: Walk, batches: list[Batch], kept: Checkpoint | None) -> tuple[Objective, list[Trial]]:
    """`best_objective`, or what an earlier run found."""
    if kept is not None and (trials := kept.trials()):
        best, found = trials
        return next(candidate for candidate in CANDIDATES if candidate.name == best), found
    objective, found = best_objective(walk, batches)
    if kept is not None:
        kept.keep_trials(objective.name, found)
    return objective, found


def _work(
    report: Report,
    objective: Objective | str,
    patterns: Mapping[str, Pattern],
    batches: Iterable[Any],
    loss: Loss,
    bound: bool,
) -> dict[str, Any]:
    """What a layer's answer depends on, apart from the model's weights."""
    return report.recipe | {
        "objective": objective if isinstance(objective, str) else objective.name,
        "patterns": {name: str(pattern) for name, pattern in patterns.items()},
        "calibration": data_digest(batches),
        "loss": f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}",
        "bound": bound,
        "moonshot": report.versions["moonshot"],
    }


def _versions() -> dict[str, str]:
    packages = ("moonshot", "torch", "transformers", "numpy", "scipy", "numba")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _peak_memory() -> int:
    """Bytes this process held at most, by the operating system's own count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
