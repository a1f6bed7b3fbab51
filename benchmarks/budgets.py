"""Even and allocated budgets on the shipped models: accuracy or perplexity over seeds, solvers and objectives.

    python benchmarks/budgets.py [--models vit resnet llama] [--sparsities 0.9] [--solvers ADMM] [--objectives joint]
                                 [--seeds 3] [--samples N] [--rounds 2] [--plot docs/budgets.png]

A seed chooses the calibration data, the samples set aside and the random signs. Prints every result and then a
markdown table for each model; --plot draws what each layer got in the last allocation of each model.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import moonshot as ms
import torch
from moonshot.app.demo import DEMO
from moonshot.files.load import load, load_classifier
from moonshot.models.calibration import windows
from moonshot.models.evaluation import accuracy, perplexity
from moonshot.models.images import ImageBatches, find_pictures
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from torch import nn

SPARSITIES = {"vit": (0.9, 0.95, 0.96), "resnet": (0.9, 0.94, 0.96), "llama": (0.7, 0.8, 0.9)}
SOLVERS = {"SparseGPT": ms.SparseGPT(), "ADMM": ms.ADMM()}
SINGLE = ms.Reconstruction()
JOINT = {
    "vit": 0.8 * ms.Reconstruction() + 0.2 * ms.Fisher(),
    "resnet": 0.8 * ms.Reconstruction() + 0.2 * ms.Fisher(),
    "llama": DEFAULT_OBJECTIVE,
}


def text_model(
    samples: int = 32, folder: Path = DEMO
) -> tuple[nn.Module, Callable, Callable[[nn.Module], float]]:
    """The Llama in a folder, (seed, samples) -> calibration, and held-out perplexity at context 256."""
    model, tokenizer = load(str(folder / "model"))
    text = (folder / "calibration.txt").read_text("utf-8")
    test = windows(tokenizer, (folder / "heldout.txt").read_text("utf-8"), 64, 256, None)
    return (
        model.to(torch.float32),
        lambda seed, samples=samples: windows(tokenizer, text, samples, 256, seed),
        lambda pruned: perplexity(pruned, test).value,
    )


def image_model(name: str, samples: int = 384) -> tuple[nn.Module, Callable, Callable[[nn.Module], float]]:
    """A classifier, (seed, samples) -> calibration, and accuracy in percent on the 2000 test images."""
    model, processor = load_classifier(str(DEMO / name))
    model = model.float()
    train, test = (find_pictures(f"{DEMO / 'images'}::{split}") for split in ("train", "test"))
    held_out = list(ImageBatches(model, processor, test))
    return (
        model,
        lambda seed, samples=samples: list(ImageBatches(model, processor, train, samples, seed=seed)),
        lambda pruned: 100 * accuracy(pruned, held_out).value,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SPARSITIES), choices=list(SPARSITIES))
    parser.add_argument("--sparsities", nargs="+", type=float, help="instead of each model's own three")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--objectives", nargs="+", default=["single", "joint"], choices=["single", "joint"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="32 windows or 384 images unless given")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    for name in arguments.models:
        compare(name, arguments)


def compare(name: str, arguments: argparse.Namespace) -> None:
    samples = arguments.samples or (32 if name == "llama" else 384)
    model, calibration, measure = text_model(samples) if name == "llama" else image_model(name, samples)
    sparsities = arguments.sparsities or SPARSITIES[name]
    values: dict[tuple[str, float], list[float]] = {}
    begin = time.perf_counter()
    for seed in range(arguments.seeds):
        data = calibration(seed)
        for solver in arguments.solvers:
            for kind in arguments.objectives:
                objective = JOINT[name] if kind == "joint" else SINGLE
                for sparsity in sparsities:
                    options = {"objective": objective, "solver": SOLVERS[solver], "seed": seed}
                    allocation = ms.allocate(model, data, sparsity, rounds=arguments.rounds, **options)
                    for budget, pattern in (("even", sparsity), ("allocated", allocation)):
                        pruned = copy.deepcopy(model)
                        ms.prune(pruned, data, pattern, **options)
                        value = measure(pruned)
                        method = f"{solver}, {kind}, {budget}"
                        values.setdefault((method, sparsity), []).append(value)
                        print(
                            f"{time.perf_counter() - begin:5.0f} s  {name}, seed {seed}, {method} "
                            f"({allocation.budget}), {100 * sparsity:g} %: {value:.2f}",
                            flush=True,
                        )
    if arguments.plot:
        allocation.plot(arguments.plot.with_stem(f"{arguments.plot.stem}-{name}"))
    print(f"\n{name}, dense {measure(model):.2f}, mean +- standard deviation over {arguments.seeds} seeds\n")
    print("| method | " + " | ".join(f"{100 * sparsity:g} %" for sparsity in sparsities) + " |")
    print("|---" * (len(sparsities) + 1) + "|")
    for method in dict.fromkeys(method for method, _ in values):
        cells = []
        for sparsity in sparsities:
            found = values[method, sparsity]
            spread = f" +- {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}")
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
