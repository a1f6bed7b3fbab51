"""Solvers and objectives on the shipped Llama: held-out perplexity, mean and spread over seeds of the calibration data.

    python benchmarks/llama.py [--patterns 2:4 70% 80%] [--seeds 3] [--samples 64] [--factors 16]
                               [--methods PART ...] [--folder FOLDER]

A seed chooses the calibration windows and the random signs. Prints every result and then a markdown table; with a
folder, an interrupted run continues.
"""

import argparse
import time

import moonshot as ms
from moonshot.app.demo import compare
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE

R, F, T = ms.Reconstruction(), ms.Fisher(), ms.TokenFisher()
METHODS = {
    "SparseGPT, reconstruction": (ms.SparseGPT(), R),
    "SparseGPT, default": (ms.SparseGPT(), DEFAULT_OBJECTIVE),
    "ADMM, reconstruction": (ms.ADMM(), R),
    "ADMM, Fisher": (ms.ADMM(), F),
    "ADMM, 0.8 R + 0.2 F": (ms.ADMM(), 0.8 * R + 0.2 * F),
    "ADMM, 0.5 R + 0.5 F": (ms.ADMM(), 0.5 * R + 0.5 * F),
    "ADMM, 0.5 R + 0.5 T": (ms.ADMM(), 0.5 * R + 0.5 * T),
    "ADMM, 0.2 R + 0.4 T + 0.4 F": (ms.ADMM(), 0.2 * R + 0.4 * T + 0.4 * F),
    "ADMM, default (0.6 R + 0.2 T + 0.2 F)": (ms.ADMM(), DEFAULT_OBJECTIVE),
    "ADMM, auto": (ms.ADMM(), "auto"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "70%", "80%"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=[""], help="only those whose names hold one of these")
    parser.add_argument("--folder", help="where results are stored as soon as there are any")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    found = compare(
        arguments.patterns,
        {name: method for name, method in METHODS.items() if any(part in name for part in arguments.methods)},
        samples=arguments.samples,
        factors=arguments.factors,
        seeds=arguments.seeds,
        folder=arguments.folder,
        on_run=lambda run, total: print(f"{time.perf_counter() - begin:5.0f} s  {run}", flush=True),
    )
    print(f"\n{arguments.samples} calibration windows, {arguments.factors} factors\n\n{found}")


if __name__ == "__main__":
    main()
