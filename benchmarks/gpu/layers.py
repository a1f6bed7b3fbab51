"""Solvers on random layers beside torch references on the same device."""

from collections.abc import Callable
from functools import partial

import moonshot as ms
import torch
from moonshot.linalg.backend import computing_on

from ..solvers.benchmark_utils.references import torch_alps, torch_sparsegpt
from .rows import Rows

FACTORS, MANY = 16, 128
FEW = 8  # rows of what is computed on the CPU
PATTERN = ms.NM(2, 4)


def layer(m: int, d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (m, d) and a shared matrix (d, d) of correlated inputs, a hundredth of its mean diagonal a ridge."""
    make = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(3 * d, d, generator=make, device=device) * torch.logspace(0, -1, d, device=device)
    mixing = torch.eye(d, device=device) + 0.3 * torch.randn(d, d, generator=make, device=device) / d**0.5
    inputs = inputs @ mixing
    shared = inputs.T @ inputs
    shared = (shared + shared.T) / 2
    shared = shared / shared.diagonal().mean() + 0.01 * torch.eye(d, device=device)
    return torch.randn(m, d, generator=make, device=device), shared


def factors(m: int, d: int, n: int, device: str) -> torch.Tensor:
    """Factors (m, d, n), laid out (n, m, d)."""
    make = torch.Generator(device).manual_seed(1)
    return (torch.randn(n, m, d, generator=make, device=device) * (0.2 / n**0.5)).permute(1, 2, 0)


def solved(
    solver: ms.Solver, weight: torch.Tensor, *hessian: torch.Tensor, pattern: ms.Pattern = PATTERN
) -> object:
    """The solver's answer, factorisations included, without the checks and grades of `ms.solve`."""
    with computing_on(weight):
        problem = ms.Problem(weight, ms.RowHessian(*hessian))
        return solver.compute(solver.init(problem), pattern).weight


def time_layer(rows: Rows, m: int, d: int) -> None:
    """The table's row of a layer m x d: what is slow on large layers is timed on small ones only."""
    group = f"{m} x {d}"
    weight, shared = layer(m, d, rows.device)
    some = factors(m, d, FACTORS, rows.device)
    single, joint = (weight, shared), (weight, shared, some)

    def row(name: str, run: Callable[[], object], rounds: int = 3) -> None:
        rows.time(group, name, run, rounds)

    row("torch SparseGPT", partial(torch_sparsegpt, weight, shared), 1 if d > 4096 else 3)
    row("SparseGPT", partial(solved, ms.SparseGPT(), *single))
    row(f"SparseGPT, n = {FACTORS}", partial(solved, ms.SparseGPT(), *joint))
    row(
        "SparseGPT by ms.solve",
        lambda: ms.solve(ms.Problem(weight, ms.RowHessian(shared)), PATTERN, ms.SparseGPT()),
    )
    if d <= 4096:
        row("ADMM", partial(solved, ms.ADMM(), *single), 2)
    row(f"ADMM, n = {FACTORS}", partial(solved, ms.ADMM(), *joint), 1)
    if max(m, d) <= 2048:
        row("torch ALPS", partial(torch_alps, weight, shared, 4, 2), 1)
        row("IHT", partial(solved, ms.IHT(), *single), 1)
        row(f"IHT, n = {FACTORS}", partial(solved, ms.IHT(), *joint), 1)
    if max(m, d) <= 1024:
        row("OBS", partial(solved, ms.OBS(), *single), 1)
        row(f"OBS, n = {FACTORS}", partial(solved, ms.OBS(), *joint), 1)
        row(f"OBS at 50%, n = {FACTORS}", partial(solved, ms.OBS(), *joint, pattern=ms.Unstructured(0.5)), 1)
        row(
            f"Swaps on SparseGPT, {FEW} rows",
            partial(solved, ms.Swaps(ms.SparseGPT()), weight[:FEW], shared),
            1,
        )
        row("lower_bound", lambda: ms.lower_bound(ms.Problem(weight, ms.RowHessian(shared)), PATTERN), 1)
    if m == d == 4096:
        del some, joint
        row(
            f"SparseGPT, n = {MANY}",
            partial(solved, ms.SparseGPT(), *single, factors(m, d, MANY, rows.device)),
            1,
        )
    row("one product m x d x d in float32", lambda: weight @ shared)
