"""A model that computes the same on other axes of its residual stream: those of what its layers read."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.models.blocks import find_blocks
from moonshot.models.calibration import Batch, CalibrationError, batch_tokens, checked_batches, real_tokens
from moonshot.models.modules import ModelError, check_model, evaluating, hooked, unwrapped
from moonshot.models.precision import home
from moonshot.models.settings import ready


def rotate(model: nn.Module, calibration: Any) -> nn.Module:
    """A new model of the same class with the same outputs up to rounding, to be pruned to a fraction of zeros.

    model: a causal language model of transformers with RMSNorm before each attention and MLP, such as Llama, Mistral
    and Qwen. It stays as it is. calibration: as for `prune`.

    The residual stream of the new model is on the principal axes of what its blocks' layers read of it. For this the
    norms' scales become part of the layers after them, and the head has a weight of its own, also where it shared that
    of the embeddings. Raises ModelError for what is not built so, which is seen by the outputs.
    """
    check_model(model)
    model = unwrapped(model)
    batches = checked_batches(model, calibration, home(model))
    if not all(map(batch_tokens, batches)):
        raise CalibrationError("only what reads texts can be put on other axes: give token ids")
    with torch.inference_mode(False):
        rotated: Any = copy.deepcopy(model)
    with ready(model), ready(rotated), torch.no_grad(), evaluating(model), evaluating(rotated):
        _separate_head(rotated)
        expected = _logits(model, batches[0])
        readers = _readers(rotated, batches[0])
        blocks = {module for _, block in find_blocks(rotated) for module in block.modules()}
        norms = [norm for norm in readers if norm in blocks]
        if not norms:
            raise ModelError(f"{_name(model)} has no RMSNorm that its blocks' layers read")
        for norm, layers in readers.items():
            for layer in layers:
                layer.weight.mul_(norm.weight)
            norm.weight.fill_(1)
        _turn(rotated, readers, _axes(rotated, norms, batches))
        error = (_logits(rotated, batches[0]) - expected).norm() / expected.norm()
    if not error < torch.finfo(next(model.parameters()).dtype).eps ** 0.5:
        raise ModelError(
            f"{_name(model)} does not compute the same on other axes: it is not built like a Llama"
        )
    return rotated


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).logits.float()


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _separate_head(model: Any) -> None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is None or head is None:
        raise ModelError(f"{_name(model)} is no causal language model of transformers")
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.clone(), head.weight.requires_grad)
        model.config.tie_word_embeddings = False


def _readers(model: nn.Module, batch: Batch) -> dict[Any, list[Any]]:
    """{norm of the residual stream: the linear layers that read what it returns}."""
    width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    found: dict[Any, list[Any]] = {}
    returned: dict[int, tuple[nn.Module, Tensor]] = {}  # by where it lies in memory, which it holds

    def normed(norm: nn.Module, _: Any, output: Tensor) -> None:
        returned[output.data_ptr()] = norm, output

    def read(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm, _ = returned.get(inputs[0].data_ptr(), (None, None))
        if norm is not None:
            found.setdefault(norm, []).append(layer)

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    norms = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and _width(module) == width
    ]
    with (
        hooked(layer.register_forward_pre_hook(read) for layer in layers),
        hooked(norm.register_forward_hook(normed) for norm in norms),
    ):
        model(**batch)
    return found


def _width(norm: nn.Module) -> int | None:
    scales = getattr(norm, "weight", None)
    return None if scales is None else len(scales)


def _axes(model: nn.Module, norms: list[Any], batches: list[Batch]) -> Tensor:
    """Columns: the eigenvectors of the second moment of what norms return, in double precision."""
    scales = norms[0].weight
    moment = torch.zeros(len(scales), len(scales), dtype=torch.float64, device=scales.device)
    for batch in batches:

        def add(norm: nn.Module, _: Any, output: Tensor, batch: Batch = batch) -> None:
            tokens = real_tokens(output, batch).flatten(0, -2).double()
            moment.addmm_(tokens.T, tokens)

        with hooked(norm.register_forward_hook(add) for norm in norms):
            model(**batch)
    return torch.linalg.eigh(moment)[1]


def _turn(model: Any, readers: dict[Any, list[Any]], axes: Tensor) -> None:
    """The residual stream h of a model as h @ axes."""
    reading = {layer for layers in readers.values() for layer in layers}
    for weight in [model.get_input_embeddings().weight, *(layer.weight for layer in reading)]:
        weight.copy_(weight.double() @ axes)
    for layer in (layer for _, block in find_blocks(model) for layer in block.modules()):
        if isinstance(layer, nn.Linear) and layer not in reading and layer.out_features == len(axes):
            layer.weight.copy_(axes.T @ layer.weight.double())  # it adds to the stream
            if layer.bias is not None:
                layer.bias.copy_(axes.T @ layer.bias.double())
