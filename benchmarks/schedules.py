"""What ADMM's growing penalty costs and gains: iterations and values on the problems of the shipped Llama.

    python benchmarks/schedules.py [--growths 1.02 1.03 1.04 1.05 1.08 1.12 1.2] [--patterns 2:4 70%]

The problems are those that a sweep of the model at 2:4 meets, each with its factors and without. Values are relative to
those of the first growth: the geometric mean over problems and patterns, and the worst.
"""

import argparse
import math
import statistics
from pathlib import Path
from unittest import mock

import moonshot as ms
from moonshot.files.load import load
from moonshot.models.calibration import windows

DEMO = Path(ms.__file__).parent / "demo"


def problems(samples: int) -> list[ms.Problem]:
    """Every layer's problem, and the one of its shared matrix alone."""
    model, tokenizer = load(str(DEMO / "model"))
    found: list[ms.Problem] = []
    start = ms.SparseGPT.init

    def recording(solver: ms.SparseGPT, problem: ms.Problem):
        found.append(problem)
        return start(solver, problem)

    with mock.patch.object(ms.SparseGPT, "init", recording):
        text = (DEMO / "calibration.txt").read_text()
        ms.prune(model, windows(tokenizer, text, samples, 256), "2:4", solver=ms.SparseGPT())
    return found + [ms.Problem(problem.centre, ms.RowHessian(problem.hessian.A)) for problem in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--growths", type=float, nargs="+", default=[1.02, 1.03, 1.04, 1.05, 1.08, 1.12, 1.2])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "70%"])
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    found, first = problems(arguments.samples), None
    print("| growth | iterations, mean | value, mean | value, worst |\n|---|---|---|---|")
    for growth in arguments.growths:
        solver, values, iterations = ms.ADMM(growth=growth), [], []
        for problem in found:
            state = solver.init(problem)
            for pattern in map(ms.as_pattern, arguments.patterns):
                answer = solver.compute(state, pattern)
                values.append(math.log(problem.value(answer.weight)))
                iterations.append(answer.iterations)
        first = first or values
        gaps = [value - before for value, before in zip(values, first, strict=True)]
        print(
            f"| {growth:g} | {statistics.mean(iterations):.0f} | {math.exp(statistics.mean(gaps)):.4f} | "
            f"{math.exp(max(gaps)):.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
