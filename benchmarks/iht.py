"""IHT against SparseGPT and ADMM on a random layer: relative value and seconds, initialisation included.

    python benchmarks/iht.py [--size 1024] [--factors 0 16] [--patterns 2:4 70% 90%]

Inputs are correlated: 32 common directions, a mean, and noise that falls off over the columns. Prints a markdown
table.
"""

import argparse

import moonshot as ms
import numpy as np


def correlated_layer(size: int, factors: int, seed: int = 0) -> ms.Problem:
    """A float32 layer (size x size) whose shared and low-rank parts have comparable traces."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * size, 32)) @ rng.normal(size=(32, size)) + rng.normal(size=size)
    x += 2 * np.geomspace(1, 0.05, size) * rng.normal(size=x.shape)
    a = x.T @ x
    a += 0.01 * np.mean(np.diag(a)) * np.eye(size)
    a /= np.mean(np.diag(a))
    weight = rng.normal(size=(size, size)).astype("f")
    u = rng.normal(size=(factors, size, size)).astype("f").transpose(1, 2, 0) if factors else None
    return ms.Problem(weight, ms.RowHessian(a, u if u is None else u * np.float32(0.7 / factors**0.5)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--factors", type=int, nargs="+", default=[0, 16])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "70%", "90%"])
    arguments = parser.parse_args()
    solvers = [ms.SparseGPT(), ms.ADMM(), ms.IHT()]
    print("| factors | pattern | " + " | ".join(solver.name for solver in solvers) + " |")
    print("|---" * (len(solvers) + 2) + "|")
    for factors in arguments.factors:
        warm = correlated_layer(64, factors)  # compiles the kernels
        for solver in solvers:
            ms.solve(warm, "2:4", solver)
            ms.solve(warm, 0.5, solver)
        for pattern in arguments.patterns:
            cells = []
            for solver in solvers:
                problem = correlated_layer(arguments.size, factors)  # so that no factorisation is reused
                result = ms.solve(problem, pattern, solver)
                cells.append(f"{result.relative:.5f}, {result.seconds:.1f} s, {result.iterations} it.")
            print(f"| {factors} | {pattern} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
