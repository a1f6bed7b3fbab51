"""OBC in plain torch, on each row's own Hessian, formed explicitly for a batch of rows at a time."""

import moonshot as ms
import torch
from benchmark_utils.grading import Layer, budget
from benchmark_utils.references import torch_obc
from benchmark_utils.runs import TorchSolver

_BATCH = 2**22  # numbers in the Hessians of a batch
_COLUMNS = 256


class Solver(TorchSolver):
    """Our reading of arXiv 2208.11580. A layer's budget takes the removals that add least, row by row in order.

    The weights are refitted on the support.
    """

    name = "reference OBC"

    def skip(self, layers: tuple[Layer, ...], pattern: ms.Pattern) -> tuple[bool, str | None]:
        if layers[0].weight.shape[1] > _COLUMNS:
            return True, f"rows of more than {_COLUMNS} columns take too long here"
        return False, None

    def prune(self, weight: torch.Tensor, layer: Layer, pattern: ms.Pattern) -> torch.Tensor:
        m, d = weight.shape
        size, zeros = budget(pattern, (m, d))
        within = (size, zeros) if size <= d else (d, d)  # a layer's budget needs the whole trace
        rows = max(1, _BATCH // d**2)
        orders, losses = [], []
        for first in range(0, m, rows):
            part = slice(first, first + rows)
            _, order, loss = torch_obc(weight[part], _hessians(layer, part, weight[part]), *within)
            orders.append(order)
            losses.append(loss)
        order, loss = torch.cat(orders), torch.cat(losses)
        taken = _cheapest(loss, zeros) if size > d else torch.ones_like(order, dtype=torch.bool)
        pruned = torch.zeros_like(weight, dtype=torch.bool).scatter(1, order, taken)
        for i in range(m):
            weight[i] = _refitted(weight[i], _hessians(layer, slice(i, i + 1), weight[i : i + 1])[0], pruned[i])
        return weight


def _hessians(layer: Layer, rows: slice, weight: torch.Tensor) -> torch.Tensor:
    """H_i of some rows, (rows, d, d), in the weight's dtype."""
    a = torch.tensor(layer.A, dtype=weight.dtype)
    if layer.U is None:
        return a.expand(len(weight), -1, -1)
    u = torch.tensor(layer.U[rows], dtype=weight.dtype)
    return torch.baddbmm(a.expand(len(u), -1, -1), u, u.transpose(1, 2))


def _cheapest(loss: torch.Tensor, zeros: int) -> torch.Tensor:
    """Which removals (m, d) to do: always the row's next one that adds least, as a heap of rows would give them.

    Once a removal is next in its row it goes after the dearest before it, hence the running maximum.
    """
    reached = loss.cummax(dim=1).values
    mask = torch.zeros(loss.numel(), dtype=torch.bool)
    mask[reached.flatten().argsort(stable=True)[:zeros]] = True
    return mask.reshape(loss.shape)


def _refitted(weight: torch.Tensor, hessian: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    kept = ~pruned
    refitted = torch.zeros_like(weight)
    if kept.any():
        right = hessian[kept] @ weight
        refitted[kept] = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(hessian[kept][:, kept]))[
            :, 0
        ]
    return refitted
