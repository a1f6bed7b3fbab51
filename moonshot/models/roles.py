"""Layers that pruning leaves alone unless they are asked for: a model's head, and what chooses among experts."""

from torch import Tensor, nn

from moonshot.models.expert_view import ExpertView
from moonshot.models.layers import layers_of


def heads(model: nn.Module) -> frozenset[str]:
    """Names of the layers that a transformers model, or one inside the model, has on top of its base model."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        base = getattr(module, "base_model", None)  # a property of every transformers model
        if not isinstance(base, nn.Module):
            continue
        if base is module:
            embeddings = getattr(module, "get_output_embeddings", lambda: None)()
            found |= {name for name, view in layers_of(prefix, module) if embeddings in view.modules}
        else:
            within = {view.module for _, view in layers_of("", base)}
            found |= {name for name, view in layers_of(prefix, module) if view.module not in within}
    return frozenset(found)


def routers(model: nn.Module) -> frozenset[str]:
    """Layers beside a list of experts, alone in their module, with as many outputs as there are experts, or one.

    A module that holds such a weight is among them, also if it is no layer.
    """
    found = set()
    for prefix, module in model.named_modules():
        children = [(f"{prefix}.{name}".lstrip("."), child) for name, child in module.named_children()]
        counts = {1, *(_experts(child) for _, child in children)} - {0}
        if len(counts) > 1:
            beside = [child for child in children if not _experts(child[1])]
            alone = [layers for child in beside if len(layers := list(layers_of(*child))) == 1]
            found |= {layers[0][0] for layers in alone if layers[0][1].shape[0] in counts}
            weights = {name: getattr(child, "weight", None) for name, child in beside}
            found |= {
                name for name, weight in weights.items() if isinstance(weight, Tensor) and len(weight) in counts
            }
    return frozenset(found)


def _experts(module: nn.Module) -> int:
    """How many experts a module consists of, or may: the length of a list of modules that hold layers."""
    views = [view for _, view in layers_of("", module)]
    if any(isinstance(view, ExpertView) and view.module is module for view in views):
        return int(module.num_experts)  # type: ignore[arg-type]
    return len(module) if views and isinstance(module, nn.ModuleList | nn.ModuleDict) else 0
