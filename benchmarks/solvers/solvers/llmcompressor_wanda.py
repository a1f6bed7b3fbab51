"""llmcompressor's Wanda, on the diagonal of the shared part A alone: it has one scale for all rows."""

import math

import moonshot as ms
import torch
from benchmark_utils.grading import Layer, budget
from benchmark_utils.runs import TorchSolver
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight


class Solver(TorchSolver):
    """Its budgets are per row, so that a budget for the layer is rounded up in every row."""

    name = "llmcompressor Wanda"

    def prune(self, weight: torch.Tensor, layer: Layer, pattern: ms.Pattern) -> torch.Tensor:
        m, d = weight.shape
        module = torch.nn.Linear(d, m, bias=False, dtype=weight.dtype)
        module.weight.data = weight
        n, of, sparsity = 0, 0, 0.0
        if isinstance(pattern, ms.NM):
            n, of = pattern.m - pattern.n, pattern.m  # it counts the pruned
        else:
            size, zeros = budget(pattern, (m, d))
            sparsity = (math.ceil(zeros * d / size) + 0.5) / d  # it rounds down
        scales = {module: torch.tensor(layer.A.diagonal().copy(), dtype=torch.float32)}
        return sparsify_weight(module, scales, sparsity=sparsity, prune_n=n, prune_m=of).detach()
