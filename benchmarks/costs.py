"""What models of the Llama family cost by the formulas of moonshot.files.plan: counts from shapes, nothing is run.

    python benchmarks/costs.py [--samples 128] [--length 2048] [--factors 16] [--rate 50]

Minutes are those of the multiply-adds alone at `--rate` tera-flops, half as many in float64.
"""

import argparse

import torch
from moonshot.files.plan import Layer, count
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {  # hidden, MLP, blocks, heads, key-value heads, tied embeddings
    "1B (3.2)": (2048, 8192, 16, 32, 8, True),
    "8B (3.1)": (4096, 14336, 32, 32, 8, False),
    "70B (3.1)": (8192, 28672, 80, 64, 8, False),
}
ITERATIONS, INVERSES, GRAMS = 50, 3, 2  # of ADMM: products with B, the B for them, and the factors' grams


def sweep(layer: Layer, n: int) -> tuple[float, float]:
    """Multiply-adds of a sweep in float32 and in float64: products with R, its factorisation and inverse."""
    m, d, _ = layer
    return m * d * d / 2 * (1 + n), 2 * d**3 / 3


def admm(layer: Layer, n: int) -> tuple[float, float]:
    """The same of ADMM: a product an iteration, R'R for each inverse, R U for some; a factorisation for each."""
    m, d, _ = layer
    single = m * d * d * (ITERATIONS + n / 2 * GRAMS) + d**3 / 2 * INVERSES
    return single, 2 * d**3 / 3 * (1 + INVERSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--rate", type=float, default=50.0)
    arguments = parser.parse_args()
    tokens = f"{arguments.samples} samples of {arguments.length} tokens, {arguments.factors} factors"
    table = Table(title=f"{tokens}, {arguments.rate:g} TFLOPS")
    columns = ("model, bf16", "model GiB", "memory GiB", "offload GiB")
    for name in (*columns, "passes and statistics, min", "sweeps, min", "ADMM, min"):
        table.add_column(name, justify="right")
    per_minute = arguments.rate * 1e12 / 2 * 60
    batches = [{"input_ids": torch.zeros((1, arguments.length), dtype=torch.long)}] * arguments.samples
    for name, (hidden, mlp, blocks, heads, keys, tied) in SHAPES.items():
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            tie_word_embeddings=tied,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        size = sum(p.nbytes for p in model.parameters())
        counts = count(model, batches, objective=DEFAULT_OBJECTIVE, factors=arguments.factors)
        assert counts is not None
        figures = [
            size / 2**30,
            counts.memory / 2**30,
            counts.offloaded / 2**30,
            counts.multiplications / per_minute,
        ]
        for solver in (sweep, admm):
            works = [solver(layer, arguments.factors) for layer in counts.layers]
            figures.append(sum(single + 2 * double for single, double in works) / per_minute)
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
