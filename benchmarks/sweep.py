"""The sweep at 2048 x 2048, joint and single, against a plain torch SparseGPT, in alternation.

python benchmarks/sweep.py [--size 2048] [--factors 16] [--runs 5]
"""

import argparse
import statistics
import time

import numpy as np
import torch
from solvers.benchmark_utils.references import torch_sparsegpt

import moonshot as ms


def timed(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    d, n = arguments.size, arguments.factors
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * d, d)).astype("f") @ np.diag(np.geomspace(1, 0.05, d)).astype("f")
    a = (x.T @ x).astype("d")
    a += 0.01 * np.mean(np.diag(a)) * np.eye(d)
    weight = rng.normal(size=(d, d)).astype("f")
    u = rng.normal(size=(n, d, d)).astype("f").transpose(1, 2, 0)
    pattern, solver = ms.NM(2, 4), ms.SparseGPT()

    def sweep(factors):  # a new problem each time, so that no factorisation is reused
        problem = ms.Problem(weight, ms.RowHessian(a, factors))
        return solver.compute(solver.init(problem), pattern)

    hessian = torch.from_numpy(a.astype("f"))
    reference = torch_sparsegpt(torch.from_numpy(weight), hessian).numpy()
    grade = ms.Problem(weight, ms.RowHessian(a))
    print(f"value against the reference's: {grade.value(sweep(None).weight) / grade.value(reference):.6f}")
    sweep(u)
    runs = [
        (
            timed(lambda: torch_sparsegpt(torch.from_numpy(weight), hessian)),
            timed(lambda: sweep(None)),
            timed(lambda: sweep(u)),
        )
        for _ in range(arguments.runs)
    ]
    for name, top, bottom in (("single / torch", 1, 0), ("joint / single", 2, 1)):
        ratios = [run[top] / run[bottom] for run in runs]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: median {statistics.median(ratios):.2f} ({spread}), {d} x {d}, n = {n}")
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    print("median seconds: torch {:.2f}, single {:.2f}, joint {:.2f}".format(*medians))


if __name__ == "__main__":
    main()
