"""Solvers and objectives on the shipped Llama: held-out perplexity, mean and spread over seeds of the calibration data.

    python benchmarks/llama.py [--patterns 2:4 70% 80%] [--seeds 3] [--samples 64] [--factors 16]
                               [--methods PART ...] [--auto]

A seed chooses the calibration windows and the random signs. Prints a markdown table.
"""

import argparse
import statistics
import time

import moonshot as ms
from moonshot.comparison import compare
from moonshot.pruning import DEFAULT_OBJECTIVE

R, F, T = ms.Reconstruction(), ms.Fisher(), ms.TokenFisher()
METHODS = [
    ("SparseGPT, reconstruction", ms.SparseGPT(), R),
    ("SparseGPT, default", ms.SparseGPT(), DEFAULT_OBJECTIVE),
    ("ADMM, reconstruction", ms.ADMM(), R),
    ("ADMM, Fisher", ms.ADMM(), F),
    ("ADMM, 0.9 R + 0.1 F", ms.ADMM(), 0.9 * R + 0.1 * F),
    ("ADMM, 0.5 R + 0.5 F", ms.ADMM(), 0.5 * R + 0.5 * F),
    ("ADMM, 0.5 R + 0.5 T", ms.ADMM(), 0.5 * R + 0.5 * T),
    ("ADMM, 0.2 R + 0.4 T + 0.4 F", ms.ADMM(), 0.2 * R + 0.4 * T + 0.4 * F),
    ("ADMM, default (0.6 R + 0.2 T + 0.2 F)", ms.ADMM(), DEFAULT_OBJECTIVE),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "70%", "80%"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=[""], help="only those whose names hold one of these")
    parser.add_argument("--auto", action="store_true", help='also objective="auto"')
    arguments = parser.parse_args()
    methods = [*METHODS, ("ADMM, auto", ms.ADMM(), "auto")] if arguments.auto else METHODS
    methods = [method for method in methods if any(part in method[0] for part in arguments.methods)]
    begin = time.perf_counter()
    runs = [
        compare(
            arguments.patterns,
            methods,
            samples=arguments.samples,
            factors=arguments.factors,
            seed=seed,
            on_step=lambda step: print(
                f"\r{time.perf_counter() - begin:5.0f} s  {step:60}", end="", flush=True
            ),
        )
        for seed in range(arguments.seeds)
    ]
    dense = runs[0].dense
    print(f"\r\nHeld-out perplexity, dense {dense}; {arguments.samples} calibration windows,")
    print(f"{arguments.factors} factors, mean +- standard deviation over {arguments.seeds} seeds\n")
    print("| method | " + " | ".join(arguments.patterns) + " |")
    print("|---" * (len(arguments.patterns) + 1) + "|")
    for rows in zip(*(run.rows for run in runs), strict=True):
        cells = []
        for pattern in arguments.patterns:
            values = [row.perplexities[pattern] for row in rows]
            spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        print(f"| {rows[0].method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
