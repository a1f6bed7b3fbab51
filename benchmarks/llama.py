"""Solvers and objectives on the shipped Llama: held-out perplexity, mean and spread over seeds of the calibration data.

    python benchmarks/llama.py [--patterns 2:4 70% 80%] [--seeds 3] [--samples 64] [--factors 16]
                               [--methods PART ...]

A seed chooses the calibration windows and the random signs. Prints every result and then a markdown table.
"""

import argparse
import itertools
import statistics
import time

import moonshot as ms
from moonshot.app.demo import compare
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE

R, F, T = ms.Reconstruction(), ms.Fisher(), ms.TokenFisher()
METHODS = [
    ("SparseGPT, reconstruction", ms.SparseGPT(), R),
    ("SparseGPT, default", ms.SparseGPT(), DEFAULT_OBJECTIVE),
    ("ADMM, reconstruction", ms.ADMM(), R),
    ("ADMM, Fisher", ms.ADMM(), F),
    ("ADMM, 0.8 R + 0.2 F", ms.ADMM(), 0.8 * R + 0.2 * F),
    ("ADMM, 0.5 R + 0.5 F", ms.ADMM(), 0.5 * R + 0.5 * F),
    ("ADMM, 0.5 R + 0.5 T", ms.ADMM(), 0.5 * R + 0.5 * T),
    ("ADMM, 0.2 R + 0.4 T + 0.4 F", ms.ADMM(), 0.2 * R + 0.4 * T + 0.4 * F),
    ("ADMM, default (0.6 R + 0.2 T + 0.2 F)", ms.ADMM(), DEFAULT_OBJECTIVE),
    ("ADMM, auto", ms.ADMM(), "auto"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "70%", "80%"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=[""], help="only those whose names hold one of these")
    arguments = parser.parse_args()
    methods = [method for method in METHODS if any(part in method[0] for part in arguments.methods)]
    values: dict[tuple[str, str], list[float]] = {}
    begin = time.perf_counter()
    for seed, pattern, method in itertools.product(range(arguments.seeds), arguments.patterns, methods):
        run = compare((pattern,), [method], samples=arguments.samples, factors=arguments.factors, seed=seed)
        dense, value = run.dense, run.rows[0].perplexities[pattern]
        values.setdefault((method[0], pattern), []).append(value)
        print(
            f"{time.perf_counter() - begin:5.0f} s  seed {seed}, {pattern}, {method[0]}: {value:.3f}",
            flush=True,
        )
    print(f"\nHeld-out perplexity, dense {dense}; {arguments.samples} calibration windows,")
    print(f"{arguments.factors} factors, mean +- standard deviation over {arguments.seeds} seeds\n")
    print("| method | " + " | ".join(arguments.patterns) + " |")
    print("|---" * (len(arguments.patterns) + 1) + "|")
    for name, _, _ in methods:
        cells = []
        for pattern in arguments.patterns:
            found = values[name, pattern]
            spread = f" +- {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
