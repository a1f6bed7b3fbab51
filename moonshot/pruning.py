"""`prune`: a model, block by block, in place."""

import platform
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.evaluation import sample_losses
from moonshot.models.batchnorm import reestimate, running_statistics
from moonshot.models.blocks import Loss, ModelError, evaluating, held, in_float32
from moonshot.models.calibration import (
    Batch,
    as_batches,
    batch_tokens,
    count_samples,
    model_loss,
    moved,
    set_aside,
)
from moonshot.models.cut import Cut, cut_open
from moonshot.models.layers import LayerView, layers_of
from moonshot.models.statistics import LayerStatistics
from moonshot.models.targets import TargetError, select
from moonshot.objectives import Fisher, Objective, Reconstruction, TokenFisher
from moonshot.patterns import Pattern, PatternError, as_pattern
from moonshot.report import LayerReport, Report
from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Solver, solve
from moonshot.weighting import choose

DEFAULT_OBJECTIVE = 0.6 * Reconstruction() + 0.2 * TokenFisher() + 0.2 * Fisher()
# What objective="auto" tries, the default first.
CANDIDATES = (
    DEFAULT_OBJECTIVE,
    Reconstruction(),
    0.8 * Reconstruction() + 0.2 * Fisher(),
    0.5 * Reconstruction() + 0.5 * Fisher(),
    0.5 * Reconstruction() + 0.5 * TokenFisher(),
    0.2 * Reconstruction() + 0.4 * TokenFisher() + 0.4 * Fisher(),
)

PatternLike = Pattern | str | float
OnLayer = Callable[[LayerReport, int], None]


@dataclass(frozen=True)
class _Recipe:
    """What is asked of every layer, apart from the objective."""

    patterns: dict[str, Pattern]  # by layer name
    solver: Solver
    factors: int
    dampening_frac: float
    seed: int
    loss: Loss
    bound: bool


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
    on_layer: OnLayer | None = None,
) -> Report:
    """Prune the linear and convolutional layers of a model in place, and say how good every layer's answer is.

    calibration: token ids (samples, tokens), a list of batches, or a DataLoader (models.calibration.as_batches).
    pattern: one for all layers, or {layer name: pattern} for those to prune.
    objective: what the layers' answers are judged by; "auto" tries those in CANDIDATES on three quarters of the
    samples and takes the one that does best on the rest (weighting.choose), for seven times the time.
    targets, ignore: names, globs or `re:` expressions of layers (models.targets.select).
    factors: per-sample gradients are reduced to this many by random signs, without bias, for terms that need them.
    seed: of the signs and of the samples set aside; the same seed gives the same model.
    loss: (model, batch) -> scalar, the mean over the batch; the model's own by default, for which batches other
    than a causal language model's have labels.
    bound: whether to prove for every layer how far from the optimum its answer is at most (LayerReport.gap); it can
    take several times as long as pruning.
    batch_norm: whether running statistics are estimated again on the calibration data (models.batchnorm), where there
    are any; the report's recipe says so.
    on_layer: called after each layer with its report and the number of layers in all, trials included.

    A transformer's blocks, or the parts that a model can be cut into (models.cut), take their turns: inputs come from
    the model with its earlier parts pruned, gradients from the dense model. Left alone by default are embeddings,
    what a transformers model has on top of its base model, and all that lies outside a transformer's blocks.
    Weights keep their dtype; everything is computed in float32 or better. If it fails, the weights are as they were.
    """
    solver = ADMM() if solver is None else solver
    _check(objective, solver, factors)
    batches = [moved(batch, _device(model)) for batch in as_batches(calibration)]
    cut = cut_open(model, batches, loss)
    layers = cut.layers()
    patterns = _patterns(cut, layers, pattern, targets, ignore)
    recipe = _Recipe(patterns, solver, factors, dampening_frac, seed, loss, bound)
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
    )
    begin = time.perf_counter()
    chosen = [layers[name] for name in patterns]
    again = batch_norm and bool(running_statistics(model))
    with _restored_on_failure(model, chosen) as restore, evaluating(model):
        trials = len(CANDIDATES) if isinstance(objective, str) else 0
        total = (trials + 1) * len(chosen)

        def advance(layer: LayerReport) -> None:
            if on_layer is not None:
                on_layer(layer, total)

        if isinstance(objective, str):
            fitted, held_out = set_aside(batches, seed)

            def held_out_losses(candidate: Objective) -> Tensor:
                _prune_segments(model, cut, fitted, candidate, replace(recipe, bound=False), advance)
                if again:
                    _reestimate(model, fitted, loss)
                losses = sample_losses(model, held_out, loss)
                restore()
                return losses

            objective, report.trials = choose(CANDIDATES, held_out_losses)
        report.recipe["objective"] = objective.name
        report.layers = _prune_segments(model, cut, batches, objective, recipe, advance)
        if again:
            _reestimate(model, batches, loss)
            report.recipe["batch_norm"] = "estimated again"
    report.seconds = time.perf_counter() - begin
    report.peak_memory = _peak_memory()
    return report


@contextmanager
def _restored_on_failure(model: nn.Module, layers: list[LayerView]) -> Iterator[Callable[[], None]]:
    """Put weights and batch-norm statistics back if what runs inside fails; yields a function that does so any time."""
    originals = [view.matrices() for view in layers]
    statistics = [(buffer, buffer.clone()) for buffer in running_statistics(model)]

    def restore() -> None:
        for view, original in zip(layers, originals, strict=True):
            view.assign(original)
        for buffer, value in statistics:
            buffer.copy_(value)

    try:
        yield restore
    except BaseException:
        restore()
        raise


def _reestimate(model: nn.Module, batches: list[Batch], loss: Loss) -> None:
    with in_float32(held(model)):
        reestimate(model, batches, loss)


def _prune_segments(
    model: nn.Module,
    cut: Cut,
    batches: list[Batch],
    objective: Objective,
    recipe: _Recipe,
    advance: Callable[[LayerReport], None],
) -> dict[str, LayerReport]:
    """Prune every segment's layers by one objective; {layer name: report}."""
    dtype = next(model.parameters()).dtype
    signs = _random_signs(count_samples(batches), recipe.seed)
    needs = frozenset[str]().union(*(term.needs for _, term in objective.weighted_terms))
    replay = cut.replay(model, batches, recipe.loss, bool(needs & {"gradients", "output_gradients"}))
    reports = {}
    for index, (prefix, segment) in enumerate(replay.segments):
        views = {name: view for name, view in layers_of(prefix, segment) if name in recipe.patterns}
        with in_float32(held(segment)):
            statistics = LayerStatistics(views, objective, recipe.factors, signs)
            replay.observe(index, statistics)
            for name, view in views.items():
                reports[name] = _prune_layer(name, view, dtype, statistics.pop(name), objective, recipe)
                advance(reports[name])
            replay.advance(index)
    return reports


def _random_signs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _prune_layer(
    name: str,
    view: LayerView,
    dtype: torch.dtype,
    statistics: list[list[Any]],
    objective: Objective,
    recipe: _Recipe,
) -> LayerReport:
    weights = view.matrices()
    try:
        if view.groups == 1:
            problem = objective.assemble(
                weights[0].to(dtype), statistics[0], dampening_frac=recipe.dampening_frac
            )
        else:
            problem = objective.assemble_groups(
                weights.double(), statistics, dampening_frac=recipe.dampening_frac
            )
        result = solve(problem, recipe.patterns[name], recipe.solver, bound=recipe.bound)
    except ValueError as error:
        error.add_note(f"in layer {name}")
        raise
    view.assign(result.weight.reshape(weights.shape))
    return LayerReport(
        name=name,
        shape=_shape(view),
        pattern=result.pattern,
        sparsity=result.sparsity,
        relative=result.relative,
        terms=result.terms,
        damping=problem.damping,
        status=str(result.status),
        seconds=result.seconds,
        gap=result.gap,
    )


def _shape(view: LayerView) -> tuple[int, int]:
    """Rows and columns of a layer's problem, those of all groups below one another."""
    m, d = view.shape
    return view.groups * m, d


def _check(objective: Objective | str, solver: Solver, factors: int) -> None:
    if objective != "auto" and not isinstance(objective, Objective):
        raise TypeError(
            f'objective must be "auto" or such as 0.7 * Reconstruction() + 0.3 * Fisher(), got {objective!r}'
        )
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(f"solver must be an instance such as moonshot.ADMM(), got {solver!r}")
    if not isinstance(factors, int) or factors < 1:
        raise ValueError(f"factors must be a positive integer, got {factors!r}")


def _patterns(
    cut: Cut,
    layers: dict[str, LayerView],
    pattern: PatternLike | Mapping[str, PatternLike],
    targets: str | Iterable[str] | None,
    ignore: str | Iterable[str],
) -> dict[str, Pattern]:
    """{layer name: pattern}, checked against every layer's shape before anything is pruned."""
    if isinstance(pattern, Mapping):
        if unknown := [name for name in pattern if name not in layers]:
            raise TargetError(
                f"no such layer: {', '.join(unknown)}; layers are {', '.join(list(layers)[:4])}, ..."
            )
        names = select(list(pattern), targets, ignore)
        patterns = {name: as_pattern(pattern[name]) for name in names}
    else:
        one = as_pattern(pattern)
        names = [name for name in layers if targets is not None or name not in cut.heads]
        patterns = {name: one for name in select(names, targets, ignore)}
    if unreached := [name for name in patterns if name in cut.unreached]:
        raise ModelError(
            f"no calibration sample reached {', '.join(unreached)}: leave them out with ignore={unreached}"
        )
    for name, chosen in patterns.items():
        try:
            chosen.validate(_shape(layers[name]))
            _check_channels(chosen, layers[name])
        except ValueError as error:
            error.add_note(f"in layer {name}")
            raise
    return patterns


def _check_channels(pattern: Pattern, view: LayerView) -> None:
    """Groups of an N:M pattern must stay within one position of a convolution's kernel."""
    if not hasattr(pattern, "groups"):
        return
    size, _ = pattern.groups(_shape(view))
    if size < view.shape[1] and view.channels % size:
        raise PatternError(
            f"{pattern} needs input channels divisible by {size}, the layer has {view.channels}: "
            "leave it out with ignore, or give it a pattern of its own"
        )


def _versions() -> dict[str, str]:
    packages = ("moonshot", "torch", "transformers", "numpy", "scipy", "numba")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _peak_memory() -> int:
    """Bytes this process held at most, by the operating system's own count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
