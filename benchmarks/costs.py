"""What models of the Llama family would take on GPUs, by measured rates: counted from shapes, nothing is run.

    python -m benchmarks.costs [--samples 128] [--length 2048] [--factors 16 4] [--gpus 1 8]
                               [--measured benchmarks/outputs/gpu.json | --rate TFLOPS]

Passes and statistics: the multiply-adds of moonshot.files.plan, at the rate of a whole `prune` by SparseGPT. Layers:
the time of the measured one that is nearest, first in columns, then in rows, times the ratio of their multiply-adds.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import moonshot as ms
import torch
from moonshot.files.plan import Counts, Layer, count
from moonshot.models.ranks import owners
from moonshot.pruning.by_rows import is_divisible, work
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .gpu.__main__ import LAYERS, MODELS
from .gpu.layers import FACTORS, PATTERN
from .gpu.models import llama, model_group
from .gpu.rows import Row

SHAPES = {  # hidden, MLP, blocks, heads, key-value heads, tied embeddings
    "1B (3.2)": (2048, 8192, 16, 32, 8, True),
    "8B (3.1)": (4096, 14336, 32, 32, 8, False),
    "70B (3.1)": (8192, 28672, 80, 64, 8, False),
}
SOLVERS: tuple[ms.Solver, ...] = (ms.SparseGPT(), ms.ADMM())
ITERATIONS, INVERSES, GRAMS = 50, 3, 2  # of ADMM: products with B, the B for them, and the factors' grams
WHOLE, BY_PARTS = "SparseGPT, default", "SparseGPT, default, part by part"  # rows of benchmarks.gpu.models

# Seconds on 27 November 2026, of one card each, at 2:4. Sweeps of up to 4096 columns and the model: an H200. ADMM of up
# to 4096 columns: an H100, by an earlier version. More columns: an H100 too, by the version before that one, which took
# twice as long as these for 4096 x 4096 with 16 factors.
MEASURED_LAYERS = {  # by solver, rows and columns: by factors
    "SparseGPT": {
        (1024, 1024): {0: 0.0065, 16: 0.0068},
        (2048, 2048): {0: 0.0087, 16: 0.0145},
        (4096, 4096): {0: 0.0258, 16: 0.0511},
        (8192, 8192): {0: 0.100, 16: 0.59},
        (4096, 14336): {0: 0.211, 16: 0.87},
    },
    "ADMM": {
        (1024, 1024): {0: 0.0687, 16: 0.0717},
        (2048, 2048): {0: 0.0572, 16: 0.0871},
        (4096, 4096): {0: 0.2498, 16: 0.4026},
        (8192, 8192): {16: 4.16},
        (4096, 14336): {16: 5.10},
    },
}
MEASURED_MODELS = {MODELS[0]: {WHOLE: 4.046, BY_PARTS: 6.417}}

Seconds = dict[str, dict[tuple[int, int], dict[int, float]]]  # of layers, by solver, (m, d) and factors
Models = dict[tuple[str, int, int, int], dict[str, float]]  # seconds of rows, by what models.model_group takes


def sweep(m: int, d: int, n: int) -> float:
    """Multiply-adds of a sweep, those in float64 twice: products with R, its factorisation and inverse."""
    return m * d * d / 2 * (1 + n) + 2 * (2 * d**3 / 3)


def admm(m: int, d: int, n: int) -> float:
    """The same of ADMM: a product an iteration, R'R for each inverse, R U for some; a factorisation for each."""
    single = m * d * d * (ITERATIONS + n / 2 * GRAMS) + d**3 / 2 * INVERSES
    return single + 2 * (2 * d**3 / 3 * (1 + INVERSES))


MULTIPLICATIONS = {"SparseGPT": sweep, "ADMM": admm}


@dataclass(frozen=True)
class Rates:
    """How fast a card is.

    passes: multiply-adds a second of passes and statistics. moving: seconds more for each byte of a model that stays on
    the CPU and moves part by part, None if unknown. layers: what measured layers took.
    """

    passes: float
    moving: float | None
    layers: Seconds

    def solve(self, solver: str, m: int, d: int, n: int) -> float:
        """Seconds of a layer (m, d) with n factors, between measured numbers of factors in proportion."""
        of, shapes = MULTIPLICATIONS[solver], self.layers[solver]
        shape = min(shapes, key=lambda near: (abs(math.log(near[1] / d)), abs(math.log(near[0] / m))))
        seconds = shapes[shape]
        low, high = min(seconds), max(seconds)
        nearest = min(max(n, low), high)
        share = (nearest - low) / (high - low) if high > low else 0.0
        return (seconds[low] + share * (seconds[high] - seconds[low])) * of(m, d, n) / of(*shape, nearest)


def assumed(tera: float) -> Rates:
    """So many tera-flops for everything, half as many in float64."""
    rate = tera * 1e12 / 2
    return Rates(rate, None, {name: {(1, 1): {0: of(1, 1, 0) / rate}} for name, of in MULTIPLICATIONS.items()})


def from_record(record: dict) -> Rates:
    """The rates in a record of `make bench-gpu`. Raises ValueError where it has not enough figures, and says which."""
    layers, models = ([Row(**row) for row in record.get(part, ())] for part in ("layers", "models"))
    return rates(model_seconds(models), layer_seconds(layers))


def layer_seconds(rows: Sequence[Row]) -> Seconds:
    """What the layers took that have a figure."""
    took = {(row.group, row.name): row.seconds for row in rows if row.seconds is not None}
    found: Seconds = {}
    for solver in MULTIPLICATIONS:
        names = {0: solver, FACTORS: f"{solver}, n = {FACTORS}"}
        by_shape = {
            (m, d): {n: took[key] for n, name in names.items() if (key := (f"{m} x {d}", name)) in took}
            for m, d in LAYERS
        }
        found[solver] = {shape: seconds for shape, seconds in by_shape.items() if seconds}
        if not found[solver]:
            raise ValueError(f"no figure of a layer by {solver}")
    return found


def model_seconds(rows: Sequence[Row]) -> Models:
    """What the rows took of the models that have figures, the narrowest first."""
    found: Models = {}
    for model in MODELS:
        group = model_group(*model)
        took = {row.name: row.seconds for row in rows if row.group == group and row.seconds is not None}
        if WHOLE in took:
            found[model] = took
    if not found:
        raise ValueError(f'no figure of a model by "{WHOLE}"')
    return found


def rates(models: Models, layers: Seconds) -> Rates:
    """The rates by which models and layers took so long: of the models, those of the last that has the figures."""
    passes, moving = 0.0, None
    for (widths, blocks, samples, length), took in models.items():
        dense = llama(widths, blocks, "meta")
        passes = counted(dense, samples, length, FACTORS).multiplications / took[WHOLE]
        if BY_PARTS in took:
            moving = (took[BY_PARTS] - took[WHOLE]) / size(dense)
    return Rates(passes, moving, layers)


def size(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def counted(model: nn.Module, samples: int, length: int, factors: int, gpus: int = 1) -> Counts:
    """What follows from the shapes, for the default objective."""
    batches = [{"input_ids": torch.zeros((1, length), dtype=torch.long)}] * samples
    counts = count(model, batches, objective=DEFAULT_OBJECTIVE, factors=factors, ranks=gpus)
    assert counts is not None
    return counts


def solving(rates: Rates, solver: ms.Solver, block: Sequence[Layer], n: int, gpus: int) -> float:
    """Seconds until the last GPU has solved its part of a block: layers and rows are dealt out as `prune` does."""
    shapes = {str(k): (m, d) for k, (m, d, _) in enumerate(block)}
    cost = partial(work, solver, factors=n, device=torch.device("cuda"))
    shared = {
        name: cost(shape, ranks=gpus)
        for name, shape in shapes.items()
        if is_divisible(solver, [PATTERN], shape, gpus)
    }
    dealt, _ = owners({name: cost(shape) for name, shape in shapes.items()}, gpus, shared=shared)
    ends = [0.0] * gpus
    for name, (m, d) in shapes.items():
        owner = dealt[name]
        rows = m if owner is not None else -(-m // gpus)
        for rank in range(gpus) if owner is None else [owner]:
            ends[rank] += rates.solve(solver.name, rows, d, n)
    return max(ends)


def built(hidden: int, mlp: int, blocks: int, heads: int, keys: int, tied: bool) -> LlamaForCausalLM:
    """A Llama without weights."""
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
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--factors", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--measured", type=Path, help="what make bench-gpu has written, instead of the figures here"
    )
    either.add_argument("--rate", type=float, help="so many tera-flops instead of what was measured")
    options = parser.parse_args(arguments)
    if options.rate:
        card = assumed(options.rate)
    elif options.measured:
        try:
            card = from_record(json.loads(options.measured.read_text("utf-8")))
        except (OSError, ValueError) as error:
            parser.error(f"{options.measured}: {error}; run make bench-gpu again, or leave --measured out")
    else:
        card = rates(MEASURED_MODELS, MEASURED_LAYERS)
    table = Table(title=f"{options.samples} samples of {options.length} tokens; minutes", title_justify="left")
    sizes = ("model, bf16", "factors", "GPUs", "model GiB", "memory GiB", "offloaded GiB")
    for name in (*sizes, "passes, statistics", "sweeps", "ADMM", "moved part by part"):
        table.add_column(name, justify="right")
    for name, shape in SHAPES.items():
        model = built(*shape)
        for n in options.factors:
            for gpus in options.gpus:
                counts = counted(model, options.samples, options.length, n, gpus)
                seconds = [counts.multiplications / card.passes / gpus]
                for solver in SOLVERS:
                    solved = (solving(card, solver, block, counts.rank, gpus) for block in counts.blocks)
                    seconds.append(sum(solved))
                moved = "-" if card.moving is None else f"{card.moving * size(model) / 60:.1f} more"
                bytes_of = size(model), counts.memory, counts.offloaded
                table.add_row(
                    *(name, str(n), str(gpus)),
                    *(f"{each / 2**30:.1f}" for each in bytes_of),
                    *(f"{each / 60:.1f}" for each in seconds),
                    moved,
                )
    print(f"{card.passes / 1e12:.1f} T multiply-adds a second in passes and statistics")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
