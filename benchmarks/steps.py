"""Each step of pruning on the shipped models: solver, objective, budgets, refit, over seeds.

    python benchmarks/steps.py [--models llama vit resnet] [--patterns 2:4 70% 80% 90%] [--methods NAME ...]
                               [--seeds 0 1 2] [--samples N] [--budgets 90% ...] [--budget-samples N] [--by-refits]
                               [--settings stages=2 ...] [--rotate] [--folder FOLDER]

A seed chooses the calibration data, the random signs and the samples set aside. Every setting is a refit, the default
one unless others are given. --budgets: the patterns for which budgets over layers are tried as well; --budget-samples:
with fewer samples than the pruning has; --by-refits: compared by prunings with a refit. --rotate: the model on other
axes of its residual stream. --folder: a Llama of one's own, with calibration.txt and heldout.txt beside model/, as
train_demo_model.py writes it. Prints every result, perplexity or accuracy, and then a markdown table for each model.
"""

import argparse
import ast
import copy
import statistics
import time
from itertools import product
from pathlib import Path

import moonshot as ms
from budgets import JOINT, SINGLE, image_model, text_model
from moonshot.app.demo import DEMO

PATTERNS = {
    "llama": ["2:4", "70%", "80%", "90%"],
    "vit": ["90%", "95%", "96%"],
    "resnet": ["90%", "94%", "96%"],
}
SAMPLES = {"llama": 64, "vit": 384, "resnet": 384}
METHODS = {  # solver, whether the objective is joint, whether each layer has a budget of its own
    "SparseGPT": (ms.SparseGPT(), False, False),
    "ADMM": (ms.ADMM(), False, False),
    "ADMM, joint": (ms.ADMM(), True, False),
    "ADMM, joint, budgets": (ms.ADMM(), True, True),
}


def setting(text: str) -> ms.Refit:
    """ "epochs=6,lr=0.02" as a Refit."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return ms.Refit(**{name: ast.literal_eval(value) for name, value in pairs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llama"], choices=list(PATTERNS))
    parser.add_argument("--patterns", nargs="+", help="instead of each model's own")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="64 windows or 384 images unless given")
    parser.add_argument("--budgets", nargs="+", default=[])
    parser.add_argument("--budget-samples", type=int)
    parser.add_argument("--by-refits", action="store_true")
    parser.add_argument("--settings", nargs="*", default=[""], help="none: without refits")
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--folder", type=Path, default=DEMO)
    arguments = parser.parse_args()
    for name in arguments.models:
        compare(name, arguments)


def compare(name: str, arguments: argparse.Namespace) -> None:
    samples = arguments.samples or SAMPLES[name]
    if name == "llama":
        model, calibration, measure = text_model(samples, arguments.folder)
    else:
        model, calibration, measure = image_model(name, samples)
    patterns = arguments.patterns or PATTERNS[name]
    refits = {"": False} | {
        f" + refit({text})" if text else " + refit": setting(text) for text in arguments.settings
    }
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in arguments.seeds:
        data, fewer = calibration(seed), calibration(seed, arguments.budget_samples or samples)
        dense = ms.rotate(model, data) if arguments.rotate else model
        for pattern, method in product(patterns, arguments.methods):
            solver, joint, budgets = METHODS[method]
            if budgets and pattern not in arguments.budgets:
                continue
            options = {"objective": JOINT[name] if joint else SINGLE, "solver": solver, "seed": seed}
            begin = time.perf_counter()
            chosen = pattern
            if budgets:
                chosen = ms.allocate(dense, fewer, pattern, refit=arguments.by_refits, **options)
            allocating = time.perf_counter() - begin
            for label, refit in refits.items():
                pruned, begin = copy.deepcopy(dense), time.perf_counter()
                ms.prune(pruned, data, chosen, refit=refit, **options)
                minutes = (allocating + time.perf_counter() - begin) / 60
                result = measure(pruned), minutes
                values.setdefault((method + label, pattern), []).append(result)
                print(
                    f"{name}, seed {seed}, {pattern}, {method}{label}: {result[0]:.2f}, {minutes:.1f} min",
                    flush=True,
                )
    print(
        f"\n{name}, dense {measure(model):.2f}, {samples} samples, mean +- deviation over seeds {arguments.seeds}\n"
    )
    print("| method | " + " | ".join(patterns) + " | minutes |")
    print("|---" * (len(patterns) + 2) + "|")
    methods = [method + label for method in arguments.methods for label in refits]
    for method in methods:
        found = [values.get((method, pattern), []) for pattern in patterns]
        minutes = [taken for results in found for _, taken in results]
        if minutes:
            cells = [cell([value for value, _ in results]) for results in found]
            print(f"| {method} | " + " | ".join(cells) + f" | {statistics.mean(minutes):.1f} |")


def cell(found: list[float]) -> str:
    if not found:
        return "-"
    spread = f" +- {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{spread}"


if __name__ == "__main__":
    main()
