"""ALPS in plain torch, on the shared part A alone: it has one Hessian for all rows."""

import moonshot as ms
import torch
from benchmark_utils.grading import Layer, budget
from benchmark_utils.references import torch_alps
from benchmark_utils.runs import TorchSolver


class Solver(TorchSolver):
    """Our reading of arXiv 2406.07831, without its own ridge: A is damped already."""

    name = "reference ALPS"

    def prune(self, weight: torch.Tensor, layer: Layer, pattern: ms.Pattern) -> torch.Tensor:
        size, zeros = budget(pattern, tuple(weight.shape))
        return torch_alps(weight, torch.tensor(layer.A, dtype=weight.dtype), size, zeros)
