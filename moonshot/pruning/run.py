"""A model pruned layer by layer: each is solved, and its answer is what later layers see."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern
from moonshot.layer.problem import Problem
from moonshot.models.batchnorm import reestimate, running_statistics
from moonshot.models.calibration import Batch, own_batches
from moonshot.models.in_turn import passes_of
from moonshot.models.layer_view import LayerView
from moonshot.models.losses import loss_of, sample_losses
from moonshot.models.modules import evaluating, shared_parameters
from moonshot.models.offload import Offload
from moonshot.models.partition import Partition
from moonshot.models.precision import in_float32, tensors_of
from moonshot.models.ranks import Ranks
from moonshot.models.replay import Replay
from moonshot.models.restore import restored_on_failure
from moonshot.models.statistics import LayerStatistics
from moonshot.pruning.by_rows import ByRows, is_divisible
from moonshot.pruning.calibration_pass import CalibrationPass, Part, in_layer
from moonshot.pruning.checkpoint import Checkpoint
from moonshot.pruning.fingerprint import digest
from moonshot.pruning.layer_patterns import stages_of
from moonshot.pruning.recipe import Recipe
from moonshot.pruning.refit import PartFit, Refit, fitted_shapes
from moonshot.pruning.report import LayerReport, PartReport
from moonshot.solvers.base import Solver, solve


class LayerAnswer(NamedTuple):
    """A layer's pruned weight, the rows of all groups below one another, and what is to be said of it."""

    weight: Tensor
    report: LayerReport


Fitted = tuple[list[Tensor], PartReport]


@dataclass(frozen=True)
class PruningRun:
    """What is the same each time a model is pruned, whatever the objective and the samples.

    patterns: of the layers to prune, by name; batch_norm: whether running statistics are estimated again where there
    are any; on_layer: called with every report, on the first rank; ranks: among which the work is shared.
    """

    model: nn.Module
    partition: Partition
    patterns: dict[str, Pattern]
    recipe: Recipe
    batch_norm: bool
    on_layer: Callable[[LayerReport], None]
    ranks: Ranks

    @contextmanager
    def restored_on_failure(self) -> Iterator[Callable[[], None]]:
        """In evaluation mode inside, and if that fails as it was; yields a function that puts it back any time."""
        layers = self.partition.layers()
        chosen = [layers[name] for name in self.patterns]
        offload = Offload(self.recipe.scratch, to_host=self.recipe.device is not None)
        with (
            restored_on_failure(self.model, chosen, offload) as restore,
            evaluating(self.model),
        ):
            yield restore

    def prune(
        self,
        objectives: Sequence[Objective],
        batches: list[Batch],
        *,
        bound: bool = False,
        checkpoint: Checkpoint | None = None,
        on_answers: Callable[[str, list[Tensor]], None] | None = None,
        refit: Refit | None = None,
    ) -> tuple[dict[str, LayerReport], dict[str, PartReport]]:
        """Prune the model by the first objective; {layer name: report} and, of those refitted, {part name: report}.

        on_answers: called with a layer's name and its answers by all objectives, on the inputs that the first one's
        give.
        refit: how each part is fitted once its layers are pruned; not at all unless given.
        checkpoint: where answers by one objective are stored, on the first rank; those that it has are not looked for
        again.
        """
        reports: dict[str, LayerReport] = {}
        refitted: dict[str, PartReport] = {}
        batches = batches if refit is None else refit.split(batches)
        answered = self.ranks.broadcast(checkpoint.done if checkpoint else frozenset())
        calibration = CalibrationPass(
            self.model,
            self.partition,
            self.patterns,
            batches,
            objectives,
            self.recipe,
            dense=refit is not None,
            ranks=self.ranks,
        )
        for part in calibration.parts:
            dense = digest(tensors_of(part.module)) if checkpoint else ""
            fitted = self.ranks.broadcast(self._stored_fit(part, dense, checkpoint) if refit else None)
            stages = stages_of(
                {name: self.patterns[name] for name in part.layers}, refit.stages if refit else 1
            )
            stages = stages[-1:] if fitted and answered.issuperset(part.layers) else stages
            done = answered if len(stages) == 1 else frozenset()  # what is in between is not stored
            divisible = () if bound else self._divisible(part, stages)
            owners = calibration.owners(part, done, divisible)
            with calibration.observed(part, done, owners) as statistics:
                for patterns in stages:
                    last = patterns is stages[-1]
                    solve = partial(self._answers, calibration, part, statistics, patterns, last, bound, owners)
                    find = partial(_stored_or, solve, checkpoint, dense, done, part)
                    dealt = {name: owners[name] for name in patterns}
                    for name, answers in self.ranks.deal(dealt, find, part.device):
                        if checkpoint and last and name not in done:
                            checkpoint.store(name, dense, *answers[0])
                        part.layers[name].assign_rows(answers[0].weight)
                        if on_answers:
                            on_answers(name, [answer.weight for answer in answers])
                        for answer in answers if last and self.ranks.is_first else ():
                            self.on_layer(answer.report)
                        reports[name] = answers[0].report.following(reports.get(name))
                    self._estimate_part(part, calibration.replay)
                    if refit and part.layers:
                        stored = fitted if len(stages) == 1 else None
                        with in_float32(tensors_of(part.module)):
                            values, report = self._fit(part, calibration.replay, refit, stored)
                        refitted[part.name] = report.following(refitted.get(part.name))
                        if checkpoint and last and not stored:
                            checkpoint.store_part(part.name, dense, values, refitted[part.name])
        if len(running_statistics(self.model)) > sum(len(running_statistics(m)) for m in self._modules):
            self._estimate_batch_norm(batches)  # some lie outside of all parts
        return reports, refitted

    def assign(self, answers: Iterable[tuple[str, Tensor]], batches: list[Batch]) -> None:
        """Give layers stored answers, as if the model had been pruned by them on these samples."""
        layers = self.partition.layers()
        for name, weight in answers:
            layers[name].assign_rows(weight)
        self._estimate_batch_norm(batches)

    def losses(self, batches: list[Batch]) -> Tensor:
        """The model's loss on each sample (samples,)."""
        with passes_of(self.model, self._modules):
            own = sample_losses(self.model, own_batches(self.ranks, batches), self._loss)
        return torch.cat(self.ranks.gather(own))

    @property
    def estimates_batch_norm(self) -> bool:
        return self.batch_norm and bool(running_statistics(self.model))

    @property
    def _loss(self) -> Callable[[nn.Module, Batch], Any]:
        return partial(loss_of, self.recipe.loss)

    @property
    def _modules(self) -> list[nn.Module]:
        return [module for _, module in self.partition.parts]

    @cached_property
    def _shared(self) -> set[nn.Parameter]:
        return shared_parameters(self.model)

    def _estimate_batch_norm(self, batches: list[Batch]) -> None:
        if self.estimates_batch_norm:
            with passes_of(self.model, self._modules):
                own = own_batches(self.ranks, batches)
                reestimate(self.model, own, self._loss, self._modules, self.ranks)

    def _estimate_part(self, part: Part, replay: Replay) -> None:
        """Estimate the running statistics of a part on what it reads in the pruned model."""
        if self.batch_norm:
            batches = list(range(len(replay.batches)))
            reestimate(part.module, batches, lambda _, b: replay.output(part.index, b), ranks=self.ranks)

    def _fit(self, part: Part, replay: Replay, refit: Refit, stored: Fitted | None) -> Fitted:
        """Fit a part whose layers are pruned, or put in what a checkpoint has of it; what it is then."""

        def on_step(step: int, most: int) -> None:
            self.recipe.on_progress(f"refit of {part.name}", f"step {step} of {most} at most")

        fit = PartFit(part, replay, refit, self.recipe.seed, self._shared, self.ranks, on_step)
        if stored:
            fit.assign(stored[0])
            return stored
        report = fit.run(partial(self._estimate_part, part, replay))
        return fit.values(), report

    def _stored_fit(self, part: Part, dense: str, checkpoint: Checkpoint | None) -> Fitted | None:
        """What a checkpoint has of the refit of a part with this digest."""
        if not checkpoint:
            return None
        return checkpoint.part(part.name, dense, fitted_shapes(part, self._shared))

    def _divisible(self, part: Part, stages: Iterable[Mapping[str, Pattern]]) -> set[str]:
        """The layers of a part of which every rank could solve some rows."""
        found = set()
        for name, layer in part.layers.items():
            patterns = [by_layer[name] for by_layer in stages if name in by_layer]
            if is_divisible(self.recipe.solver, patterns, layer.problem_shape, self.ranks.count):
                found.add(name)
        return found

    def _answers(
        self,
        calibration: CalibrationPass,
        part: Part,
        statistics: LayerStatistics,
        patterns: Mapping[str, Pattern],
        last: bool,
        bound: bool,
        owners: Mapping[str, int | None],
        name: str,
    ) -> list[LayerAnswer]:
        """A layer's answers by all objectives.

        last: whether its statistics are not needed again. Where it has no owner all ranks solve it, each some rows.
        """
        layer = part.layers[name]
        solver = ByRows(self.recipe.solver, self.ranks) if owners[name] is None else self.recipe.solver
        solved = self._solver(name, layer, patterns[name], statistics, bound and last, solver)
        # map lets go of each problem before the next one takes as much memory
        return list(map(solved, calibration.problems(name, layer, statistics, again=not last)))

    def _solver(
        self,
        name: str,
        layer: LayerView,
        pattern: Pattern,
        statistics: LayerStatistics,
        bound: bool,
        solver: Solver,
    ) -> Callable[[Problem], LayerAnswer]:
        """What solves a layer's problem. statistics: those that the problem is made of."""

        def solved(problem: Problem) -> LayerAnswer:
            with in_layer(name):
                result = solve(problem, pattern, solver, bound=bound)
            return LayerAnswer(
                result.weight,
                LayerReport(
                    name=name,
                    shape=layer.problem_shape,
                    pattern=result.pattern,
                    sparsity=result.sparsity,
                    relative=result.relative,
                    terms=result.terms,
                    damping=problem.damping,
                    status=str(result.status),
                    seconds=result.seconds,
                    gap=result.gap,
                    note="; ".join(filter(None, (_said(name, layer, statistics, result.terms), result.note))),
                    zero_survivors=result.zero_survivors,
                ),
            )

        return solved


def _stored_or(
    solve: Callable[[str], list[LayerAnswer]],
    checkpoint: Checkpoint | None,
    dense: str,
    done: Container[str],
    part: Part,
    name: str,
) -> list[LayerAnswer]:
    """What a checkpoint has of a layer that is done, of a part with this digest; what solving others gives."""
    if not checkpoint or name not in done:
        return solve(name)
    return [LayerAnswer(*checkpoint.answer(name, dense, part.layers[name].problem_shape))]


def _said(name: str, layer: LayerView, statistics: LayerStatistics, terms: dict[str, float]) -> str:
    """What is to be said of a layer whose answer rests on little."""
    return _note(name, layer, statistics) or _outweighed(terms)


def _note(name: str, layer: LayerView, statistics: LayerStatistics) -> str:
    """What is to be said of a layer whose statistics cannot tell all of its weights apart."""
    tokens, inputs = statistics.tokens[name], layer.shape[1]
    if statistics.routed and tokens < inputs:
        return f"{tokens} tokens for {inputs} inputs" if tokens else "no token reached it: pruned by magnitude"
    return "the loss does not depend on it" if name in statistics.without_gradient else ""


def _outweighed(terms: dict[str, float]) -> str:
    """What is to be said of a layer whose scale does not matter, so that a term is no loss for an empty one."""
    name = max(terms, key=terms.__getitem__)
    if terms[name] < 10:
        return ""
    return f"{name} is almost zero for an empty layer, as before a norm: it counts for more than its share"
