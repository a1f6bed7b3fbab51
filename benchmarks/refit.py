"""With and without a refit on the shipped models: perplexity or accuracy, and minutes, over seeds.

    python benchmarks/refit.py [--models llama vit resnet] [--patterns 2:4 70% 80% 90%] [--methods PART ...] [--seeds 3]
                               [--samples N] [--settings epochs=6,lr=0.02 ...]

A seed chooses the calibration data, the random signs and the samples set aside. Every setting is a refit, the default
one unless others are given. Prints every result and then a markdown table for each model.
"""

import argparse
import ast
import copy
import statistics
import time

import moonshot as ms
from budgets import JOINT, SINGLE, image_model, text_model

PATTERNS = {
    "llama": ["2:4", "70%", "80%", "90%"],
    "vit": ["90%", "95%", "96%"],
    "resnet": ["90%", "94%", "96%"],
}
SAMPLES = {"llama": 64, "vit": 384, "resnet": 384}
METHODS = {
    "SparseGPT, reconstruction": (ms.SparseGPT(), lambda model: SINGLE),
    "ADMM, reconstruction": (ms.ADMM(), lambda model: SINGLE),
    "ADMM, joint": (ms.ADMM(), JOINT.__getitem__),
}


def setting(text: str) -> ms.Refit:
    """ "epochs=6,lr=0.02" as a Refit."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return ms.Refit(**{name: ast.literal_eval(value) for name, value in pairs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llama"], choices=list(PATTERNS))
    parser.add_argument("--patterns", nargs="+", help="instead of each model's own")
    parser.add_argument("--methods", nargs="+", default=[""], help="only those whose names hold one of these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="64 windows or 384 images unless given")
    parser.add_argument("--settings", nargs="+", default=[""])
    arguments = parser.parse_args()
    for name in arguments.models:
        compare(name, arguments)


def compare(name: str, arguments: argparse.Namespace) -> None:
    samples = arguments.samples or SAMPLES[name]
    model, calibration, measure = text_model(samples) if name == "llama" else image_model(name, samples)
    patterns = arguments.patterns or PATTERNS[name]
    refits = {"": False} | {
        f" + refit({text})" if text else " + refit": setting(text) for text in arguments.settings
    }
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        data = calibration(seed)
        for method, (solver, objective) in METHODS.items():
            if not any(part in method for part in arguments.methods):
                continue
            for pattern in patterns:
                for label, refit in refits.items():
                    pruned, begin = copy.deepcopy(model), time.perf_counter()
                    ms.prune(
                        pruned, data, pattern, objective=objective(name), solver=solver, seed=seed, refit=refit
                    )
                    result = measure(pruned), (time.perf_counter() - begin) / 60
                    values.setdefault((method + label, pattern), []).append(result)
                    print(
                        f"{name}, seed {seed}, {method}{label}, {pattern}: {result[0]:.2f}, {result[1]:.1f} min",
                        flush=True,
                    )
    print(
        f"\n{name}, dense {measure(model):.2f}, {samples} samples, mean +- deviation over {arguments.seeds} seeds\n"
    )
    print("| method | " + " | ".join(patterns) + " | minutes |")
    print("|---" * (len(patterns) + 2) + "|")
    for method in dict.fromkeys(method for method, _ in values):
        cells = [cell([value for value, _ in values[method, pattern]]) for pattern in patterns]
        minutes = statistics.mean(taken for pattern in patterns for _, taken in values[method, pattern])
        print(f"| {method} | " + " | ".join(cells) + f" | {minutes:.1f} |")


def cell(found: list[float]) -> str:
    spread = f" +- {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{spread}"


if __name__ == "__main__":
    main()
