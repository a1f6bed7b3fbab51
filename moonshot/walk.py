"""A walk through a model: layer after layer is solved, and its answer is what later layers see."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from moonshot.checkpoint import Checkpoint
from moonshot.evaluation import sample_losses
from moonshot.layerwise import LayerProblems, Recipe, in_layer, problem_shape, problems
from moonshot.models.batchnorm import reestimate, running_statistics
from moonshot.models.blocks import evaluating, held, in_float32, running_in_float32
from moonshot.models.calibration import Batch
from moonshot.models.cut import Cut
from moonshot.models.restoring import restored_on_failure
from moonshot.models.scratch import Scratch
from moonshot.objectives import Objective
from moonshot.patterns import Pattern
from moonshot.report import LayerReport
from moonshot.solvers.base import Solver, solve

OnAnswers = Callable[[str, list[Tensor]], None]


def forget(name: str, weights: list[Tensor]) -> None:
    """Keep no answers."""


@dataclass(frozen=True)
class Walk:
    """What walks through a model have in common, whatever their objectives and samples.

    patterns: of the layers to prune, by name; batch_norm: whether running statistics are estimated again where there
    are any; on_layer: called with every report.
    """

    model: nn.Module
    cut: Cut
    patterns: dict[str, Pattern]
    solver: Solver
    recipe: Recipe
    batch_norm: bool
    on_layer: Callable[[LayerReport], None]

    @contextmanager
    def restored_on_failure(self) -> Iterator[Callable[[], None]]:
        """In evaluation mode inside, and if that fails as it was; yields a function that puts it back any time."""
        layers = self.cut.layers()
        chosen = [layers[name] for name in self.patterns]
        with (
            restored_on_failure(self.model, chosen, Scratch(self.recipe.scratch)) as restore,
            evaluating(self.model),
        ):
            yield restore

    def prune(
        self,
        objectives: Sequence[Objective],
        batches: list[Batch],
        bound: bool = False,
        keep: OnAnswers = forget,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, LayerReport]:
        """Prune the model by the first objective; {layer name: report}.

        keep: called with a layer's name and its answers by all objectives, on the inputs that the first one's give.
        checkpoint: where answers by one objective are kept; those that it has are not looked for again.
        """
        reports = {}
        done = checkpoint.done if checkpoint else frozenset()
        walk = problems(self.model, self.cut, self.patterns, batches, objectives, self.recipe, done)
        with closing(walk):
            for layer in walk:
                weights, of_layer = self._answered(layer, bound, checkpoint)
                layer.view.assign_rows(weights[0])
                keep(layer.name, weights)
                for report in of_layer:
                    self.on_layer(report)
                reports[layer.name] = of_layer[0]
        self._settle(batches)
        return reports

    def put(self, answers: Iterable[tuple[str, Tensor]], batches: list[Batch]) -> None:
        """Give layers answers that were kept, as if the model had been pruned by them on these samples."""
        layers = self.cut.layers()
        for name, weight in answers:
            layers[name].assign_rows(weight)
        self._settle(batches)

    def losses(self, batches: list[Batch]) -> Tensor:
        """The model's loss on each sample (samples,)."""
        with running_in_float32(self.model, self._parts):
            return sample_losses(self.model, batches, self.recipe.loss)

    @property
    def estimates_again(self) -> bool:
        return self.batch_norm and bool(running_statistics(self.model))

    @property
    def _parts(self) -> list[nn.Module]:
        return [segment for _, segment in self.cut.segments]

    def _settle(self, batches: list[Batch]) -> None:
        if self.estimates_again:
            with in_float32(held(self.model)):
                reestimate(self.model, batches, self.recipe.loss, self._parts)

    def _answered(
        self, layer: LayerProblems, bound: bool, checkpoint: Checkpoint | None
    ) -> tuple[list[Tensor], list[LayerReport]]:
        """`_solved`, or what the checkpoint has of it."""
        if checkpoint is None:
            return self._solved(layer, bound)
        dense = layer.view.matrices()
        if layer.name in checkpoint.done:
            weight, report = checkpoint.answer(layer.name, dense)
            return [weight], [report]
        weights, reports = self._solved(layer, bound)
        checkpoint.keep(layer.name, dense, weights[0], reports[0])
        return weights, reports

    def _solved(self, layer: LayerProblems, bound: bool) -> tuple[list[Tensor], list[LayerReport]]:
        """The answers to the problems of a layer."""
        weights, reports = [], []
        while problem := next(layer.problems, None):
            with in_layer(layer.name):
                result = solve(problem, self.patterns[layer.name], self.solver, bound=bound)
            weights.append(result.weight)
            reports.append(
                LayerReport(
                    name=layer.name,
                    shape=problem_shape(layer.view),
                    pattern=result.pattern,
                    sparsity=result.sparsity,
                    relative=result.relative,
                    terms=result.terms,
                    damping=problem.damping,
                    status=str(result.status),
                    seconds=result.seconds,
                    gap=result.gap,
                    note=_note(layer.tokens, layer.view.shape[1]) if self.cut.routed else "",
                )
            )
            del problem, result  # their memory, before the next one takes as much
        return weights, reports


def _note(tokens: int, inputs: int) -> str:
    """What is to be said of a layer whose inputs cannot tell all of its weights apart."""
    if tokens >= inputs:
        return ""
    return f"{tokens} tokens for {inputs} inputs" if tokens else "no token reached it: pruned by magnitude"
