"""What is compared. A case is one function of a layer's shape (m, d) and its number of factors n."""

from collections.abc import Callable, Iterator
from unittest import mock

import moonshot as ms
import numpy as np
import torch
from moonshot.linalg.scaled import ScaledQuadratic
from moonshot.linalg.shifted import ShiftedInverse
from moonshot.models.layers import layer_view
from moonshot.models.statistics import LayerStatistics
from torch import nn

from ..solvers.benchmark_utils.grading import Layer, row_optima
from ..solvers.benchmark_utils.references import torch_alps, torch_obc, torch_sparsegpt, torch_wanda
from .layers import Layer as RandomLayer
from .layers import random_layer
from .timing import Case

PATTERN = ms.NM(2, 4)
HALF = ms.Unstructured(0.5, scope="row")


def solved(problem: ms.Problem, solver: ms.Solver, pattern: ms.Pattern = PATTERN) -> np.ndarray:
    """The solver's weights, factorisations included, without the checks and grades of `ms.solve`."""
    return solver.compute(solver.init(problem), pattern).weight


def diagonal(m: int, d: int, n: int) -> Case:
    """Wanda and Magnitude against Wanda in plain torch."""
    layer = random_layer(m, d, n)
    weight, hessian = layer.tensors()
    return Case(
        f"Wanda, {m} x {d}",
        {
            "Magnitude": lambda: solved(layer.single(), ms.Magnitude()),
            "Wanda": lambda: solved(layer.single(), ms.Wanda()),
            "torch Wanda": lambda: torch_wanda(weight, hessian, 4, 2).numpy(),
        },
        (("Magnitude", "torch Wanda"), ("Wanda", "torch Wanda")),
        layer.single().value,
        (("Wanda", "torch Wanda"),),
    )


def sweep(m: int, d: int, n: int) -> Case:
    """SparseGPT, single and joint, against plain torch and against their products; alone, and checked and graded.

    `P_i = R U_i` with R triangular takes m n d^2 / 2 multiply-adds, `R'z_i` m d^2 / 2. What is timed are plain products
    of as many: those with half the rows of R.
    """
    layer = random_layer(m, d, n)
    weight, hessian = layer.tensors()
    half_of_r = layer.single().hessian.inverse_factor[: d // 2].astype("f")
    columns = layer.factors.reshape(n * m, d).T
    return Case(
        f"SparseGPT, {m} x {d}, n = {n}",
        {
            "torch": lambda: torch_sparsegpt(weight, hessian).numpy(),
            "single": lambda: solved(layer.single(), ms.SparseGPT()),
            "joint": lambda: solved(layer.joint(), ms.SparseGPT()),
            "ms.solve, single": lambda: ms.solve(layer.single(), PATTERN, ms.SparseGPT()),
            "ms.solve, joint": lambda: ms.solve(layer.joint(), PATTERN, ms.SparseGPT()),
            "the product R'z": lambda: half_of_r @ layer.weight.T,
            "the product R U": lambda: half_of_r @ columns,
        },
        (
            ("single", "torch"),
            ("single", "the product R'z"),
            ("joint", "torch"),
            ("joint", "the product R U"),
            ("joint", "single"),
            ("ms.solve, single", "torch"),
            ("ms.solve, joint", "ms.solve, single"),
        ),
        layer.single().value,
        (("single", "torch"),),
    )


def admm(m: int, d: int, n: int) -> Case:
    """ADMM against SparseGPT in plain torch and its products m x d x d as plain ones, with factors against without."""
    layer = random_layer(m, d, n)
    weight, hessian = layer.tensors()
    return Case(
        f"ADMM, {m} x {d}, n = {n}",
        {
            "single": lambda: solved(layer.single(), ms.ADMM()),
            "joint": lambda: solved(layer.joint(), ms.ADMM()),
            "its products": plain_products(layer, layer.single(), ms.ADMM()),
            "torch SparseGPT": lambda: torch_sparsegpt(weight, hessian).numpy(),
        },
        (("single", "torch SparseGPT"), ("single", "its products"), ("joint", "single")),
        layer.single().value,
        (("single", "torch SparseGPT"),),
    )


def alps(m: int, d: int, n: int) -> Case:
    """ADMM against ALPS in plain torch."""
    layer = random_layer(m, d, n)
    weight, hessian = layer.tensors()
    return Case(
        f"ALPS, {m} x {d}",
        {
            "ADMM": lambda: solved(layer.single(), ms.ADMM()),
            "torch ALPS": lambda: torch_alps(weight, hessian, 4, 2).numpy(),
        },
        (("ADMM", "torch ALPS"),),
        layer.single().value,
        (("ADMM", "torch ALPS"),),
    )


def obs(m: int, d: int, n: int) -> Case:
    """OBS against OBC in plain torch, and ten row budgets against one.

    On a few short rows, for OBC holds an inverse for each. It is given the rows' Hessians: forming them is not timed.
    """
    rows, d = max(m // 32, 1), max(d // 4, 4)
    layer = random_layer(rows, d, n)
    factors = layer.factors.transpose(1, 2, 0).astype("d")
    hessians = torch.from_numpy((layer.shared + factors @ factors.transpose(0, 2, 1)).astype("f"))
    weight = torch.from_numpy(layer.weight)
    patterns = [ms.Unstructured(k / 10, scope="row") for k in (5, 1, 2, 3, 4, 6, 7, 8, 9, 9.5)]

    def budgets(count: int) -> None:
        solver = ms.OBS()
        state = solver.init(layer.joint())
        for pattern in patterns[:count]:
            solver.compute(state, pattern)

    return Case(
        f"OBS, {rows} x {d}, n = {n}",
        {
            "OBS": lambda: solved(layer.joint(), ms.OBS()),
            "torch OBC": lambda: torch_obc(weight, hessians, 4, 2)[0].numpy(),
            "one budget": lambda: budgets(1),
            "ten budgets": lambda: budgets(10),
        },
        (("OBS", "torch OBC"), ("ten budgets", "one budget")),
        layer.joint().value,
        (("OBS", "torch OBC"),),
    )


def iht(m: int, d: int, n: int) -> Case:
    """IHT against the products of its iterates with A, as plain ones: as many as a run makes, of as many rows each."""
    rows = max(m // 8, 1)
    layer = random_layer(rows, d, n)
    return Case(
        f"IHT, {rows} x {d}, n = {n}",
        {
            "IHT": lambda: solved(layer.joint(), ms.IHT()),
            "its products with A": plain_products(layer, layer.joint(), ms.IHT()),
            "SparseGPT": lambda: solved(layer.joint(), ms.SparseGPT()),
        },
        (("IHT", "its products with A"), ("IHT", "SparseGPT")),
        layer.joint().value,
        (("IHT", "SparseGPT"),),
    )


def plain_products(layer: RandomLayer, problem: ms.Problem, solver: ms.Solver) -> Callable[[], None]:
    """As many products with A as the solver makes on the layer's problem, of as many rows each."""
    counts, shared = rows_multiplied(problem, solver), layer.shared.astype("f")

    def products() -> None:
        for count in counts:
            layer.weight[:count] @ shared

    return products


def rows_multiplied(problem: ms.Problem, solver: ms.Solver) -> list[int]:
    """How many rows each product with A, or with the inverse of A and a shift, has while the solver runs."""
    counts: list[int] = []
    matvec, solve = ScaledQuadratic.matvec, ShiftedInverse.solve

    def multiplied(quadratic: ScaledQuadratic, x: np.ndarray) -> np.ndarray:
        counts.append(len(x))
        return matvec(quadratic, x)

    def solved_for(inverse: ShiftedInverse, b: np.ndarray, rho: float) -> np.ndarray:
        counts.append(len(b))
        return solve(inverse, b, rho)

    with (
        mock.patch.object(ScaledQuadratic, "matvec", multiplied),
        mock.patch.object(ShiftedInverse, "solve", solved_for),
    ):
        solved(problem, solver)
    return counts


def swaps(m: int, d: int, n: int) -> Case:
    """Swaps on ADMM's answer, ADMM's factorisation done before, against the products of its first tableaus.

    Half of d weights kept, a row's tableau takes a product `W'W` of W (d/2, d) in float64.
    """
    rows = max(m // 128, 1)
    layer = random_layer(rows, d, n)
    problem, half = layer.joint(), layer.shared[: d // 2]
    inner, solver = ms.ADMM(), ms.Swaps(ms.ADMM())
    before, state = inner.init(problem), solver.init(problem)

    def products() -> None:
        for _ in range(rows):
            half.T @ half

    return Case(
        f"Swaps, {rows} x {d}, n = {n}",
        {
            "Swaps(ADMM)": lambda: solver.compute(state, PATTERN).weight,
            "its products W'W": products,
            "ADMM": lambda: inner.compute(before, PATTERN).weight,
        },
        (("Swaps(ADMM)", "its products W'W"), ("Swaps(ADMM)", "ADMM")),
        problem.value,
        (("Swaps(ADMM)", "ADMM"),),
    )


def exact(m: int, d: int, n: int) -> Case:
    """Exact against the enumeration of all supports, on short rows at one half."""
    rows, d = max(m // 16, 1), 14
    layer = random_layer(rows, d, n)
    plain = Layer(layer.weight, layer.shared, layer.factors.transpose(1, 2, 0))
    return Case(
        f"Exact, {rows} x {d}, n = {n}",
        {
            "Exact": lambda: ms.solve(layer.joint(), HALF, ms.Exact()).value,
            "enumeration": lambda: row_optima(plain, HALF).sum(),
        },
        (("Exact", "enumeration"),),
        graded=(("Exact", "enumeration"),),
    )


def observed(m: int, d: int, samples: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's inputs (samples, tokens, d) and the gradients at its outputs (samples, tokens, m)."""
    torch.manual_seed(0)
    return torch.randn(samples, tokens, d), torch.randn(samples, tokens, m)


def accumulated(objective: ms.Objective, x: torch.Tensor, gradients: torch.Tensor) -> list:
    """The statistics of a layer from what `observed` gives, as `ms.prune` adds them up, a factor for each sample."""
    samples, m, d = len(x), gradients.shape[-1], x.shape[-1]
    view = layer_view(nn.Linear(d, m, bias=False, device="meta"))
    statistics = LayerStatistics({"layer": view}, objective, samples, torch.ones(samples))
    statistics.observe(samples, {"layer": [x]}, {"layer": [gradients]}, {"layer": [x]}, None)
    return statistics.of("layer")


def statistics(m: int, d: int, n: int) -> Case:
    """The statistics of n samples, 4 d tokens in all, against plain float32 products.

    X'X is symmetric, so that BLAS computes half of it. The Fisher term's gradients are products D'X, which are not.
    """
    tokens = max(4 * d // n, 1)
    x, gradients = observed(m, d, n, tokens)
    flat, flat_gradients = x.flatten(0, 1).numpy(), gradients.flatten(0, 1).numpy()
    return Case(
        f"statistics, {m} x {d}, {n} samples of {tokens} tokens",
        {
            "Reconstruction": lambda: accumulated(ms.Reconstruction(), x, gradients),
            "TokenFisher": lambda: accumulated(ms.TokenFisher(), x, gradients),
            "Fisher": lambda: accumulated(ms.Fisher(), x, gradients),
            "X'X": lambda: flat.T @ flat,
            "D'X": lambda: flat_gradients.T @ flat,
        },
        (("Reconstruction", "X'X"), ("TokenFisher", "X'X"), ("Fisher", "D'X")),
    )


CASES: tuple[Callable[[int, int, int], Case], ...] = (
    diagonal,
    sweep,
    admm,
    alps,
    obs,
    iht,
    swaps,
    exact,
    statistics,
)
NAMES = tuple(case.__name__ for case in CASES)
# Of a Llama of a billion parameters: keys and values together, up, down.
LARGE_SHAPES = ((512, 2048), (8192, 2048), (2048, 8192))
LARGE_CASES = (sweep, admm, statistics)


def cases(names: tuple[str, ...], m: int, d: int, n: int) -> Iterator[Case]:
    """The cases of one layer, each built when it is asked for."""
    return (case(m, d, n) for case in CASES if case.__name__ in names)


def large_cases(names: tuple[str, ...], n: int) -> Iterator[Case]:
    """The cases of a Llama's layers that are not square."""
    return (case(m, d, n) for m, d in LARGE_SHAPES for case in LARGE_CASES if case.__name__ in names)
