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
from moonshot.models.blocks import Chain, evaluating, find_blocks, in_float32, linear_layers
from moonshot.models.calibration import Batch, as_batches, count_samples, language_model_loss, set_aside
from moonshot.models.replay import BlockStatistics, block_gradients, observe_block
from moonshot.models.targets import TargetError, select
from moonshot.objectives import Fisher, Objective, Reconstruction, TokenFisher
from moonshot.patterns import Pattern, as_pattern
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
Loss = Callable[[nn.Module, Any], Tensor]
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
    loss: Loss = language_model_loss,
    bound: bool = False,
    on_layer: OnLayer | None = None,
) -> Report:
    """Prune the Linear layers of a decoder's blocks in place, and say how good every layer's answer is.

    calibration: token ids (samples, tokens), a list of batches, or a DataLoader (models.calibration.as_batches).
    pattern: one for all layers, or {layer name: pattern} for those to prune.
    objective: what the layers' answers are judged by; "auto" tries those in CANDIDATES on three quarters of the
    samples and takes the one that does best on the rest (weighting.choose), for seven times the time.
    targets, ignore: names, globs or `re:` expressions of layers (models.targets.select).
    factors: per-sample gradients are reduced to this many by random signs, without bias, for terms that need them.
    seed: of the signs and of the samples set aside; the same seed gives the same model.
    loss: (model, batch) -> scalar, the mean over the batch; the model's own next-token loss by default.
    bound: whether to prove for every layer how far from the optimum its answer is at most (LayerReport.gap); it can
    take several times as long as pruning.
    on_layer: called after each layer with its report and the number of layers in all, trials included.

    Inputs come from the model with its earlier blocks pruned, gradients from the dense model. Weights keep
    their dtype; everything is computed in float32 or better. If it fails, the weights are as they were before.
    """
    solver = ADMM() if solver is None else solver
    _check(objective, solver, factors)
    batches = as_batches(calibration)
    blocks = find_blocks(model)
    patterns = _patterns(blocks, pattern, targets, ignore)
    recipe = _Recipe(patterns, solver, factors, dampening_frac, seed, loss, bound)
    device = next(model.parameters()).device
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    report = Report(
        recipe={
            "pattern": "per layer" if isinstance(pattern, Mapping) else str(pattern),
            "solver": repr(solver),
            "samples": count_samples(batches),
            "tokens": sum(batch["input_ids"].numel() for batch in batches),
            "factors": factors,
            "dampening_frac": dampening_frac,
            "seed": seed,
        },
        versions=_versions(),
    )
    begin = time.perf_counter()
    layers = [layer for name, layer in linear_layers(blocks).items() if name in recipe.patterns]
    with _restored_on_failure(layers) as restore, evaluating(model):
        trials = len(CANDIDATES) if isinstance(objective, str) else 0
        total = (trials + 1) * len(layers)

        def advance(layer: LayerReport) -> None:
            if on_layer is not None:
                on_layer(layer, total)

        if isinstance(objective, str):
            fitted, held_out = set_aside(batches, seed)

            def held_out_losses(candidate: Objective) -> Tensor:
                _prune_blocks(model, blocks, fitted, candidate, replace(recipe, bound=False), advance)
                losses = sample_losses(model, held_out, loss)
                restore()
                return losses

            objective, report.trials = choose(CANDIDATES, held_out_losses)
        report.recipe["objective"] = objective.name
        report.layers = _prune_blocks(model, blocks, batches, objective, recipe, advance)
    report.seconds = time.perf_counter() - begin
    report.peak_memory = _peak_memory()
    return report


@contextmanager
def _restored_on_failure(layers: list[nn.Linear]) -> Iterator[Callable[[], None]]:
    """Put the layers' weights back if what runs inside fails; yields a function that does so at any time."""
    originals = [layer.weight.detach().clone() for layer in layers]

    def restore() -> None:
        for layer, original in zip(layers, originals, strict=True):
            layer.weight.data.copy_(original)

    try:
        yield restore
    except BaseException:
        restore()
        raise


def _prune_blocks(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    batches: list[Batch],
    objective: Objective,
    recipe: _Recipe,
    advance: Callable[[LayerReport], None],
) -> dict[str, LayerReport]:
    """Prune every block's layers by one objective; {layer name: report}."""
    dtype = next(model.parameters()).dtype
    signs = _random_signs(count_samples(batches), recipe.seed).to(batches[0]["input_ids"].device)
    chain = Chain(model, [block for _, block in blocks], recipe.loss)
    entered = [chain.enter(batch) for batch in batches]
    pruned = [hidden.to(dtype) for hidden, _ in entered]
    calls = [call for _, call in entered]
    needs = frozenset[str]().union(*(term.needs for _, term in objective.weighted_terms))
    gradients = None
    dense: list[Tensor] = []
    if needs & {"gradients", "output_gradients"}:
        gradients = block_gradients(chain, batches, list(pruned), calls)
        dense = list(pruned)
    reports = {}
    for index, (prefix, block) in enumerate(blocks):
        layers = {
            name: layer for name, layer in linear_layers([(prefix, block)]).items() if name in recipe.patterns
        }
        with in_float32(list(block.parameters())):
            statistics = BlockStatistics(layers, objective, recipe.factors, len(signs))
            at_output = None if gradients is None else gradients[index]
            observe_block(chain, index, statistics, batches, calls, pruned, dense, at_output, signs)
            if gradients is not None:
                gradients[index] = []
            for name, layer in layers.items():
                reports[name] = _prune_layer(name, layer, dtype, statistics.pop(name), objective, recipe)
                advance(reports[name])
            with torch.no_grad():
                for b, hidden in enumerate(pruned):
                    pruned[b] = chain.run(index, hidden, calls[b][index]).to(dtype)
    return reports


def _random_signs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0


def _prune_layer(
    name: str,
    layer: nn.Linear,
    dtype: torch.dtype,
    statistics: list[Any],
    objective: Objective,
    recipe: _Recipe,
) -> LayerReport:
    weight = layer.weight.detach()
    try:
        problem = objective.assemble(weight.to(dtype), statistics, dampening_frac=recipe.dampening_frac)
        result = solve(problem, recipe.patterns[name], recipe.solver, bound=recipe.bound)
    except ValueError as error:
        error.add_note(f"in layer {name}")
        raise
    layer.weight.data.copy_(result.weight)
    return LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        pattern=result.pattern,
        sparsity=result.sparsity,
        relative=result.relative,
        terms=result.terms,
        damping=problem.damping,
        status=str(result.status),
        seconds=result.seconds,
        gap=result.gap,
    )


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
    blocks: list[tuple[str, nn.Module]],
    pattern: PatternLike | Mapping[str, PatternLike],
    targets: str | Iterable[str] | None,
    ignore: str | Iterable[str],
) -> dict[str, Pattern]:
    """{layer name: pattern}, checked against every layer's shape before anything is pruned."""
    layers = linear_layers(blocks)
    if isinstance(pattern, Mapping):
        if unknown := [name for name in pattern if name not in layers]:
            raise TargetError(
                f"no such layer: {', '.join(unknown)}; layers are {', '.join(list(layers)[:4])}, ..."
            )
        names = select(list(pattern), targets, ignore)
        patterns = {name: as_pattern(pattern[name]) for name in names}
    else:
        one = as_pattern(pattern)
        patterns = {name: one for name in select(layers, targets, ignore)}
    for name, chosen in patterns.items():
        try:
            chosen.validate((layers[name].out_features, layers[name].in_features))
        except ValueError as error:
            error.add_note(f"in layer {name}")
            raise
    return patterns


def _versions() -> dict[str, str]:
    packages = ("moonshot", "torch", "transformers", "numpy", "scipy", "numba")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _peak_memory() -> int:
    """Bytes this process held at most, by the operating system's own count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
