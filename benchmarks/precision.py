"""Passes in bfloat16 against passes in float32: held-out perplexity of the shipped Llama, in bfloat16, pruned by both.

python benchmarks/precision.py [--solver ADMM] [--pattern 2:4] [--seeds 3] [--samples 64] [--length 256]
                               [--device cpu]
"""

import argparse
import statistics
from pathlib import Path

import moonshot as ms
import torch
from moonshot.evaluation import perplexity
from moonshot.files.load import load
from moonshot.models.calibration import windows

DEMO = Path(ms.__file__).parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver", default="ADMM", choices=["ADMM", "SparseGPT"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    _, tokenizer = load(str(DEMO / "model"))
    held_out = windows(tokenizer, (DEMO / "heldout.txt").read_text("utf-8"), 40, 256, seed=None)
    text = (DEMO / "calibration.txt").read_text("utf-8")
    differences = []
    for seed in range(arguments.seeds):
        found = {}
        for precision in ("float32", "model"):
            model = load(str(DEMO / "model"))[0].to(torch.bfloat16)
            calibration = windows(tokenizer, text, arguments.samples, arguments.length, seed=seed)
            solver = getattr(ms, arguments.solver)()
            how = {"seed": seed, "precision": precision, "device": arguments.device}
            ms.prune(model, calibration, arguments.pattern, solver=solver, **how)
            found[precision] = perplexity(model, held_out).value
        differences.append(found["model"] - found["float32"])
        print(f"seed {seed}: float32 {found['float32']:.3f}, bfloat16 {found['model']:.3f}", flush=True)
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    print(f"difference {statistics.mean(differences):+.4f} +- {spread:.4f} (standard deviation over seeds)")


if __name__ == "__main__":
    main()
