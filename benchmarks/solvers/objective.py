"""The objective: how near to the optimum, or to a bound, a solver's weights are."""

from functools import lru_cache

import moonshot as ms
import numpy as np
from benchmark_utils.grading import Layer, check, row_optima, row_values
from benchopt import BaseObjective

_ENUMERABLE = 16  # columns


@lru_cache(maxsize=1)  # benchopt makes a new objective for every solver
def reference(layers: tuple[Layer, ...], pattern: ms.Pattern) -> tuple[np.ndarray | None, float]:
    """The optima of small rows and their sum; None and a bound for large layers."""
    if layers[0].weight.shape[1] <= _ENUMERABLE:
        optima = np.concatenate([row_optima(layer, pattern) for layer in layers])
        return optima, float(optima.sum())
    problems = [ms.Problem(layer.weight, ms.RowHessian(layer.A, layer.U)) for layer in layers]
    return None, sum(ms.lower_bound(problem, pattern) for problem in problems)


class Objective(BaseObjective):
    """Minimise `F(V) = sum_i (v_i - w_i)' H_i (v_i - w_i)` over V with a pattern of zeros, `H_i = A + U_i U_i'`."""

    name = "F(V)"
    min_benchopt_version = "1.10"
    sampling_strategy = "run_once"
    test_dataset_name = "small"

    def set_data(self, layers: tuple[Layer, ...], pattern: ms.Pattern) -> None:
        self.layers, self.pattern = layers, pattern
        self.zero_value = float(self._values([np.zeros_like(layer.weight) for layer in layers]).sum())
        self.optima, self.bound = reference(layers, pattern)

    def get_objective(self) -> dict:
        return {"layers": self.layers, "pattern": self.pattern}

    def get_one_result(self) -> dict:
        return {"weights": [np.zeros_like(layer.weight) for layer in self.layers]}

    def evaluate_result(self, weights: list[np.ndarray]) -> dict:
        """weights: one answer for each layer. An answer without the pattern is an error, and has no result.

        value: F(V) / F(0). gap: `(F(V) - bound) / F(V)`. For small rows also solved: the share of rows within a
        relative 1e-6 of their optimum, and excess: the mean of `F / optimum - 1` over rows.
        """
        for layer, V in zip(self.layers, weights, strict=True):
            check(layer, V, self.pattern)
        values = self._values(weights)
        total = float(values.sum())
        figures = {"value": total / self.zero_value, "gap": (total - self.bound) / total}
        if self.optima is not None:
            excess = values / self.optima - 1
            figures |= {"solved": float(np.mean(excess <= 1e-6)), "excess": float(np.mean(excess))}
        return figures

    def _values(self, weights: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([row_values(layer, V) for layer, V in zip(self.layers, weights, strict=True)])
