"""`allocate`: a model-wide sparsity, spent in the layers where it costs the model least."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moonshot import budgets
from moonshot.auto import DEFAULT_OBJECTIVE
from moonshot.choosing import choose
from moonshot.evaluation import mean_loss, sample_losses
from moonshot.layerwise import (
    LayerProblems,
    Recipe,
    check_fit,
    check_reached,
    chosen_layers,
    in_layer,
    problem_shape,
    problems,
)
from moonshot.models.batchnorm import estimate_in_one_pass
from moonshot.models.blocks import Loss, evaluating, held, in_float32
from moonshot.models.calibration import Batch, as_batches, model_loss, moved, set_aside, tokens_at_once
from moonshot.models.cut import cut_open
from moonshot.models.layers import LayerView
from moonshot.models.restoring import restored_on_failure
from moonshot.models.scratch import Scratch
from moonshot.objectives import Objective
from moonshot.patterns import Pattern, PatternError, Unstructured, as_pattern
from moonshot.problem import Problem
from moonshot.pruning import PatternLike, check_method, device_of, prune
from moonshot.report import Trial
from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Solver, solve

_SPARSER, _DENSER = 6, 20  # steps from the even budget, each sqrt(2) times fewer or more weights kept
_RELATIVE = "relative objective"

OnStep = Callable[[str, int], None]


@dataclass(frozen=True)
class LayerBudget:
    """What a layer gets.

    curve: (sparsity, F / F(0)) of every choice it had, on the dense model's statistics.
    """

    shape: tuple[int, int]
    pattern: Pattern
    curve: list[tuple[float, float]]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the layer."""
        return self.pattern.zeros(self.shape) / math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Allocation(Mapping[str, Pattern]):
    """A pattern for each layer: what `prune` takes as its pattern.

    budget: the name of the trial that it comes from; trials: all that were compared, the even budget first.
    """

    layers: dict[str, LayerBudget]
    budget: str
    trials: list[Trial] = field(default_factory=list)

    def __getitem__(self, name: str) -> Pattern:
        return self.layers[name].pattern

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all layers."""
        sizes = [math.prod(layer.shape) for layer in self.layers.values()]
        zeros = [layer.pattern.zeros(layer.shape) for layer in self.layers.values()]
        return sum(zeros) / sum(sizes)

    def __str__(self) -> str:
        width = max(5, *(len(name) for name in self.layers))
        lines = [f"{'layer':{width}}  {'shape':>13}  {'zeros %':>7}  pattern"]
        lines += [
            f"{name:{width}}  {layer.shape[0]:>5} x {layer.shape[1]:<5}  {100 * layer.sparsity:7.2f}  {layer.pattern}"
            for name, layer in self.layers.items()
        ]
        lines += [str(trial) for trial in self.trials]
        lines.append(f"{len(self)} layers, {100 * self.sparsity:.2f} % zeros, budget: {self.budget}")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """A bar for each layer, its share of kept weights on a logarithmic scale, and a line at their mean; as PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(6, 1 + 0.18 * len(self)))
        axis.barh(list(self), [100 * (1 - layer.sparsity) for layer in self.layers.values()])
        axis.axvline(100 * (1 - self.sparsity), color="black", linestyle="--", label="the same everywhere")
        axis.set(xscale="log", xlabel="weights kept, %", title=f"{100 * self.sparsity:g} % zeros")
        axis.tick_params(axis="y", labelsize=7)
        axis.invert_yaxis()
        axis.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


@dataclass(frozen=True)
class _Choice:
    """A layer solved at one pattern. costs: by unit of the curve."""

    pattern: Pattern
    zeros: int
    costs: dict[str, float]
    weight: "_Sparse"


class _Sparse:
    """A matrix as its nonzeros and a bit for each entry, in main memory."""

    def __init__(self, matrix: Tensor):
        kept = matrix != 0
        self._bits = np.packbits(kept.cpu().numpy())
        self._values = matrix[kept].cpu()
        self._shape = matrix.shape

    def dense(self) -> Tensor:
        kept = np.unpackbits(self._bits, count=self._shape.numel()).astype(bool).reshape(self._shape)
        matrix = torch.zeros(self._shape, dtype=self._values.dtype)
        matrix[torch.from_numpy(kept)] = self._values
        return matrix


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
    unreached: Literal["error", "skip"] = "error",
    scratch: Path | None = None,
    on_step: OnStep | None = None,
) -> Allocation:
    """Patterns with a fraction `sparsity` of zeros over all layers together, for `prune`; the model stays as it is.

    patterns: what each layer can have, such as ["1:4", "2:4", 0]; those that do not fit a layer are not offered to it.
    By default any fraction of zeros, from a grid that is geometric in the weights kept.
    rounds: how often the layers' curves are weighed by the model's true loss (budgets.measured), 2 passes a layer each.
    unreached: as in `prune`; layers that are skipped have no part in the budget.
    on_step: called with what was just done and the number of steps in all, at most.
    The other arguments are those of `prune`.

    A quarter of the samples is set aside. On the rest every layer is solved at every choice, as if it alone were
    pruned, which gives its loss as a curve. The curves are handed out (budgets.hand_out) in several units, the answers
    kept so far are put into the model to find the best by its true loss, and measured further. At last the model is
    really pruned with an even budget, the best unit's and the measured one, and they are compared on the samples set
    aside: another replaces the even one only where it gains more than noise (choosing.choose).

    Memory: the nonzeros of all choices, at most 3.4 times the model, and a bit for each weight and choice.
    Raises what `prune` raises, and BudgetError where the choices cannot have that many zeros.
    """
    solver = ADMM() if solver is None else solver
    check_method(objective, solver, unreached)
    if isinstance(objective, str):
        raise TypeError('budgets are compared for one objective: name it, prune can choose another by "auto"')
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be 0 or a positive integer, got {rounds!r}")
    even = _even_pattern(sparsity)
    recipe = Recipe(factors, dampening_frac, seed, loss, scratch)
    batches = [moved(batch, device_of(model)) for batch in as_batches(calibration, tokens_at_once(model))]
    fitted, held_out = set_aside(batches, seed)
    cut = cut_open(model, batches, loss)
    layers = cut.layers()
    names = chosen_layers(cut, targets, ignore)
    if unreached == "error":
        check_reached(cut, names)
    views = {name: layers[name] for name in names if name not in cut.unreached}
    menus = {name: _menu(name, view, even, patterns) for name, view in views.items()}
    total = sum(even.zeros(problem_shape(view)) for view in views.values())
    budgets.check_total([[zeros for zeros, _ in menu] for menu in menus.values()], total)
    units = 1 + len(objective.weighted_terms)
    steps = len(views) * (4 + 2 * rounds) + 1 + units * (1 + 3 * rounds)

    def advance(what: str) -> None:
        if on_step is not None:
            on_step(what, steps)

    with restored_on_failure(model, views.values(), Scratch(scratch)) as restore, evaluating(model):
        walk = problems(model, cut, views, fitted, [objective], recipe)
        offer = _Offer(views, _solved(walk, menus, solver, advance), total, exact=patterns is None)
        with in_float32(held(model)):
            candidates = _candidates(offer, _Stored(offer, model, fitted, loss, advance), rounds)
        restore()

        def held_out_losses(choices: list[int]) -> Tensor:
            prune(
                model,
                fitted,
                offer.patterns(choices),
                objective=objective,
                solver=solver,
                factors=factors,
                dampening_frac=dampening_frac,
                seed=seed,
                loss=loss,
                scratch=scratch,
                on_layer=lambda layer, _: advance(layer.name),
            )
            with in_float32(held(model)):
                losses = sample_losses(model, held_out, loss)
            restore()
            return losses

        best, trials = choose(candidates, held_out_losses)
    return Allocation(offer.budgets(candidates[best]), best, trials)


def _even_pattern(sparsity: PatternLike) -> Unstructured:
    pattern = as_pattern(sparsity)
    if not isinstance(pattern, Unstructured):
        raise TypeError(
            f'sparsity is a fraction of zeros, such as 0.7 or "70%", got {sparsity!r}: what layers may choose from '
            "goes to patterns"
        )
    return Unstructured(pattern.sparsity)


def _menu(
    name: str, view: LayerView, even: Unstructured, patterns: Sequence[PatternLike] | None
) -> list[tuple[int, Pattern]]:
    """(zeros, pattern) of what a layer can have, the densest first, no two with as many zeros."""
    if patterns is None:
        kept = 1 - even.sparsity
        grid = {min(kept * 2 ** (k / 2), 1.0) for k in range(-_SPARSER, _DENSER + 1)} | {1.0}
        offered: list[Pattern] = [Unstructured(1 - share) for share in grid]
    else:
        offered = [as_pattern(pattern) for pattern in patterns]
    fitting: dict[int, Pattern] = {}
    refused: list[str] = []
    for pattern in offered:
        try:
            check_fit(name, view, pattern)
        except PatternError as error:
            refused.append(str(error))
        else:
            fitting.setdefault(pattern.zeros(problem_shape(view)), pattern)
    if not fitting:
        raise PatternError(f"{name} can have none of the patterns: {'; '.join(refused) or 'there are none'}")
    return sorted(fitting.items(), key=lambda choice: choice[0])


def _solved(
    layers: Generator[LayerProblems],
    menus: dict[str, list[tuple[int, Pattern]]],
    solver: Solver,
    advance: Callable[[str], None],
) -> dict[str, list[_Choice]]:
    """Every layer solved at every choice, the other layers dense."""
    solved = {}
    with closing(layers):
        for layer in layers:
            solved[layer.name] = _choices(layer, menus[layer.name], solver)
            advance(layer.name)
    return solved


def _choices(layer: LayerProblems, menu: list[tuple[int, Pattern]], solver: Solver) -> list[_Choice]:
    (problem,) = layer.problems
    state = solver.init(problem)
    return [_choice(layer.name, problem, zeros, pattern, solver, state) for zeros, pattern in menu]


def _choice(name: str, problem: Problem, zeros: int, pattern: Pattern, solver: Solver, state: Any) -> _Choice:
    with in_layer(name):
        result = solve(problem, pattern, solver, state=state)
    costs = {_RELATIVE: result.relative}
    costs |= {term.name: result.terms[term.name] * term.at_zero for term in problem.terms}
    return _Choice(pattern, zeros, costs, _Sparse(result.weight))


@dataclass(frozen=True)
class _Offer:
    """What every layer can have, and how many zeros all must have together.

    exact: whether a layer can have any number of zeros, its choices being points of a grid.
    """

    views: dict[str, LayerView]
    choices: dict[str, list[_Choice]]
    total: int
    exact: bool

    @property
    def zeros(self) -> list[list[int]]:
        return [[choice.zeros for choice in choices] for choices in self.choices.values()]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(problem_shape(view)) for view in self.views.values()]

    @property
    def units(self) -> list[str]:
        return list(next(iter(self.choices.values()))[0].costs)

    def costs(self, unit: str) -> list[list[float]]:
        return [[choice.costs[unit] for choice in choices] for choices in self.choices.values()]

    def patterns(self, answer: list[int]) -> dict[str, Pattern]:
        chosen = [choices[k] for choices, k in zip(self.choices.values(), answer, strict=True)]
        if not self.exact:
            return {name: choice.pattern for name, choice in zip(self.choices, chosen, strict=True)}
        zeros = budgets.exact([choice.zeros for choice in chosen], self.sizes, self.total)
        return {
            name: Unstructured(z / size) for name, z, size in zip(self.choices, zeros, self.sizes, strict=True)
        }

    def budgets(self, answer: list[int]) -> dict[str, LayerBudget]:
        layers = {}
        for (name, pattern), size in zip(self.patterns(answer).items(), self.sizes, strict=True):
            shape = problem_shape(self.views[name])
            curve = [(choice.zeros / size, choice.costs[_RELATIVE]) for choice in self.choices[name]]
            layers[name] = LayerBudget(shape, pattern, curve)
        return layers


class _Stored:
    """A model with its layers' answers put in, to see its loss without solving anything again."""

    def __init__(
        self, offer: _Offer, model: nn.Module, batches: list[Batch], loss: Loss, advance: Callable[[str], None]
    ):
        self._offer, self._model, self._batches, self._loss = offer, model, batches, loss
        self._advance = advance
        self._now: list[int | None] = [None] * len(offer.views)

    def loss(self, answer: list[int]) -> float:
        """The mean loss on the batches, batch norms estimated on them; infinite where it is NaN."""
        for layer, (name, view) in enumerate(self._offer.views.items()):
            if self._now[layer] != answer[layer]:
                weight = self._offer.choices[name][answer[layer]].weight.dense()
                view.assign_rows(weight)
        self._now = list(answer)
        estimate_in_one_pass(self._model, self._batches, self._loss)
        value = mean_loss(self._model, self._batches, self._loss)
        self._advance(f"loss {value:.4f}")
        return value if math.isfinite(value) else math.inf


def _candidates(offer: _Offer, stored: _Stored, rounds: int) -> dict[str, list[int]]:
    """The even budget, the best of those that come from a unit of the curves, and what measuring finds from there."""
    zeros, curves = offer.zeros, {unit: offer.costs(unit) for unit in offer.units}
    even = budgets.even(zeros, offer.sizes, offer.total)
    found = {unit: budgets.hand_out(zeros, costs, offer.total) for unit, costs in curves.items()}
    losses = {unit: stored.loss(answer) for unit, answer in found.items()}
    best = min(losses, key=losses.__getitem__)
    start = min((stored.loss(even), even), (losses[best], found[best]))
    measured = budgets.measured(*start, zeros, list(curves.values()), offer.total, stored.loss, rounds)
    candidates = {"even": even, best: found[best], "measured": measured}
    return {
        name: answer
        for k, (name, answer) in enumerate(candidates.items())
        if answer not in list(candidates.values())[:k]
    }
