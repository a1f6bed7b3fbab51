"""Layers that pruning leaves alone unless they are asked for: a model's head, and what chooses among experts."""

from torch import nn

from moonshot.models.expert_view import ExpertView
from moonshot.models.layers import layers_of


def heads(model: nn.Module) -> frozenset[str]:
    """Names of the layers that a transformers model has on top of its base model."""
    base = getattr(model, "base_model", model)  # a property of every transformers model
    if base is model:
        embeddings = getattr(model, "get_output_embeddings", lambda: None)()
        return frozenset(name for name, view in layers_of("", model) if view.module is embeddings)
    within = {view.module for _, view in layers_of("", base)}
    return frozenset(name for name, view in layers_of("", model) if view.module not in within)


def routers(model: nn.Module) -> frozenset[str]:
    """Layers beside a list of experts, alone in their module, with as many outputs as there are experts, or one."""
    found = set()
    for prefix, module in model.named_modules():
        children = [(f"{prefix}.{name}".lstrip("."), child) for name, child in module.named_children()]
        counts = {1, *(_experts(child) for _, child in children)} - {0}
        if len(counts) > 1:
            beside = [list(layers_of(*child)) for child in children if not _experts(child[1])]
            found |= {layers[0][0] for layers in beside if len(layers) == 1 and layers[0][1].shape[0] in counts}
    return frozenset(found)


def _experts(module: nn.Module) -> int:
    """How many experts a module consists of, or may: the length of a list of modules that hold layers."""
    views = [view for _, view in layers_of("", module)]
    if any(isinstance(view, ExpertView) and view.module is module for view in views):
        return int(module.num_experts)  # type: ignore[arg-type]
    return len(module) if views and isinstance(module, nn.ModuleList | nn.ModuleDict) else 0
