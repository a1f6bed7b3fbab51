"""`prune`: a model, part by part, in place."""

import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moonshot.errors import ArgumentError, ArgumentTypeError
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern
from moonshot.models.adapter import Adapter
from moonshot.models.calibration import Batch, batch_tokens, count_samples, split
from moonshot.models.losses import Loss, model_loss
from moonshot.models.partition import partition_model
from moonshot.models.precision import passing, zeros
from moonshot.models.ranks import Ranks, current
from moonshot.models.settings import with_model_ready
from moonshot.pruning.allocation import Allocation
from moonshot.pruning.auto import CANDIDATES, best_objective
from moonshot.pruning.checkpoint import Checkpoint
from moonshot.pruning.fingerprint import comparable, data_digest, exact, sketch, state_digest
from moonshot.pruning.layer_patterns import PatternLike, layer_patterns
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE, OnProgress, Recipe, unheard
from moonshot.pruning.refit import Refit
from moonshot.pruning.report import LayerReport, Report, Trial
from moonshot.pruning.run import PruningRun
from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Solver

OnLayer = Callable[[LayerReport, int], None]


@with_model_ready
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
    unfit: Literal["error", "skip"] = "error",
    scratch: Path | None = None,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
    precision: Literal["model", "float32"] | None = None,
    refit: bool | Refit = False,
    checkpoint: Path | str | None = None,
    on_layer: OnLayer | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Prune the linear and convolutional layers of a model in place, and say how good every layer's answer is.

    model: of transformers or any other torch module; its weights keep their dtype.
    calibration: token ids (samples, tokens), a list of batches, or a DataLoader (models.calibration.as_batches).
    pattern: one for all layers, or {layer name: pattern} for those to prune.
    objective: what the layers' answers are judged by; "auto" tries those in pruning.auto.CANDIDATES on three quarters
    of the samples, in one pass through the model, and takes the one that does best on the rest, if it gains more than
    chance explains (at a level of 5 %, pruning.selection).
    solver: of the layers' problems; `ADMM()` unless given.
    targets, ignore: names, globs or `re:` expressions of layers (models.targets.select).
    factors: per-sample gradients are reduced to this many by random signs, without bias, for terms that need them.
    dampening_frac: the ridge of every problem, as a fraction of its Hessians' mean diagonal.
    seed: of the signs and of the samples set aside; the same seed gives the same model.
    loss: (model, batch) -> scalar, the mean over the batch; the model's own by default, for which batches other
    than a causal language model's have labels.
    bound: whether to prove for every layer how far from the optimum its answer is at most (LayerReport.gap); it can
    take several times as long as pruning.
    batch_norm: whether running statistics are estimated again on the calibration data (models.batchnorm), where there
    are any, as each part is finished; the report's recipe says so.
    unreached: what becomes of layers that no calibration sample reached: "skip" leaves them as they are, and
    Report.skipped names them.
    device: where the parts run and are solved, one at a time, while the rest of the model stays where it is: "cuda",
    "cuda:1", "cpu", or "auto" for a GPU where there is one; where the model is unless given.
    precision: of the passes, "float32", or "model" for the dtype of the model (float32 all the same for float16, in
    which gradients vanish). Unless given "float32" on the CPU, "model" on a GPU. Statistics are float32 or better.
    refit: whether, and how, the surviving weights of each part, its norms and biases are fitted to the dense part once
    its layers are pruned; True for the defaults of Refit. Masks do not change.
    unfit: what becomes of layers that cannot have the pattern, such as 2:4 on a convolution with three channels: an
    error that names them all, or "skip", as above.
    scratch: a folder to offload to, made where it is not there, in files that are gone afterwards: the layers' weights
    as they were, and the hidden states and gradients between the model's parts. In memory unless given.
    adapter: how the model is divided into parts, and what its layers are (models.adapter); found out unless given.
    checkpoint: a folder for every layer's answer, written as soon as there is one. A call with the same arguments
    and model continues an interrupted one from there, with the same result.
    on_layer: called after each layer with its report and the number of layers in all, trials included.
    on_progress: called in between, while gradients are gathered and parts are refitted, with two texts: what is being
    done, and how far it is.

    A transformer's blocks, or the parts that a model can be divided into (models.partition), take their turns: inputs
    come from the model with its earlier parts pruned, gradients from the dense model. Left alone by default are
    embeddings, what a transformers model has on top of its base model, the routers of a mixture of experts, and all
    that lies outside a transformer's blocks.
    Weights keep their dtype; all but the passes is computed in float32 or better. If it fails, the weights are as they
    were.
    """
    solver = ADMM() if solver is None else solver
    recipe = Recipe(
        objective=objective,
        solver=solver,
        targets=targets,
        ignore=ignore,
        factors=factors,
        dampening_frac=dampening_frac,
        seed=seed,
        loss=loss,
        unreached=unreached,
        unfit=unfit,
        scratch=scratch,
        adapter=adapter,
        device=device,
        precision=precision,
        on_progress=on_progress or unheard,
    )
    return prune_by(
        recipe,
        model,
        calibration,
        pattern,
        bound=bound,
        batch_norm=batch_norm,
        refit=refit,
        checkpoint=checkpoint,
        on_layer=on_layer,
    )


def prune_by(
    recipe: Recipe,
    model: nn.Module,
    calibration: Any,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    bound: bool = False,
    batch_norm: bool = True,
    refit: bool | Refit = False,
    checkpoint: Path | str | None = None,
    on_layer: OnLayer | None = None,
) -> Report:
    """`prune`, with what else it takes as a recipe."""
    with passing(recipe.passes(model)):
        return _pruned(recipe, model, calibration, pattern, bound, batch_norm, refit, checkpoint, on_layer)


def _pruned(
    recipe: Recipe,
    model: nn.Module,
    calibration: Any,
    pattern: PatternLike | Mapping[str, PatternLike],
    bound: bool,
    batch_norm: bool,
    refit: bool | Refit,
    checkpoint: Path | str | None,
    on_layer: OnLayer | None,
) -> Report:
    fit = _as_refit(refit)
    for name, switch in {"bound": bound, "batch_norm": batch_norm}.items():
        if not isinstance(switch, bool):
            raise ArgumentTypeError(f"{name} must be True or False, got {switch!r}")
    if not isinstance(checkpoint, str | Path | None):
        raise ArgumentTypeError(f"checkpoint must be a folder, got {checkpoint!r}")
    ranks = current()
    if not ranks.is_first:
        recipe, on_layer = replace(recipe, on_progress=unheard), None
    batches, unused = recipe.batches(model, calibration)
    partition = partition_model(model, batches, recipe.loss, recipe.adapter)
    patterns, skipped = layer_patterns(partition, pattern, recipe)
    if isinstance(pattern, Allocation):
        skipped |= pattern.skipped
    if not isinstance(pattern, Mapping):
        skipped |= partition.skipped(recipe.targets, recipe.ignore)
    report = Report(_described(recipe, pattern, batches, fit), versions(), skipped=skipped, unused=unused)
    if recipe.targets is None and not isinstance(pattern, Mapping):
        report.left_alone = partition.left_alone()
    trials = len(CANDIDATES) if isinstance(recipe.objective, str) else 0
    total = (trials + 1) * len(patterns)

    def advance(layer: LayerReport) -> None:
        if on_layer is not None:
            on_layer(layer, total)

    begin = time.perf_counter()
    run = PruningRun(model, partition, patterns, recipe, batch_norm, advance, ranks)
    if ranks.count > 1:
        _check_ranks(ranks, run, batches, fit, bound)
    with ExitStack() as stack:
        stored = None
        if checkpoint is not None and ranks.is_first:
            work = _work(recipe, report, patterns, model, batches, fit, bound, batch_norm)
            stored = stack.enter_context(Checkpoint(checkpoint, work))
        if isinstance(calibration, Tensor) and fit is None:  # whose batches are made here, and may be smaller
            batches = split(batches, math.ceil(count_samples(batches) / ranks.count))
        restore = stack.enter_context(run.restored_on_failure())
        objective = recipe.objective
        if isinstance(objective, str):
            objective, report.trials = _best_objective(run, batches, stored)
            restore()
        report.recipe["objective"] = objective.name
        report.layers, report.parts = run.prune([objective], batches, bound=bound, refit=fit, checkpoint=stored)
        report.resumed = ranks.broadcast(stored.used if stored else 0)
        ranks.gather(None)  # all have come this far: none has to put its model back
    if run.estimates_batch_norm:
        report.recipe["batch_norm"] = "estimated again"
    report.model_sparsity = zeros(model)
    report.seconds = time.perf_counter() - begin
    report.peak_memory = _peak_memory()
    return report


def _as_refit(refit: bool | Refit) -> Refit | None:
    if isinstance(refit, bool):
        return Refit() if refit else None
    if not isinstance(refit, Refit):
        raise ArgumentTypeError(f"refit must be True, False or such as moonshot.Refit(epochs=6), got {refit!r}")
    return refit


def _best_objective(
    run: PruningRun, batches: list[Batch], stored: Checkpoint | None
) -> tuple[Objective, list[Trial]]:
    """`best_objective`, or what an earlier run found."""
    by_name = {candidate.name: candidate for candidate in CANDIDATES}
    trials = run.ranks.broadcast(None if stored is None else stored.trials())
    if trials and trials[0] in by_name:
        return by_name[trials[0]], trials[1]
    objective, found = best_objective(run, batches)
    if stored is not None:
        stored.store_trials(objective.name, found)
    return objective, found


def _check_ranks(ranks: Ranks, run: PruningRun, batches: list[Batch], fit: Refit | None, bound: bool) -> None:
    """Raises RankError unless all ranks do the same, ArgumentError for terms whose statistics they cannot share."""
    recipe = run.recipe
    objectives = CANDIDATES if isinstance(recipe.objective, str) else (recipe.objective,)
    terms = [term for objective in objectives for _, term in objective.weighted_terms]
    if alone := [term.name for term in terms if not term.additive and term.needs != {"gradients"}]:
        raise ArgumentError(
            f"{alone[0]} does not say that its statistics add up, as those of several processes must: set additive = "
            "True in the class if they are arrays that do, or prune in one process"
        )
    own = ("scratch", "on_progress", "device")
    names = [name for name in Recipe.__dataclass_fields__ if name not in own]
    fields = {name: comparable(getattr(recipe, name)) for name in names}
    ranks.agree(
        fields
        | {
            "patterns": comparable(run.patterns),
            "batch_norm": run.batch_norm,
            "refit": comparable(fit),
            "bound": bound,
            "calibration": data_digest(batches),
            "the model": sketch(run.model),
            "its parts": [name for name, _ in run.partition.parts],
        }
    )


def _described(recipe: Recipe, pattern: Any, batches: list[Batch], refit: Refit | None) -> dict[str, Any]:
    """The recipe as the report has it."""
    return {
        "pattern": "per layer" if isinstance(pattern, Mapping) else str(pattern),
        "solver": repr(recipe.solver),
        "samples": count_samples(batches),
        "tokens": sum(batch_tokens(batch) for batch in batches),
        "factors": recipe.factors,
        "dampening_frac": recipe.dampening_frac,
        "seed": recipe.seed,
    } | ({} if refit is None else {"refit": repr(refit)})


def _work(
    recipe: Recipe,
    report: Report,
    patterns: Mapping[str, Pattern],
    model: nn.Module,
    batches: Iterable[Any],
    fit: Refit | None,
    bound: bool,
    batch_norm: bool,
) -> dict[str, Any]:
    """What a layer's answer depends on, apart from the weights of the layers."""
    objects = {
        "objective": recipe.objective,
        "solver": recipe.solver,
        "loss": recipe.loss,
        "adapter": recipe.adapter,
        "refit": fit,
    }
    return (
        report.recipe
        | {what: exact(value, what) for what, value in objects.items()}
        | {
            "patterns": {name: exact(pattern, "pattern") for name, pattern in patterns.items()},
            "calibration": data_digest(batches),
            "model": state_digest(model, without=patterns),
            "bound": bound,
            "batch_norm": batch_norm,
            **({} if recipe.passes(model).widened else {"precision": "model"}),
            "moonshot": report.versions["moonshot"],
        }
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that have a part in pruning and are loaded."""
    packages = ("moonshot", "torch", "transformers", "numpy", "scipy", "numba")
    loaded = {name: str(sys.modules[name].__version__) for name in packages if sys.modules.get(name)}
    return {"python": platform.python_version()} | loaded


def _peak_memory() -> int:
    """Bytes this process held at most, by the operating system's own count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
