"""Smaller models: whole columns pruned and cut out of the shipped Llama and ViT, beside the same by magnitude.

    python benchmarks/shrink.py [--columns 0.25 0.5] [--samples 64] [--runs 15] [--methods ...] [--models ...]
    python benchmarks/shrink.py --models Llama --only o_proj   # groups of attention heads alone

For each model the share of parameters that is left, the time of a forward pass of the smaller model over that of the
dense one (both in turns, the median of their ratios), and the held-out perplexity or accuracy.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import moonshot as ms
import torch
from moonshot.app.demo import DEMO
from moonshot.files.load import load, load_classifier
from moonshot.models.calibration import windows
from moonshot.models.evaluation import accuracy, perplexity
from moonshot.models.images import ImageBatches, find_pictures
from torch import nn

METHODS = {
    "Magnitude": (ms.Magnitude(), ms.Reconstruction()),
    "OBS, reconstruction": (ms.OBS(), ms.Reconstruction()),
    "OBS, default": (ms.OBS(), 0.6 * ms.Reconstruction() + 0.2 * ms.TokenFisher() + 0.2 * ms.Fisher()),
    "ADMM, reconstruction": (ms.ADMM(), ms.Reconstruction()),
    "ADMM, default": (ms.ADMM(), 0.6 * ms.Reconstruction() + 0.2 * ms.TokenFisher() + 0.2 * ms.Fisher()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--models", nargs="+", default=["Llama", "ViT"])
    parser.add_argument(
        "--only", default="", help="the end of the names of the layers whose columns are pruned"
    )
    arguments = parser.parse_args()
    print("| model | columns | parameters | forward | " + " | ".join(arguments.methods) + " | dense |")
    print("|---" * (5 + len(arguments.methods)) + "|")
    for name in arguments.models:
        model, calibration, inputs, measure = llama(arguments.samples) if name == "Llama" else vit()
        dense = measure(model)
        for share in arguments.columns:
            values = []
            for solver, objective in map(METHODS.get, arguments.methods):
                pruned = copy.deepcopy(model)
                patterns = {
                    layer: pattern
                    for layer, pattern in ms.column_patterns(pruned, share).items()
                    if layer.endswith(arguments.only)
                }
                ms.prune(pruned, calibration, patterns, solver=solver, objective=objective)
                small = ms.shrink(pruned)
                values.append(measure(small))
            sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (small, model)]
            ratio = statistics.median(ratios(small, model, inputs, arguments.runs))
            cells = [
                f"{name}, {arguments.only} alone" if arguments.only else name,
                f"{100 * share:g} %",
                f"{100 * sizes[0] / sizes[1]:.1f} %",
                f"{ratio:.2f}",
                *values,
                dense,
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def llama(samples: int) -> tuple[nn.Module, torch.Tensor, dict, Callable[[nn.Module], str]]:
    model, tokenizer = load(str(DEMO / "model"))
    model = model.float()
    calibration = windows(tokenizer, (DEMO / "calibration.txt").read_text("utf-8"), samples, 256, 0)
    held_out = windows(tokenizer, (DEMO / "heldout.txt").read_text("utf-8"), 64, 256, None)
    return model, calibration, {"input_ids": held_out[:8]}, lambda m: f"{perplexity(m, held_out).value:.2f}"


def vit() -> tuple[nn.Module, list, dict, Callable[[nn.Module], str]]:
    model, processor = load_classifier(str(DEMO / "vit"))
    model = model.float()
    calibration, test = (
        list(ImageBatches(model, processor, find_pictures(f"{DEMO / 'images'}::{split}")))
        for split in ("train", "test")
    )
    return model, calibration, {"pixel_values": test[0]["pixel_values"]}, lambda m: str(accuracy(m, test))


@torch.no_grad()
def ratios(small: nn.Module, dense: nn.Module, inputs: dict, runs: int) -> list[float]:
    """Seconds of a forward pass of one model over those of the other, in turns."""
    found = []
    for run in range(runs + 2):
        seconds = []
        for model in (small.eval(), dense.eval()):
            begin = time.perf_counter()
            model(**inputs)
            seconds.append(time.perf_counter() - begin)
        if run > 1:
            found.append(seconds[0] / seconds[1])
    return found


if __name__ == "__main__":
    main()
