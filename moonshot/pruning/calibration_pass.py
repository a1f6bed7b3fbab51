"""One pass of the calibration data through a model, part by part: from what layers see to their pruning problems."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor, nn

from moonshot.layer.objectives import Objective, quadratics_of, quadratics_of_groups
from moonshot.layer.problem import Problem
from moonshot.layer.weighting_sweep import weighting_sweeps
from moonshot.models.calibration import Batch, batch_samples, count_samples
from moonshot.models.in_turn import InTurn
from moonshot.models.layer_view import LayerView
from moonshot.models.modules import hooked
from moonshot.models.offload import Offload
from moonshot.models.partition import Partition
from moonshot.models.precision import device_of_passes, tensors_of
from moonshot.models.ranks import ALONE, Ranks
from moonshot.models.statistics import LayerStatistics
from moonshot.pruning.by_rows import work
from moonshot.pruning.recipe import OnProgress, Recipe


@dataclass(frozen=True)
class Part:
    """A part of the model, and those of its layers that are wanted, by name.

    others: its other layers; dtypes: of its parameters and buffers, outside of `observed`.
    decoder: whether it returns the decoder's hidden states in an encoder-decoder.
    """

    index: int
    name: str
    module: nn.Module
    layers: dict[str, LayerView]
    others: dict[str, LayerView]
    dtypes: dict[Tensor, torch.dtype]
    decoder: bool

    @property
    def device(self) -> torch.device:
        return next(iter(self.dtypes)).device


class CalibrationPass:
    """Statistics and problems of the layers with these names, by one or more objectives.

    dense: whether what the dense parts return is wanted (Replay.dense_output).
    ranks: each runs its own share of the batches, and has the problems of the layers that it solves.
    parts: all of the model's, in the order in which it runs them. Their turns come one after the other::

        for part in calibration.parts:
            with calibration.observed(part) as statistics:
                for name, layer in part.layers.items():
                    for problem in calibration.problems(name, layer, statistics):
                        ...  # solve it, and put the answer back with layer.assign_rows

    What is assigned to a layer before its part is left is what later parts' inputs come from; gradients are those of
    the model as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        names: Iterable[str],
        batches: list[Batch],
        objectives: Sequence[Objective],
        recipe: Recipe,
        dense: bool = False,
        ranks: Ranks = ALONE,
    ):
        wanted = set(names)
        self._ranks, batches = ranks, partition.batches(model, batches)
        sizes = [batch_samples(batch) for batch in batches]
        own = ranks.share(sizes)
        self._first = sum(sizes[: own.start])
        self._objectives, self._recipe, self._routed = objectives, recipe, partition.routed
        self._union, self._decoder = reduce(add, objectives), partition.decoder
        self._signs = _random_signs(count_samples(batches), recipe.seed)
        gradients = bool(self._union.needed & {"gradients", "output_gradients"})
        offload = Offload(recipe.scratch, to_host=recipe.device is not None)
        own_batches = batches[own.start : own.stop]
        with _announced(partition.parts, "gradients" if gradients else "hidden states", recipe.on_progress):
            self.replay = partition.replay(model, own_batches, recipe.loss, gradients, offload, dense)
        self.parts = []
        for index, (prefix, module) in enumerate(self.replay.parts):
            views = dict(partition.layers_in(prefix, module))
            layers = {name: view for name, view in views.items() if name in wanted}
            others = {name: view for name, view in views.items() if name not in wanted}
            dtypes = {tensor: tensor.dtype for tensor in tensors_of(module)}
            self.parts.append(
                Part(index, prefix, module, layers, others, dtypes, not views.keys().isdisjoint(self._decoder))
            )
        self._turns = InTurn([list(part.dtypes) for part in self.parts])
        self._dtypes = {name: view.weight.dtype for part in self.parts for name, view in part.layers.items()}

    @contextmanager
    def observed(
        self, part: Part, done: Container[str] = (), owners: Mapping[str, int | None] = {}
    ) -> Iterator[LayerStatistics]:
        """A part ready to run inside, and what its layers have seen; layers that are `done` have no statistics.

        owners: who will ask for which, where ranks share the work.
        """
        layers = {name: view for name, view in part.layers.items() if name not in done}
        with self._turns.placed(part.index):
            statistics = LayerStatistics(
                layers,
                self._union,
                self._recipe.factors,
                self._signs,
                self._routed,
                self._decoder,
                self._first,
            )
            self.replay.observe(part.index, statistics)
            if self._ranks.count > 1:
                statistics.add_up(self._ranks, owners)
            yield statistics
            self.replay.advance(part.index)

    def owners(
        self, part: Part, done: Container[str] = (), divisible: Container[str] = ()
    ) -> dict[str, int | None]:
        """{layer: the rank that solves it} of a part; the first rank for one that is done, None for all together.

        divisible: layers of which each rank could solve some rows.
        """
        shapes = {name: view.problem_shape for name, view in part.layers.items()}
        factors = min(self._recipe.factors, len(self._signs)) if "gradients" in self._union.needed else 0
        device = device_of_passes() or part.device
        cost = partial(work, self._recipe.solver, factors=factors, device=device)
        return self._ranks.owners(
            {name: cost(shape) for name, shape in shapes.items()},
            [name for name in shapes if name in done],
            {name: cost(shape, ranks=self._ranks.count) for name, shape in shapes.items() if name in divisible},
        )

    def problems(
        self, name: str, layer: LayerView, statistics: LayerStatistics, again: bool = False
    ) -> Iterator[Problem]:
        """A layer's problem by each objective, made as it is asked for, with its weight as it is, in its own dtype.

        It can be large: let go of it before asking for the next. The layer's gradients leave the statistics unless
        its problems are asked for `again`.
        """
        with in_layer(name):
            by_group, weights = statistics.of(name, again), layer.matrices()
            if layer.groups == 1:
                weight = weights[0].to(self._dtypes[name])
                quadratics = quadratics_of(statistics.terms, weight, by_group[0])
            else:
                weights = weights.double()
                weight = weights.flatten(0, 1)
                quadratics = quadratics_of_groups(statistics.terms, weights, by_group)
            fraction = self._recipe.dampening_frac
            if len(self._objectives) == 1:  # nothing of the statistics is needed once there is a problem
                return iter((self._objectives[0].weigh(weight, quadratics, fraction),))
            return _noted(name, weighting_sweeps(self._objectives, weight, quadratics, fraction))


def _announced(
    parts: Iterable[tuple[str, nn.Module]], what: str, on_progress: OnProgress
) -> AbstractContextManager[None]:
    """Say which part of the model runs, whenever one does."""
    return hooked(
        module.register_forward_pre_hook(lambda *_, name=name: on_progress(what, name))
        for name, module in parts
    )


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
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator, device="cpu").to(torch.float32) * 2 - 1
