"""How a solver is run: every layer of a data set on its own, compiled before it is timed."""

from dataclasses import replace

import moonshot as ms
import numpy as np
import torch
from benchopt import BaseSolver

from .grading import Layer


class MoonshotSolver(BaseSolver):
    """A solver of moonshot by `ms.solve`, from W, A and U to the weights."""

    solver: ms.Solver

    def skip(self, layers: tuple[Layer, ...], pattern: ms.Pattern) -> tuple[bool, str | None]:
        reason = self.solver.unsupported(_problem(layers[0]), pattern)
        return reason is not None, reason

    def set_objective(self, layers: tuple[Layer, ...], pattern: ms.Pattern) -> None:
        self.layers, self.pattern = layers, pattern

    def pre_run_hook(self, stop_val) -> None:
        ms.solve(_problem(_start(self.layers[0])), self.pattern, self.solver)

    def run(self, stop_val) -> None:
        self.weights = [ms.solve(_problem(layer), self.pattern, self.solver).weight for layer in self.layers]

    def get_result(self) -> dict:
        return {"weights": self.weights}


class TorchSolver(BaseSolver):
    """A function of torch tensors. Subclasses define `prune`."""

    def set_objective(self, layers: tuple[Layer, ...], pattern: ms.Pattern) -> None:
        self.layers, self.pattern = layers, pattern

    def prune(self, weight: torch.Tensor, layer: Layer, pattern: ms.Pattern) -> torch.Tensor:
        """The pruned weight (m, d); `weight` is a copy of the layer's."""
        raise NotImplementedError

    def pre_run_hook(self, stop_val) -> None:
        self._pruned(_start(self.layers[0]))

    def run(self, stop_val) -> None:
        self.weights = [self._pruned(layer) for layer in self.layers]

    def get_result(self) -> dict:
        return {"weights": self.weights}

    def _pruned(self, layer: Layer) -> np.ndarray:
        return self.prune(torch.tensor(layer.weight), layer, self.pattern).numpy()


def _problem(layer: Layer) -> ms.Problem:
    return ms.Problem(layer.weight, ms.RowHessian(layer.A, layer.U))


def _start(layer: Layer) -> Layer:
    """The first two rows: enough to compile."""
    return replace(layer, weight=layer.weight[:2], U=None if layer.U is None else layer.U[:2])
