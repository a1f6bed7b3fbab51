"""Where the time of `prune` goes on the shipped Llama.

    python benchmarks/profile_prune.py [--solver ADMM] [--pattern 2:4] [--samples 64] [--length 256]

Shares of the whole, by the parts of the work: passes of the model, statistics, problems (their terms added up, damped
and factored), solvers, grades. The rest is what it takes to hold that together.
"""

import argparse
import cProfile
import pstats
from pathlib import Path

import moonshot as ms
from moonshot.files.load import load
from moonshot.models.calibration import windows

DEMO = Path(ms.__file__).parent / "demo"
PARTS = {  # by file and function, none of which calls another
    "passes of the model": [
        ("blocks.py", "run"),
        ("blocks.py", "enter"),
        ("blocks.py", "leave"),
        ("cut.py", "_run"),
    ],
    "backward passes": [("__init__.py", "grad")],
    "statistics": [("statistics.py", "observe"), ("statistics.py", "pop")],
    "problems": [("objectives.py", "quadratics_of"), ("objectives.py", "weigh")],
    "solver: factorisations": [("SOLVER", "init")],
    "solver: the rest": [("SOLVER", "compute")],
    "grades": [("problem.py", "graded"), ("problem.py", "zero_value"), ("problem.py", "value")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    profile = cProfile.Profile()
    report = profile.runcall(ms.prune, model, calibration, arguments.pattern, solver=solver)
    stats = pstats.Stats(profile)
    whole = stats.total_tt  # type: ignore[attr-defined]
    print(f"{arguments.solver}, {arguments.pattern}, {arguments.samples} samples of {arguments.length} tokens")
    rest = whole
    for part, functions in PARTS.items():
        seconds = sum(cumulative(stats, file, name, type(solver).__module__) for file, name in functions)
        rest -= seconds
        print(f"{part:24} {seconds:7.2f} s  {100 * seconds / whole:5.1f} %")
    print(f"{'the rest':24} {rest:7.2f} s  {100 * rest / whole:5.1f} %")
    print(f"{'in all':24} {whole:7.2f} s, {report.seconds:.2f} s by the report")


def cumulative(stats: pstats.Stats, file: str, name: str, solver: str) -> float:
    """Seconds inside a function, its callees included."""
    file = f"{solver.rpartition('.')[2]}.py" if file == "SOLVER" else file
    return sum(
        found[3]
        for (path, _, function), found in stats.stats.items()  # type: ignore[attr-defined]
        if function == name and Path(path).name == file and ("moonshot" in path or "autograd" in path)
    )


if __name__ == "__main__":
    main()
