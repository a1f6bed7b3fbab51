"""Forward passes of a Llama's blocks, dense and as 2:4 layers of torch's on sparse tensor cores."""

import copy
from functools import partial

import torch
from moonshot.models.semi_structured import to_semi_structured
from torch import nn

from .models import llama
from .rows import Rows

TOKENS = (16, 256, 4096, 16384)  # of a pass
LENGTH = 256  # of a text, at most


def time_sparse(rows: Rows, widths: str, blocks: int) -> None:
    """Passes of the same blocks, with half of their weights zero, as dense layers and as 2:4 layers."""
    if rows.ended:
        return
    dense = llama(widths, blocks, rows.device).model
    _halve(dense)
    sparse = copy.deepcopy(dense)
    _, refused = to_semi_structured(sparse)
    assert not refused, refused
    for tokens in TOKENS:
        ids = torch.zeros(
            (max(tokens // LENGTH, 1), min(tokens, LENGTH)), dtype=torch.int64, device=rows.device
        )
        for name, model in {"dense": dense, "2:4": sparse}.items():
            group = f"{blocks} blocks of {widths}, a pass of {tokens} tokens"
            rows.time(group, name, partial(_forward, model, ids), rounds=20)


@torch.no_grad()
def _forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def _halve(model: nn.Module) -> None:
    """Leave the two largest of every four consecutive weights of each layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.view(-1, 4)
            smallest = groups.abs().topk(2, dim=1, largest=False).indices
            groups.scatter_(1, smallest, 0.0)
