"""`allocate`: a model-wide sparsity, spent in the layers where it costs the model least."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moonshot.errors import ArgumentError, ArgumentTypeError
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern, PatternError, Unstructured, as_pattern
from moonshot.layer.problem import Problem
from moonshot.models.adapter import Adapter
from moonshot.models.batchnorm import estimate_in_one_pass
from moonshot.models.calibration import Batch, count_samples, own_batches, set_aside
from moonshot.models.in_turn import passes_of
from moonshot.models.layer_view import LayerView
from moonshot.models.losses import Loss, loss_of, mean_loss, model_loss, sample_losses
from moonshot.models.modules import evaluating
from moonshot.models.offload import Offload
from moonshot.models.partition import partition_model
from moonshot.models.precision import passing
from moonshot.models.ranks import Ranks, current
from moonshot.models.restore import restored_on_failure
from moonshot.models.settings import with_model_ready
from moonshot.models.statistics import LayerStatistics
from moonshot.pruning import budgets
from moonshot.pruning.allocation import Allocation
from moonshot.pruning.calibration_pass import CalibrationPass, Part, in_layer
from moonshot.pruning.choices import RELATIVE, Choice, Offer, SparseMatrix, menu
from moonshot.pruning.layer_patterns import PatternLike, refuse_unfit, unreached_layers
from moonshot.pruning.prune import prune_by
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE, OnProgress, Recipe, unheard
from moonshot.pruning.refit import Refit
from moonshot.pruning.selection import best_on_held_out
from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Solver, solve

OnStep = Callable[[str, int], None]

_ALONE = 64  # layers, up to which each is measured by itself


@with_model_ready
def allocate(
    model: nn.Module,
    calibration: Any,
    sparsity: float,
    *,
    objective: Objective = DEFAULT_OBJECTIVE,
    solver: Solver | None = None,
    patterns: Sequence[PatternLike] | None = None,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    factors: int = 16,
    dampening_frac: float = 0.01,
    seed: int = 0,
    loss: Loss = model_loss,
    rounds: int = 2,
    refit: bool | Refit = False,
    unreached: Literal["error", "skip"] = "error",
    unfit: Literal["error", "skip"] = "error",
    scratch: Path | None = None,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
    precision: Literal["model", "float32"] | None = None,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> Allocation:
    """Patterns with a fraction `sparsity` of zeros over all layers together, for `prune`; the model stays as it is.

    sparsity: the fraction of zeros, 0 to 1, or text such as "80%".
    patterns: what each layer can have, such as ["1:4", "2:4", 0]; those that do not fit a layer are not offered to it.
    By default any fraction of zeros, from a grid that is geometric in the weights kept.
    rounds: how often the layers' curves are weighed by the model's true loss (budgets.measured), 2 passes a layer each;
    of more than 64 layers, 2 passes for each part of the model and each name of a layer within its part.
    refit: as in `prune`, for the prunings at the end that the budgets are compared by.
    unreached, unfit: as in `prune`; the budget is that of the layers that are not skipped.
    on_step: called with what was just done and the number of steps in all, at most.
    on_progress: called in between, while gradients are gathered, as in `prune`.
    model, calibration, objective, solver, targets, ignore, factors, dampening_frac, seed, loss, scratch, adapter,
    device, precision: as in `prune`.

    A quarter of the samples is set aside. On the rest every layer is solved at every choice, as if it alone were
    pruned, which gives its loss as a curve. The curves are handed out (budgets.hand_out) in several units, the answers
    found so far are put into the model to find the best by its true loss, and measured further. At last the model is
    really pruned with an even budget, the best unit's and the measured one, and they are compared on the samples set
    aside: another replaces the even one only where it gains more than noise, which chance alone does in 5 % of all
    cases at most (selection.best_on_held_out).

    Memory: the nonzeros of all choices, at most 3.4 times the model, and a bit for each weight and choice.
    Raises what `prune` raises, and BudgetError where the choices cannot have that many zeros, or that few.
    """
    solver, ranks = ADMM() if solver is None else solver, current()
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
        on_progress=on_progress if on_progress and ranks.is_first else unheard,
    )
    if isinstance(objective, str):
        raise ArgumentTypeError(
            'budgets are compared for one objective: name it, prune can choose another by "auto"'
        )
    if isinstance(patterns, str | Pattern) or not isinstance(patterns, Iterable | None):
        raise ArgumentTypeError(f'patterns are several to choose from, such as ["2:4", 0], got {patterns!r}')
    patterns = None if patterns is None else [as_pattern(pattern) for pattern in patterns]
    if not isinstance(rounds, int) or rounds < 0:
        raise ArgumentError(f"rounds must be 0 or a positive integer, got {rounds!r}")
    even = _even_pattern(sparsity)
    with passing(recipe.passes(model)):
        return _allocated(recipe, model, calibration, even, patterns, rounds, refit, on_step, ranks)


def _allocated(
    recipe: Recipe,
    model: nn.Module,
    calibration: Any,
    even: Unstructured,
    patterns: Sequence[PatternLike] | None,
    rounds: int,
    refit: bool | Refit,
    on_step: OnStep | None,
    ranks: Ranks,
) -> Allocation:
    objective: Any = recipe.objective
    loss, solver = recipe.loss, recipe.solver
    batches, unused = recipe.batches(model, calibration)
    fitted, held_out = set_aside(batches, recipe.seed)
    partition = partition_model(model, batches, loss, recipe.adapter)
    layers = partition.layers()
    names = partition.select(recipe.targets, recipe.ignore)
    if recipe.unreached == "error":
        partition.check_reached(names)
    views = {name: layers[name] for name in names if name not in partition.unreached}
    menus, unfitting = _menus(views, even, patterns, recipe)
    skipped = partition.skipped(recipe.targets, recipe.ignore) | unreached_layers(partition, names) | unfitting
    views = {name: view for name, view in views.items() if name in menus}
    total = sum(even.zeros(view.problem_shape) for view in views.values())
    zeros = [[zeros for zeros, _ in offered] for offered in menus.values()]
    budgets.check_total(zeros, total)
    budgets.check_densest(zeros, total)
    groupings = _groupings(list(views), [name for name, _ in partition.parts])
    units = 1 + len(objective.weighted_terms)
    steps = 4 * len(views) + 1 + units + rounds * (2 * sum(map(len, groupings)) + 3 * units)

    def advance(what: str) -> None:
        if on_step is not None and ranks.is_first:
            on_step(what, steps)

    offload = Offload(recipe.scratch, to_host=recipe.device is not None)
    with restored_on_failure(model, views.values(), offload) as restore, evaluating(model):
        calibrated = CalibrationPass(model, partition, views, fitted, [objective], recipe, ranks=ranks)
        offer = Offer(views, _solved(calibrated, menus, solver, advance, ranks), total, exact=patterns is None)
        del calibrated  # the hidden states it has offloaded
        parts = [part for _, part in partition.parts]
        with passes_of(model, parts):
            candidates = _candidates(
                offer,
                _PrunedModel(offer, model, fitted, partial(loss_of, loss), advance, ranks),
                rounds,
                groupings,
            )
        restore()

        def held_out_losses(choices: list[int]) -> Tensor:
            prune_by(
                replace(recipe, targets=None, ignore=()),
                model,
                fitted,
                offer.patterns(choices),
                refit=refit,
                on_layer=lambda layer, _: advance(layer.name),
            )
            with passes_of(model, parts):
                losses = sample_losses(model, own_batches(ranks, held_out), partial(loss_of, loss))
            restore()
            return torch.cat(ranks.gather(losses))

        best, trials = best_on_held_out(candidates, held_out_losses)
        ranks.gather(None)  # all have come this far: none has to put its model back
    return Allocation(offer.budgets(candidates[best]), best, trials, skipped, unused)


def _even_pattern(sparsity: PatternLike) -> Unstructured:
    pattern = as_pattern(sparsity)
    if not isinstance(pattern, Unstructured):
        raise ArgumentTypeError(
            f'sparsity is a fraction of zeros, such as 0.7 or "70%", got {sparsity!r}: what layers may choose from '
            "goes to patterns (--choice)"
        )
    return Unstructured(pattern.sparsity)


def _menus(
    views: dict[str, LayerView],
    even: Unstructured,
    patterns: Sequence[PatternLike] | None,
    recipe: Recipe,
) -> tuple[dict[str, list[tuple[int, Pattern]]], dict[str, str]]:
    """What each layer can have, and why those that can have nothing are skipped."""
    menus, reasons = {}, {}
    for name, view in views.items():
        try:
            menus[name] = menu(view, even, patterns)
        except PatternError as error:
            reasons[name] = str(error)
    refuse_unfit(reasons, len(views), recipe.unfit)
    return menus, reasons


def _solved(
    calibration: CalibrationPass,
    menus: dict[str, list[tuple[int, Pattern]]],
    solver: Solver,
    advance: Callable[[str], None],
    ranks: Ranks,
) -> dict[str, list[Choice]]:
    """Every layer solved at every choice, the other layers dense."""
    solved: dict[str, list[Choice]] = {}
    for part in calibration.parts:
        owners = calibration.owners(part)
        with calibration.observed(part, owners=owners) as statistics:

            def choices(name: str, part: Part = part, statistics: LayerStatistics = statistics) -> list[Choice]:
                (problem,) = calibration.problems(name, part.layers[name], statistics)
                return _choices(name, problem, menus[name], solver)

            for name, found in ranks.deal(owners, choices, part.device):
                solved[name] = found
                advance(name)
    return solved


def _choices(name: str, problem: Problem, menu: list[tuple[int, Pattern]], solver: Solver) -> list[Choice]:
    state = solver.init(problem)
    return [_choice(name, problem, zeros, pattern, solver, state) for zeros, pattern in menu]


def _choice(name: str, problem: Problem, zeros: int, pattern: Pattern, solver: Solver, state: Any) -> Choice:
    with in_layer(name):
        result = solve(problem, pattern, solver, state=state)
    costs = {RELATIVE: result.relative}
    costs |= {term.name: result.terms[term.name] * term.at_zero for term in problem.terms}
    return Choice(pattern, zeros, costs, SparseMatrix.of(result.weight))


class _PrunedModel:
    """A model with its layers' answers put in, to see its loss without solving anything again."""

    def __init__(
        self,
        offer: Offer,
        model: nn.Module,
        batches: list[Batch],
        loss: Loss,
        advance: Callable[[str], None],
        ranks: Ranks,
    ):
        self._offer, self._model, self._loss = offer, model, loss
        self._batches, self._samples = own_batches(ranks, batches), count_samples(batches)
        self._advance, self._ranks = advance, ranks
        self._now: list[int | None] = [None] * len(offer.views)

    def loss(self, answer: list[int]) -> float:
        """The mean loss on the batches, batch norms estimated on them; infinite where it is NaN."""
        for layer, (name, view) in enumerate(self._offer.views.items()):
            if self._now[layer] != answer[layer]:
                weight = self._offer.choices[name][answer[layer]].weight.dense()
                view.assign_rows(weight)
        self._now = list(answer)
        estimate_in_one_pass(self._model, self._batches, self._loss, self._ranks)
        own = mean_loss(self._model, self._batches, self._loss) * count_samples(self._batches)
        value = sum(self._ranks.gather(own)) / self._samples
        self._advance(f"loss {value:.4f}")
        return value if math.isfinite(value) else math.inf


def _groupings(names: Sequence[str], parts: Sequence[str]) -> list[budgets.Groups]:
    """How layers are measured: each alone, or where those are many by part of the model and by name within it."""
    if len(names) <= _ALONE:
        return [[[layer] for layer in range(len(names))]]
    by_part: dict[str, list[int]] = {}
    by_role: dict[str, list[int]] = {}
    for layer, name in enumerate(names):
        part = next((part for part in parts if name.startswith(f"{part}.")), name)
        by_part.setdefault(part, []).append(layer)
        by_role.setdefault(name.removeprefix(f"{part}."), []).append(layer)
    return [list(by_part.values()), list(by_role.values())]


def _candidates(
    offer: Offer, pruned: _PrunedModel, rounds: int, groupings: Sequence[budgets.Groups]
) -> dict[str, list[int]]:
    """The even budget, the best of those that come from a unit of the curves, and what measuring finds from there."""
    zeros, curves = offer.zeros, {unit: offer.costs(unit) for unit in offer.units}
    even = budgets.even(zeros, offer.sizes, offer.total)
    found = {unit: budgets.hand_out(zeros, costs, offer.total) for unit, costs in curves.items()}
    losses = {unit: pruned.loss(answer) for unit, answer in found.items()}
    best = min(losses, key=losses.__getitem__)
    start = min((pruned.loss(even), even), (losses[best], found[best]))
    measured = budgets.measured(
        *start, zeros, list(curves.values()), offer.total, pruned.loss, rounds, groupings
    )
    candidates = {"even": even, best: found[best], "measured": measured}
    return {
        name: answer
        for k, (name, answer) in enumerate(candidates.items())
        if answer not in list(candidates.values())[:k]
    }
