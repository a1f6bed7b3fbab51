"""`prune` with torch and NumPy imported first: how long it takes where OpenBLAS's threads spin, and where they sleep.

    python benchmarks/threads.py [--solver ADMM] [--samples 32] [--rounds 3]

The shipped Llama to 2:4, in new processes, in turn. Prints seconds, those of all processors, and the ratios of both,
sleeping to spinning: the median over rounds, the least and the largest. Other processes on the same cores spoil it.
"""

import argparse
import os
import subprocess
import sys
from statistics import median

SPINNING = {"OPENBLAS_THREAD_TIMEOUT": "26"}  # as OpenBLAS has it by itself
RUN = """
import os, sys, time
import torch, numpy
import moonshot as ms
from pathlib import Path
from moonshot.files.load import load
from moonshot.models.calibration import windows
demo = Path(ms.__file__).parent / "demo"
solver, samples = getattr(ms, sys.argv[1])(), int(sys.argv[2])
for count in (4, samples):  # what is compiled once, before
    model, tokenizer = load(str(demo / "model"))
    calibration = windows(tokenizer, (demo / "calibration.txt").read_text(), count, 256)
    begin, used = time.perf_counter(), time.process_time()
    ms.prune(model, calibration, "2:4", solver=solver)
print(time.perf_counter() - begin, time.process_time() - used)
"""


def timed(solver: str, samples: int, settings: dict[str, str]) -> tuple[float, float]:
    """(seconds, seconds of all processors) of a run in a new process."""
    clean = {name: value for name, value in os.environ.items() if name not in SPINNING}
    command = [sys.executable, "-c", RUN, solver, str(samples)]
    ran = subprocess.run(command, env=clean | settings, stdout=subprocess.PIPE, text=True, check=True)
    wall, used = map(float, ran.stdout.split())
    return wall, used


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--solver", default="ADMM", choices=["ADMM", "SparseGPT", "IHT"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = []
    for _ in range(arguments.rounds):
        spinning, sleeping = (
            timed(arguments.solver, arguments.samples, settings) for settings in (SPINNING, {})
        )
        rounds.append((spinning, sleeping))
        print(
            f"spinning {spinning[0]:.1f} s ({spinning[1]:.1f}), sleeping {sleeping[0]:.1f} s ({sleeping[1]:.1f})"
        )
    for k, name in enumerate(("seconds", "of all processors")):
        ratios = sorted(sleeping[k] / spinning[k] for spinning, sleeping in rounds)
        print(f"{name}: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
