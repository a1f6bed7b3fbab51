"""`prune`: a model, block by block, in place."""

import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.models.blocks import Chain, evaluating, find_blocks, in_float32, linear_layers
from moonshot.models.calibration import as_batches, language_model_loss
from moonshot.models.replay import BlockStatistics, block_gradients, observe_block
from moonshot.models.targets import TargetError, select
from moonshot.objectives import Fisher, Objective, Reconstruction
from moonshot.patterns import Pattern, as_pattern
from moonshot.report import LayerReport, Report
from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Solver, solve

DEFAULT_OBJECTIVE = 0.6 * Reconstruction() + 0.4 * Fisher()

PatternLike = Pattern | str | float
Loss = Callable[[nn.Module, Any], Tensor]


def prune(
    model: nn.Module,
    calibration: Any,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    objective: Objective = DEFAULT_OBJECTIVE,
    solver: Solver | None = None,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    factors: int = 16,
    dampening_frac: float = 0.01,
    seed: int = 0,
    loss: Loss = language_model_loss,
    on_layer: Callable[[LayerReport, int], None] | None = None,
) -> Report:
    """Prune the Linear layers of a decoder's blocks in place, and say how good every layer's answer is.

    calibration: token ids (samples, tokens), a list of batches, or a DataLoader (models.calibration.as_batches).
    pattern: one for all layers, or {layer name: pattern} for those to prune.
    targets, ignore: names, globs or `re:` expressions of layers (models.targets.select).
    factors: per-sample gradients are reduced to this many by random signs, without bias, for terms that need them.
    seed: of the signs; the same seed gives the same model.
    loss: (model, batch) -> scalar, the mean over the batch; the model's own next-token loss by default.
    on_layer: called after each layer with its report and the number of layers in all.

    Inputs come from the model with its earlier blocks pruned, gradients from the dense model. Weights keep
    their dtype; everything is computed in float32 or better. If it fails, the weights are as they were before.
    """
    solver = ADMM() if solver is None else solver
    _check(objective, solver, factors)
    batches = as_batches(calibration)
    blocks = find_blocks(model)
    patterns = _patterns(model, blocks, pattern, targets, ignore)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    device = next(model.parameters()).device
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, (samples,), generator=generator) * 2.0 - 1.0).to(device)
    report = Report(
        recipe={
            "pattern": str(pattern) if not isinstance(pattern, Mapping) else "per layer",
            "objective": objective.name,
            "solver": repr(solver),
            "samples": samples,
            "tokens": sum(batch["input_ids"].numel() for batch in batches),
            "factors": factors,
            "dampening_frac": dampening_frac,
            "seed": seed,
        },
        versions=_versions(),
    )
    begin = time.perf_counter()
    originals = {
        name: layer.weight.detach().clone() for name, layer in linear_layers(blocks).items() if name in patterns
    }
    try:
        with evaluating(model):
            _prune_blocks(
                model,
                blocks,
                batches,
                patterns,
                objective,
                solver,
                factors,
                dampening_frac,
                signs,
                loss,
                report,
                on_layer,
            )
    except BaseException:
        for name, layer in linear_layers(blocks).items():
            if name in originals:
                layer.weight.data.copy_(originals[name])
        raise
    report.seconds = time.perf_counter() - begin
    report.peak_memory = _peak_memory()
    return report


def _prune_blocks(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    batches: list[dict[str, Tensor]],
    patterns: dict[str, Pattern],
    objective: Objective,
    solver: Solver,
    factors: int,
    dampening_frac: float,
    signs: Tensor,
    loss: Loss,
    report: Report,
    on_layer: Callable[[LayerReport, int], None] | None,
) -> None:
    dtype = next(model.parameters()).dtype
    chain = Chain(model, [block for _, block in blocks], loss)
    entered = [chain.enter(batch) for batch in batches]
    pruned = [hidden.to(dtype) for hidden, _ in entered]
    calls = [call for _, call in entered]
    needs = frozenset[str]().union(*(term.needs for _, term in objective.weighted_terms))
    gradients = None
    dense: list[Tensor] = []
    if needs & {"gradients", "output_gradients"}:
        gradients = block_gradients(chain, batches, list(pruned), calls)
        dense = list(pruned)
    for index, (prefix, block) in enumerate(blocks):
        layers = {name: layer for name, layer in linear_layers([(prefix, block)]).items() if name in patterns}
        with in_float32(list(block.parameters())):
            statistics = BlockStatistics(layers, objective, factors, len(signs))
            at_output = None if gradients is None else gradients[index]
            observe_block(chain, index, statistics, batches, calls, pruned, dense, at_output, signs)
            if gradients is not None:
                gradients[index] = []
            for name, layer in layers.items():
                _prune_layer(
                    name,
                    layer,
                    dtype,
                    statistics.pop(name),
                    patterns[name],
                    objective,
                    solver,
                    dampening_frac,
                    report,
                )
                if on_layer is not None:
                    on_layer(report.layers[name], len(patterns))
            with torch.no_grad():
                for b, hidden in enumerate(pruned):
                    pruned[b] = chain.run(index, hidden, calls[b][index]).to(dtype)


def _prune_layer(
    name: str,
    layer: nn.Linear,
    dtype: torch.dtype,
    statistics: list[Any],
    pattern: Pattern,
    objective: Objective,
    solver: Solver,
    dampening_frac: float,
    report: Report,
) -> None:
    weight = layer.weight.detach()
    try:
        problem = objective.assemble(weight.to(dtype), statistics, dampening_frac=dampening_frac)
        result = solve(problem, pattern, solver)
    except ValueError as error:
        error.add_note(f"in layer {name}")
        raise
    layer.weight.data.copy_(result.weight)
    report.layers[name] = LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        pattern=result.pattern,
        sparsity=result.sparsity,
        relative=result.relative,
        terms=result.terms,
        damping=problem.damping,
        status=str(result.status),
        seconds=result.seconds,
    )


def _check(objective: Objective, solver: Solver, factors: int) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be such as 0.7 * Reconstruction() + 0.3 * Fisher(), got {objective!r}")
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(f"solver must be an instance such as moonshot.ADMM(), got {solver!r}")
    if not isinstance(factors, int) or factors < 1:
        raise ValueError(f"factors must be a positive integer, got {factors!r}")


def _patterns(
    model: nn.Module,
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
