"""The layers of a model as pruning problems, one after the other: what `prune` solves and `allocate` compares."""

from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moonshot.front import fronts
from moonshot.models.blocks import Loss, ModelError, held, in_float32
from moonshot.models.calibration import Batch, count_samples
from moonshot.models.cut import Cut
from moonshot.models.layers import LayerView, layers_of
from moonshot.models.scratch import Scratch
from moonshot.models.statistics import LayerStatistics
from moonshot.models.targets import select
from moonshot.objectives import Objective, quadratics_of, quadratics_of_groups
from moonshot.patterns import Pattern, PatternError
from moonshot.problem import Problem


@dataclass(frozen=True)
class Recipe:
    """How every layer's statistics are computed and become a problem.

    factors: per-sample gradients are reduced to this many by random signs, whose seed is `seed`.
    scratch: the folder for a file of all that waits for its turn, which is in memory otherwise.
    """

    factors: int
    dampening_frac: float
    seed: int
    loss: Loss
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.factors, int) or self.factors < 1:
            raise ValueError(f"factors must be a positive integer, got {self.factors!r}")


class LayerProblems(NamedTuple):
    """problems: one for each objective, made as they are asked for; tokens: how many rows of inputs they are of.

    A layer that is done has neither.
    """

    name: str
    view: LayerView
    problems: Iterator[Problem]
    tokens: int


def problems(
    model: nn.Module,
    cut: Cut,
    names: Iterable[str],
    batches: list[Batch],
    objectives: Sequence[Objective],
    recipe: Recipe,
    done: Container[str] = (),
) -> Generator[LayerProblems]:
    """The problems of the layers with these names, in the order in which the model runs, by one or more objectives.

    Whatever is assigned to a layer before the next one is asked for is what later layers' inputs come from;
    gradients are those of the model as it was. A segment is in float32 while its layers are given out, so close the
    generator where it is not run to its end (contextlib.closing). A problem's weight has the model's dtype. It can be
    large: let go of it before asking for the next. Layers that are `done` take their turns without one.
    """
    dtype = next(model.parameters()).dtype
    wanted = set(names)
    signs = _random_signs(count_samples(batches), recipe.seed)
    union = reduce(add, objectives)
    gradients = bool(union.needed & {"gradients", "output_gradients"})
    replay = cut.replay(model, batches, recipe.loss, gradients, Scratch(recipe.scratch))
    for index, (prefix, segment) in enumerate(replay.segments):
        views = {name: view for name, view in layers_of(prefix, segment) if name in wanted}
        with in_float32(held(segment)):
            open_views = {name: view for name, view in views.items() if name not in done}
            statistics = LayerStatistics(open_views, union, recipe.factors, signs, cut.routed)
            replay.observe(index, statistics)
            for name, view in views.items():
                if name in done:
                    yield LayerProblems(name, view, iter(()), 0)
                    continue
                yield LayerProblems(  # held by nobody here
                    name,
                    view,
                    _of_layer(name, view, dtype, statistics, objectives, recipe.dampening_frac),
                    statistics.tokens[name],
                )
            replay.advance(index)


def _of_layer(
    name: str,
    view: LayerView,
    dtype: torch.dtype,
    statistics: LayerStatistics,
    objectives: Sequence[Objective],
    dampening_frac: float,
) -> Iterator[Problem]:
    by_group, weights = statistics.pop(name), view.matrices()
    with in_layer(name):
        if view.groups == 1:
            weight = weights[0].to(dtype)
            quadratics = quadratics_of(statistics.terms, weight, by_group[0])
        else:
            weights = weights.double()
            weight = weights.flatten(0, 1)
            quadratics = quadratics_of_groups(statistics.terms, weights, by_group)
        if len(objectives) == 1:  # nothing of it is needed once there is a problem
            return iter((objectives[0].weigh(weight, quadratics, dampening_frac),))
    return _noted(name, fronts(objectives, weight, quadratics, dampening_frac))


def _noted(name: str, problems: Iterator[Problem]) -> Iterator[Problem]:
    with in_layer(name):
        yield from problems


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Say in a ValueError which layer it is about."""
    try:
        yield
    except ValueError as error:
        error.add_note(f"in layer {name}")
        raise


def _random_signs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0


def chosen_layers(cut: Cut, targets: str | Iterable[str] | None, ignore: str | Iterable[str]) -> list[str]:
    """The names of the layers to prune; without targets, all but heads and routers.

    Raises TargetError for an expression that matches nothing.
    """
    left_alone = cut.heads | cut.routers
    names = [name for name in cut.layers() if targets is not None or name not in left_alone]
    return select(names, targets, ignore)


def check_reached(cut: Cut, names: Iterable[str]) -> None:
    """Raises ModelError for a layer that no sample reached."""
    if unreached := [name for name in names if name in cut.unreached]:
        raise ModelError(
            f"no calibration sample reached {', '.join(unreached)}: leave them out with ignore={unreached}, or with "
            'unreached="skip"'
        )


def problem_shape(view: LayerView) -> tuple[int, int]:
    """Rows and columns of a layer's problem, those of all groups below one another."""
    m, d = view.shape
    return view.groups * m, d


def check_fit(name: str, view: LayerView, pattern: Pattern) -> None:
    """PatternError where a layer cannot have a pattern.

    Groups of an N:M pattern must stay within one position of a convolution's kernel.
    """
    with in_layer(name):
        pattern.validate(problem_shape(view))
        if not hasattr(pattern, "groups"):
            return
        size, _ = pattern.groups(problem_shape(view))
        if size < view.shape[1] and view.channels % size:
            raise PatternError(
                f"{pattern} needs input channels divisible by {size}, the layer has {view.channels}: "
                "leave it out with ignore, or give it a pattern of its own"
            )
