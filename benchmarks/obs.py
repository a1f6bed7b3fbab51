"""OBS at 1024 x 1024 against a plain batched torch OBC on the same rows, in alternation, and ten patterns against one.

python benchmarks/obs.py [--size 1024] [--factors 0] [--rows 48] [--runs 3]

Both sides run on the first `rows` rows, the torch side in one batch; the time of a whole layer is that times
size / rows. Per row both remove weights until none is left.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from solvers.benchmark_utils.references import torch_obc

import moonshot as ms


def timed(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--factors", type=int, default=0)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    d, n, m = arguments.size, arguments.factors, arguments.rows
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * d, d)) @ np.diag(np.geomspace(1, 0.05, d))
    a = x.T @ x
    a += 0.01 * np.mean(np.diag(a)) * np.eye(d)
    weight = rng.normal(size=(m, d)).astype("f")
    u = rng.normal(size=(n, m, d)).astype("f").transpose(1, 2, 0) if n else None
    joint = a if u is None else a + u.astype("d") @ u.astype("d").transpose(0, 2, 1)
    hessians = torch.from_numpy(np.broadcast_to(joint, (m, d, d)).astype("f"))
    solver, patterns = ms.OBS(), [ms.Unstructured(k / 10, "row") for k in (5, 1, 2, 3, 4, 6, 7, 8, 9, 9.5)]

    def start():  # a new problem each time, so that nothing is reused
        return solver.init(ms.Problem(weight, ms.RowHessian(a, u)))

    def whole():
        return start().trace

    def several(count):
        state = start()
        for pattern in patterns[:count]:
            solver.compute(state, pattern)

    tiny = ms.Problem(weight[:2, :8], ms.RowHessian(a[:8, :8], None if u is None else u[:2, :8]))
    for pattern in (0.2, 0.8):
        ms.solve(tiny, pattern, solver)  # compiles
    half = d // 2 - 1
    ours = np.cumsum(whole().increments, axis=1)[:, half].sum()
    losses = torch_obc(torch.from_numpy(weight), hessians, d, d)[1]
    theirs = float(losses.cumsum(dim=1)[:, half].sum())
    print(f"loss at half the weights against the reference's: {ours / theirs:.6f}")
    runs = [
        (
            timed(lambda: torch_obc(torch.from_numpy(weight), hessians, d, d)),
            timed(whole),
            timed(lambda: several(1)),
            timed(lambda: several(10)),
        )
        for _ in range(arguments.runs)
    ]
    for name, top, bottom in (("torch / OBS", 0, 1), ("ten patterns / one", 3, 2)):
        ratios = [run[top] / run[bottom] for run in runs]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: median {statistics.median(ratios):.2f} ({spread}), {m} rows of {d}, n = {n}")
    medians = [statistics.median(column) * d / m for column in zip(*runs, strict=True)]
    print(
        "seconds scaled from {} to {} rows: torch {:.0f}, OBS {:.1f}, one pattern {:.1f}, ten {:.1f}".format(
            m, d, *medians
        )
    )


if __name__ == "__main__":
    main()
