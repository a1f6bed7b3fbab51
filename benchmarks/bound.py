"""How near the lower bound and the relaxation alone come to the optimum on small rows, what the bound takes at the
size of real layers, and the gap that it leaves to ADMM's answer on a layer of the shipped Llama.

python benchmarks/bound.py [rows | time | llama] [--size 2048] [--factors 16]
"""

import argparse
import time
from pathlib import Path

import moonshot as ms
import numpy as np
from moonshot.bounds.relaxation import relaxation_bound
from solvers.benchmark_utils.grading import Layer, row_optima

SEEDS = 8


def random_row(seed: int, d: int, n: int, condition: float) -> Layer:
    """Eigenvalues from 1 down to 1 / condition, evenly on a log scale, in a random basis; n random factors."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    a = (basis * np.geomspace(1, 1 / condition, d)) @ basis.T
    factors = rng.normal(size=(1, d, n)) if n else None
    return Layer(rng.normal(size=(1, d)), (a + a.T) / 2, factors)


def rows() -> None:
    print(
        f"bound / optimum and, behind it, relaxation / optimum: median (least) of {SEEDS} rows of 8 to 14 inputs"
    )
    for condition in (1e1, 1e2, 1e3, 1e4, 1e6):
        for n in (0, 3):
            cells = []
            for sparsity in (0.5, 0.7):
                bounds, relaxed = [], []
                for seed in range(SEEDS):
                    d = 8 + seed % 7
                    row, pattern = random_row(seed, d, n, condition), ms.Unstructured(sparsity)
                    (optimum,) = row_optima(row, pattern)
                    problem = ms.Problem(row.weight, ms.RowHessian(row.A, row.U))
                    bounds.append(ms.lower_bound(problem, pattern) / optimum)
                    size, zeros = pattern.groups(problem.shape)
                    relaxed.append(relaxation_bound(problem, size, zeros, 60) / optimum)
                parts = [f"{np.median(ratios):.2f} ({min(ratios):.2f})" for ratios in (bounds, relaxed)]
                cells.append(", ".join(parts))
            print(f"condition {condition:.0e}, n = {n}: 50 % {cells[0]}; 70 % {cells[1]}", flush=True)


def large(size: int, n: int, patterns: list[str]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * size, size)).astype("f") @ np.diag(np.geomspace(1, 0.05, size)).astype("f")
    a = (x.T @ x).astype("d")
    a += 0.01 * np.mean(np.diag(a)) * np.eye(size)
    weight = rng.normal(size=(size, size)).astype("f")
    for factors in sorted({0, n}):
        u = rng.normal(size=(factors, size, size)).astype("f").transpose(1, 2, 0) if factors else None
        for pattern in patterns:
            problem = ms.Problem(weight, ms.RowHessian(a, u))
            begin, cpu = time.perf_counter(), time.process_time()
            bound = ms.lower_bound(problem, pattern)
            wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
            share = bound / problem.zero_value()
            print(
                f"{size} x {size}, n = {factors}, {pattern}: {wall:.0f} s of wall clock, {cpu:.0f} s of processor, "
                f"{share:.4f} of F(0)",
                flush=True,
            )


def llama(layer: str) -> None:
    import torch
    from moonshot.files.load import load
    from moonshot.models.calibration import windows

    demo = Path(ms.__file__).parent / "demo"
    model, tokenizer = load(str(demo / "model"))
    model = model.to(torch.float32)
    calibration = windows(tokenizer, (demo / "calibration.txt").read_text("utf-8"), 32, 256, 0)
    module, seen = model.get_submodule(layer), []
    handle = module.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    with torch.no_grad():
        for tokens in calibration.split(8):
            model(tokens)
    handle.remove()
    problem = ms.Reconstruction().problem(module.weight.detach(), inputs=torch.cat(seen))
    for pattern in ("2:4", "70%", "90%"):
        result = ms.solve(problem, pattern, ms.ADMM())
        begin = time.perf_counter()
        bound = ms.lower_bound(problem, pattern)
        seconds = time.perf_counter() - begin
        print(
            f"{layer} {tuple(module.weight.shape)}, {pattern}: ADMM {result.value:.6f}, bound {bound:.6f}, "
            f"bound / ADMM {bound / result.value:.3f}, {seconds:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rows", "time", "llama"))
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "70%"])
    parser.add_argument("--layer", default="model.layers.1.self_attn.q_proj")
    arguments = parser.parse_args()
    if arguments.what == "rows":
        rows()
    elif arguments.what == "time":
        large(arguments.size, arguments.factors, arguments.patterns)
    else:
        llama(arguments.layer)


if __name__ == "__main__":
    main()
