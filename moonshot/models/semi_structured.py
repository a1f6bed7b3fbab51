"""2:4 layers in the form that the sparse tensor cores of a GPU compute with."""

import torch
from torch import nn

from moonshot.models.modules import ModelError, shared_parameters
from moonshot.models.precision import home


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Convert the linear layers that are 2:4 in place, by `torch.sparse.to_sparse_semi_structured`.

    model: on a GPU of NVIDIA's of compute capability 8.0 or more, in float16 or bfloat16.

    The result is for inference: it is as large in memory as values and positions are, and torch's kernels decide how
    fast. Layers that share their weight with another stay dense.
    Returns the names of the layers that were converted, and {name: torch's reason} of 2:4 layers that it does not take.
    Raises ModelError where the model is on no such GPU, or has no layer that is 2:4.
    """
    _check_device(model)
    converted: list[str] = []
    refused: dict[str, str] = {}
    for name, module in semi_structured_layers(model).items():
        try:
            weight = torch.sparse.to_sparse_semi_structured(module.weight.detach())  # type: ignore[no-untyped-call]
        except (ValueError, RuntimeError) as error:  # its dtype or shape
            refused[name] = " ".join(str(error).split())
            continue
        module.weight = nn.Parameter(weight, requires_grad=False)
        converted.append(name)
    if not converted and not refused:
        raise ModelError("no linear layer is 2:4: prune with --pattern 2:4 first")
    return converted, refused


def semi_structured_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers with at most two nonzeros in every four inputs, but for those that share their weight."""
    shared = shared_parameters(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight not in shared
        and module.in_features % 4 == 0
        and bool(((module.weight.detach().reshape(-1, 4) != 0).sum(dim=1) <= 2).all())
    }


def _check_device(model: nn.Module) -> None:
    device = home(model)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ModelError(
            f"the model is on {device}: torch's semi-structured layers need a GPU of compute capability 8.0 or more"
        )
