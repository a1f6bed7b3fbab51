"""Ten weightings, and ten sparsities, of one layer against separate runs: time and values.

python benchmarks/weighting_sweep.py [--size 1024] [--factors 16] [--runs 3] [--solvers SparseGPT ADMM IHT OBS]

Times are those of everything from the observations of the layer to the graded results. Separate runs share nothing;
"a single run" is the mean of ten of them. Values are relative to those of the separate runs. IHT begins each weighting
at the answer to the one before.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import moonshot as ms
import numpy as np

WEIGHTINGS = [(1 - b) * ms.Reconstruction() + b * ms.Fisher() for b in np.linspace(0, 0.9, 10)]
SPARSITIES = [round(0.5 + 0.05 * k, 2) for k in range(10)]
MIDDLE, PATTERN = WEIGHTINGS[5], "50%"


def layer(size: int, factors: int) -> dict[str, np.ndarray]:
    """A layer with correlated inputs, whose gradients are sums of outer products of them."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    x = rng.normal(size=(2 * size, size)) @ (np.geomspace(1, 1e-3, size)[:, None] * basis)
    tokens, deltas = x[rng.integers(0, len(x), (factors, 16))], rng.normal(size=(factors, 16, size))
    seen = {
        "weight": rng.normal(size=(size, size)),
        "inputs": x,
        "gradients": deltas.transpose(0, 2, 1) @ tokens,
    }
    return {name: array.astype("f") for name, array in seen.items()}


def weightings(seen: dict[str, np.ndarray], solver: ms.Solver) -> list[ms.Result]:
    results = []
    for problem in ms.weighting_sweep(WEIGHTINGS, **seen):
        results.append(ms.solve(problem, PATTERN, solver))
        if isinstance(solver, ms.IHT):
            solver = replace(solver, start=results[-1].weight)
    return results


def separate_weightings(seen: dict[str, np.ndarray], solver: ms.Solver) -> list[ms.Result]:
    return [ms.solve(*ms.weighting_sweep([one], **seen), PATTERN, solver) for one in WEIGHTINGS]


def sparsities(seen: dict[str, np.ndarray], solver: ms.Solver) -> list[ms.Result]:
    problem = MIDDLE.problem(**seen)
    state = solver.init(problem)
    return [ms.solve(problem, sparsity, solver, state=state) for sparsity in SPARSITIES]


def separate_sparsities(seen: dict[str, np.ndarray], solver: ms.Solver) -> list[ms.Result]:
    return [ms.solve(MIDDLE.problem(**seen), sparsity, solver) for sparsity in SPARSITIES]


def timed(run: Callable, *arguments) -> tuple[float, list[float]]:
    """(seconds, values)"""
    begin = time.perf_counter()
    results = run(*arguments)
    return time.perf_counter() - begin, [result.value for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--solvers", nargs="+", default=["SparseGPT", "ADMM", "IHT", "OBS"])
    arguments = parser.parse_args()
    seen, small = layer(arguments.size, arguments.factors), layer(32, arguments.factors)
    for name in arguments.solvers:
        solver = getattr(ms, name)()
        for together, apart in ((weightings, separate_weightings), (sparsities, separate_sparsities)):
            together(small, solver), apart(small, solver)  # kernels are compiled here
            runs = [(timed(together, seen, solver), timed(apart, seen, solver)) for _ in range(arguments.runs)]
            times = [10 * shared / separate for (shared, _), (separate, _) in runs]
            (_, values), (_, references) = runs[0]
            ratios = [value / reference for value, reference in zip(values, references, strict=True)]
            print(
                f"{name}, ten {together.__name__}: {statistics.median(times):.2f} single runs "
                f"({min(times):.2f} to {max(times):.2f}) of {statistics.median(run[1][0] for run in runs) / 10:.2f} s; "
                f"values {statistics.mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}) of the separate ones",
                flush=True,
            )


if __name__ == "__main__":
    main()
