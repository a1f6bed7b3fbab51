"""What Swaps adds to ADMM: the share of small rows solved to optimality, and a layer of real size.

python benchmarks/swaps.py small [--rows 60]
python benchmarks/swaps.py layer [--rows 1024] [--size 1024] [--factors 16] [--pattern 2:4]
"""

import argparse
import itertools

import moonshot as ms
import numpy as np
from solvers.benchmark_utils.grading import Layer, row_optima


def small(rows: int, columns: int = 14, factors: int = 3) -> None:
    solvers = [ms.ADMM(), *(ms.Swaps(inner) for inner in (ms.ADMM(), ms.SparseGPT(), ms.Magnitude()))]
    print(f"share of {rows} rows of {columns} solved to optimality, and the mean excess over it")
    print("zeros  condition", *(f"{solver.name:>20}" for solver in solvers))
    for sparsity, exponent in itertools.product((0.5, 0.7), range(1, 7)):
        rng = np.random.default_rng(exponent)
        pattern = ms.Unstructured(sparsity, scope="row")
        excess = np.empty((len(solvers), rows))
        for i in range(rows):  # a Hessian of its own for every row
            basis = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
            a = (basis * np.geomspace(1, 10.0**-exponent, columns)) @ basis.T
            u = 0.1 * rng.normal(size=(1, columns, factors))
            row = Layer(rng.normal(size=(1, columns)), (a + a.T) / 2, u)
            problem = ms.Problem(row.weight, ms.RowHessian(row.A, row.U))
            (optimum,) = row_optima(row, pattern)
            excess[:, i] = [ms.solve(problem, pattern, solver).value / optimum - 1 for solver in solvers]
        cells = (f"{np.mean(e < 1e-6):11.0%} {np.mean(e):8.3f}" for e in excess)
        print(f"{sparsity:5.0%}  {f'1e{exponent}':>9}", *cells)


def layer(rows: int, size: int, factors: int, pattern: str) -> None:
    rng = np.random.default_rng(0)
    mixing = np.geomspace(1, 0.05, size)[:, None] * np.linalg.qr(rng.normal(size=(size, size)))[0]
    x = rng.normal(size=(2 * size, size)) @ mixing
    a = x.T @ x
    a = a / np.mean(np.diag(a)) + 0.01 * np.eye(size)
    u = rng.normal(size=(rows, size, factors)).astype("f") * np.sqrt(0.3 / max(factors, 1))
    problem = ms.Problem(rng.normal(size=(rows, size)).astype("f"), ms.RowHessian(a, u))
    for solver in (ms.ADMM(), ms.Swaps(ms.ADMM())):
        few = ms.Problem(problem.weight[:2], ms.RowHessian(a, u[:2]))
        ms.solve(few, pattern, solver)  # compiles
        result = ms.solve(problem, pattern, solver)
        exchanges = f", {result.iterations / rows:.1f} exchanges a row" if "Swaps" in solver.name else ""
        print(
            f"{rows} x {size}, n = {factors}, {pattern}, {solver.name}: relative {result.relative:.5f}, "
            f"{result.seconds:.1f} s, {result.status}{exchanges}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["small", "layer"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--pattern", default="2:4")
    arguments = parser.parse_args()
    if arguments.what == "small":
        small(arguments.rows or 60)
    else:
        layer(arguments.rows or arguments.size, arguments.size, arguments.factors, arguments.pattern)


if __name__ == "__main__":
    main()
