"""Where the time of `prune` goes on the shipped Llama.

    python -m benchmarks.profile_prune [--solver ADMM] [--pattern 2:4] [--samples 64] [--length 256]

Shares of the whole, by the parts of the work. The rest is what it takes to hold them together.
"""

import argparse
import sys
from pathlib import Path

import moonshot as ms
from moonshot.files.load import load
from moonshot.models.calibration import windows

from .gpu.phases import Clock, watch_all

DEMO = Path(ms.__file__).parent / "demo"
PARTS = {  # by part of the work and module: functions, or methods of a class
    "a trial run": {"moonshot.pruning.prune": ["partition_model"]},
    "passes of the model": {"moonshot.models.blocks": ["Chain.enter", "Chain.run", "Chain.leave"]},
    "backward passes": {"torch.autograd": ["grad"]},
    "statistics": {"moonshot.models.statistics": ["LayerStatistics.observe"]},
    "problems": {"moonshot.pruning.calibration_pass": ["CalibrationPass.problems"]},
    "grades": {"moonshot.layer.problem": ["Problem.graded"], "moonshot.solvers.base": ["check_answer"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_prune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--solver", default="ADMM", choices=["ADMM", "SparseGPT", "IHT", "OBS"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    solver = getattr(ms, arguments.solver)()
    model, tokenizer = load(str(DEMO / "model"))
    text = (DEMO / "calibration.txt").read_text()
    calibration = windows(tokenizer, text, arguments.samples, arguments.length)
    ms.prune(model, calibration, arguments.pattern, solver=solver)  # what is compiled once
    model, _ = load(str(DEMO / "model"))
    clock = Clock()
    names = {part: watch_all(clock, functions) for part, functions in PARTS.items()}
    names["solver"] = watch_all(clock, {}, solver)
    with clock.phase("the rest"):
        ms.prune(model, calibration, arguments.pattern, solver=solver)
    if unseen := [name for phases in names.values() for name in phases if not clock.times[name]]:
        sys.exit(f"prune never called {', '.join(unseen)}: its time is in another part")
    whole = sum(clock.seconds.values())
    print(f"{arguments.solver}, {arguments.pattern}, {arguments.samples} samples of {arguments.length} tokens")
    for part, phases in {**names, "the rest": ["the rest"]}.items():
        seconds = sum(clock.seconds[phase] for phase in phases)
        print(f"{part:24} {seconds:7.2f} s  {100 * seconds / whole:5.1f} %")
    print(f"{'in all':24} {whole:7.2f} s")


if __name__ == "__main__":
    main()
