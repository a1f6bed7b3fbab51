"""`prune` from end to end on Llamas of random weights, beside a plain block-by-block SparseGPT in torch."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import moonshot as ms
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..solvers.benchmark_utils.references import torch_sparsegpt
from .rows import Rows

WIDTHS = {  # hidden, intermediate, heads, groups of keys and values, vocabulary
    "tiny": (32, 64, 4, 2, 64),
    "1B's widths": (2048, 8192, 32, 8, 128256),
    "8B's widths": (4096, 14336, 32, 8, 128256),
}


def llama(widths: str, blocks: int, device: str) -> LlamaForCausalLM:
    hidden, intermediate, heads, groups, vocabulary = WIDTHS[widths]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def tokens(widths: str, samples: int, length: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(1)
    return torch.randint(0, WIDTHS[widths][-1], (samples, length), generator=make)


def time_model(rows: Rows, widths: str, blocks: int, samples: int, length: int) -> None:
    """SparseGPT and ADMM on the reconstruction error and on the default objective, and SparseGPT on a model that stays
    on the CPU and moves part by part.
    """
    group, calibration = model_group(widths, blocks, samples, length), tokens(widths, samples, length)
    if not rows.ended:  # kernels are compiled
        ms.prune(llama(widths, 1, rows.device), calibration[:4], "2:4")
    for solver in (ms.SparseGPT(), ms.ADMM()):
        for name, objective in {"reconstruction": 1.0 * ms.Reconstruction(), "default": None}.items():
            options = {} if objective is None else {"objective": objective}
            _time(
                *(rows, group, f"{solver.name}, {name}", widths, blocks, rows.device),
                lambda model, s=solver, o=options: ms.prune(model, calibration, "2:4", solver=s, **o),
            )
    _time(
        *(rows, group, "SparseGPT, default, part by part", widths, blocks, "cpu"),
        lambda model: ms.prune(model, calibration, "2:4", solver=ms.SparseGPT(), device=rows.device),
    )


def time_refit(rows: Rows, widths: str, blocks: int, samples: int, length: int) -> None:
    """SparseGPT with a refit of two of the blocks."""
    group, calibration = model_group(widths, 2, samples, length), tokens(widths, samples, length)
    _time(
        *(rows, group, "SparseGPT, default, refit", widths, 2, rows.device),
        lambda model: ms.prune(model, calibration, "2:4", solver=ms.SparseGPT(), refit=True),
    )


def time_reference(rows: Rows, widths: str, blocks: int, samples: int, length: int) -> None:
    """Plain torch on the same model."""
    group, calibration = model_group(widths, blocks, samples, length), tokens(widths, samples, length)
    _time(
        *(rows, group, "torch SparseGPT, block by block", widths, blocks, rows.device),
        lambda model: plain_sparsegpt(model, calibration),
    )


def model_group(widths: str, blocks: int, samples: int, length: int) -> str:
    return f"{blocks} blocks of {widths}, {samples} x {length} tokens"


def _time(
    rows: Rows,
    group: str,
    name: str,
    widths: str,
    blocks: int,
    device: str,
    run: Callable[[LlamaForCausalLM], object],
) -> None:
    """A row about a model that is new each time."""
    fresh = [] if rows.ended else [llama(widths, blocks, rows.device).to(device)]
    rows.time(group, name, lambda: run(fresh.pop()), 1, warm=False)
    gc.collect()
    if rows.device == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def plain_sparsegpt(model: LlamaForCausalLM, calibration: torch.Tensor) -> None:
    """SparseGPT at 2:4 on the reconstruction error, each block on the pruned outputs of those before it."""
    calls = [_first_call(model, sample[None]) for sample in calibration]
    states, others = [states for states, _ in calls], [others for _, others in calls]
    for block in model.model.layers:
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        with _second_moments(layers) as moments:
            for state, other in zip(states, others, strict=True):
                block(state, **other)
        for layer, moment in zip(layers, moments, strict=True):
            ridge = 0.01 * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
            layer.weight.copy_(torch_sparsegpt(layer.weight.float(), moment + ridge))
        outputs = [block(state, **other) for state, other in zip(states, others, strict=True)]
        states = [output[0] if isinstance(output, tuple) else output for output in outputs]


class _Reached(Exception):
    """The first block was called."""


def _first_call(model: LlamaForCausalLM, sample: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """What the first block is called with: the hidden states, and all else."""
    found = []

    def stop(block: nn.Module, positional: tuple, named: dict) -> None:
        named = dict(named)
        found.append((positional[0] if positional else named.pop("hidden_states"), named))
        raise _Reached

    hook = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(sample.to(model.device), use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


@contextmanager
def _second_moments(layers: list[nn.Linear]) -> Iterator[list[torch.Tensor]]:
    """`X'X` of each layer's inputs while it is open, in float32."""
    moments = [
        torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device) for layer in layers
    ]

    def adding(moment: torch.Tensor) -> Callable:
        def add(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            x = inputs[0].flatten(0, -2).float()
            moment.addmm_(x.T, x)

        return add

    hooks = [layer.register_forward_hook(adding(moment)) for layer, moment in zip(layers, moments, strict=True)]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
