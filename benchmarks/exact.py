"""Branch and bound: time and nodes of a row against columns, pattern and condition number, on one core.

NUMBA_NUM_THREADS=1 python benchmarks/exact.py [--rows 8] [--factors 8] [--nodes 100000] [--conditions 10 1e3 1e6]
"""

import argparse
import statistics

import moonshot as ms
import numpy as np

PATTERNS = [*(ms.Unstructured(sparsity, scope="row") for sparsity in (0.3, 0.5, 0.7)), ms.NM(2, 4)]


def random_layer(seed: int, columns: int, factors: int, condition: float, rows: int = 1) -> ms.Problem:
    """Eigenvalues of A from 1 down to 1 / condition; factors a tenth of A in trace."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(columns, columns)))
    eigenvalues = np.geomspace(1, 1 / condition, columns)
    a = (basis * eigenvalues) @ basis.T
    u = rng.normal(size=(rows, columns, factors)) * np.sqrt(
        0.1 * eigenvalues.sum() / (columns * max(factors, 1))
    )
    return ms.Problem(rng.normal(size=(rows, columns)), ms.RowHessian((a + a.T) / 2, u))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--factors", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--conditions", type=float, nargs="+", default=[1e1, 1e3, 1e6])
    arguments = parser.parse_args()
    solver = ms.Exact(nodes=arguments.nodes)
    ms.solve(random_layer(0, 4, arguments.factors, 10), "2:4", solver)  # compiles
    print("columns  condition  pattern       proven  median nodes  median s  max s  median gap")
    for condition in arguments.conditions:
        for columns in (20, 32, 40, 48, 64):
            for pattern in PATTERNS:
                problems = [
                    random_layer(i, columns, arguments.factors, condition) for i in range(arguments.rows)
                ]
                results = [ms.solve(problem, pattern, solver) for problem in problems]
                proven = sum(result.status is ms.Status.OPTIMAL for result in results)
                seconds = [result.seconds for result in results]
                print(
                    f"{columns:7d}  {condition:9.0e}  {pattern!s:12s}  {proven:3d}/{len(results)}"
                    f"  {statistics.median(result.iterations for result in results):12.0f}"
                    f"  {statistics.median(seconds):8.3f}  {max(seconds):5.2f}"
                    f"  {statistics.median(result.gap for result in results):10.2g}",
                    flush=True,
                )
    print("layer, 50% over all rows: rows  columns  condition  status  nodes  s")
    for condition in arguments.conditions:
        for rows, columns in ((4, 16), (16, 16), (4, 24), (16, 24)):
            result = ms.solve(random_layer(0, columns, arguments.factors, condition, rows), 0.5, solver)
            print(
                f"{rows} {columns} {condition:.0e} {result.status} {result.iterations} {result.seconds:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
