"""llmcompressor's SparseGPT, on the shared part A alone: it has one Hessian for all rows."""

import math

import moonshot as ms
import torch
from benchmark_utils.grading import Layer, budget
from benchmark_utils.runs import TorchSolver
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

_BLOCK = 128


class Solver(TorchSolver):
    """Its budget is the same in every block of 128 columns, so up to one weight a block more than asked for is pruned.

    A is damped already, and its scale does not matter. A budget for each row is met by one call for each row.
    """

    name = "llmcompressor SparseGPT"

    def prune(self, weight: torch.Tensor, layer: Layer, pattern: ms.Pattern) -> torch.Tensor:
        if isinstance(pattern, ms.NM):
            return _sparsified(weight, layer, 0.0, pattern)
        m, d = weight.shape
        if pattern.scope == "row":
            return torch.cat([_sparsified(row[None], layer, _fraction(pattern, 1, d)) for row in weight])
        return _sparsified(weight, layer, _fraction(pattern, m, d))


def _fraction(pattern: ms.Unstructured, m: int, d: int) -> float:
    """The sparsity to ask for: its threshold is taken inclusively and would prune one weight too many."""
    block = m * min(d, _BLOCK)
    zeros = math.ceil(budget(pattern, (m, d))[1] * block / (m * d))
    return (zeros - 0.5) / block


def _sparsified(weight: torch.Tensor, layer: Layer, sparsity: float, nm: ms.NM | None = None) -> torch.Tensor:
    m, d = weight.shape
    module = torch.nn.Linear(d, m, bias=False, dtype=weight.dtype)
    module.weight.data = weight
    n, of = (nm.m - nm.n, nm.m) if nm else (0, 0)  # it counts the pruned
    return sparsify_weight(
        module,
        {module: torch.tensor(layer.A, dtype=torch.float32)},
        sparsity=sparsity,
        prune_n=n,
        prune_m=of,
        block_size=_BLOCK,
        dampening_frac=0.0,
        preserve_sparsity_mask=False,
    )[1].detach()
