"""Random layers of known conditioning, and degenerate ones, for the tests to run on."""

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
import torch

from moonshot.layer.problem import Problem
from moonshot.linalg import RowHessian


@dataclass(frozen=True)
class Layer:
    weight: np.ndarray  # (m, d)
    A: np.ndarray  # (d, d)
    U: np.ndarray | None  # (m, d, n)

    @property
    def hessian(self):
        return RowHessian(self.A, self.U)

    @property
    def problem(self):
        return Problem(self.weight, self.hessian)

    def dense(self, dtype=np.float64):
        """Every H_i explicitly, (m, d, d), formed here and not by RowHessian."""
        shared = np.broadcast_to(self.A.astype(dtype), (len(self.weight), *self.A.shape))
        if self.U is None:
            return shared
        u = self.U.astype(dtype)
        return shared + u @ u.transpose(0, 2, 1)


def with_condition(rng, d, condition):
    """A symmetric (d, d) matrix with eigenvalues from 1 down to 1 / condition."""
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    a = (basis * np.geomspace(1, 1 / condition, d)) @ basis.T
    return (a + a.T) / 2


def random_layer(seed, m, d, n, condition=1e3):
    """A layer with n factors a row; U is None for n = 0."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(m, d, n)) if n else None
    return Layer(rng.normal(size=(m, d)), with_condition(rng, d, condition), factors)


@st.composite
def layers(draw, *, max_columns=16, max_rows=5, max_condition=1e8):
    """Layers with no factors, fewer than inputs, as many and more."""
    d = draw(st.integers(1, max_columns))
    n = draw(st.sampled_from(sorted({0, 1, max(d - 1, 1), d, d + 3})))
    condition = 10 ** draw(st.floats(1, np.log10(max_condition)))
    return random_layer(draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, max_rows)), d, n, condition)


def degenerate_layers():
    """{name: layer} of what calibration really produces: each is positive definite, just so."""
    rng = np.random.default_rng(7)
    m, d, n = 4, 8, 3
    weight, factors = rng.normal(size=(m, d)), rng.normal(size=(m, d, n))

    def from_inputs(inputs, ridge=1e-6):
        return inputs.T @ inputs + ridge * np.eye(inputs.shape[1])

    tokens = rng.normal(size=(50, d))
    twins, dead = tokens.copy(), tokens.copy()
    twins[:, 1] = twins[:, 0]
    dead[:, [0, 5]] = 0
    dead_factors = factors.copy()
    dead_factors[:, [0, 5]] = 0
    return {
        "fewer tokens than inputs": Layer(weight, from_inputs(tokens[:3]), factors),
        "duplicate inputs": Layer(weight, from_inputs(twins), factors),
        "dead inputs": Layer(weight, from_inputs(dead), dead_factors),
        "zero weights": Layer(np.zeros((m, d)), from_inputs(tokens), factors),
        "zero factors": Layer(weight, from_inputs(tokens), np.zeros((m, d, n))),
        "one row": Layer(weight[:1], from_inputs(tokens), factors[:1]),
        "one column": Layer(weight[:, :1], from_inputs(tokens[:, :1]), factors[:, :1]),
        "one weight": Layer(weight[:1, :1], from_inputs(tokens[:, :1]), None),
    }


def extreme_layers():
    """{name: layer} of unusual shapes and units: positive definite, and far from one in size."""
    layer = random_layer(7, 4, 8, 3, 1e2)
    huge, tiny = 1e12, 1e-12

    def scaled(weights, hessian):
        return Layer(layer.weight * weights, layer.A * hessian, layer.U * np.sqrt(hessian))

    units = {
        "huge weights": scaled(huge, 1),
        "tiny weights": scaled(tiny, 1),
        "a huge Hessian": scaled(1, huge),
        "a tiny Hessian": scaled(1, tiny),
        "all huge": scaled(huge, huge),
        "all tiny": scaled(tiny, tiny),
    }
    ill = random_layer(8, 4, 8, 3, 1e6)
    return {
        "equal scores": Layer(np.ones((4, 8)), np.eye(8), None),
        "equal inputs": Layer(np.ones((4, 8)), np.ones((8, 8)) + 1e-3 * np.eye(8), None),
        "more factors than inputs": random_layer(9, 4, 8, 11),
        "heavy factors": Layer(layer.weight, 1e-6 * layer.A, 1e3 * layer.U),
        "condition 1e6": Layer(ill.weight, ill.A, 1e-3 * ill.U),
        "condition 1e6 in float32": Layer(ill.weight.astype(np.float32), ill.A, 1e-3 * ill.U),
        **units,
        **{f"{name} in float32": replace(x, weight=x.weight.astype(np.float32)) for name, x in units.items()},
    }


DEGENERATE = degenerate_layers()
EXTREME = extreme_layers()


def on_torch(problem):
    """The problem with torch arrays inside, as it is on a device without CuPy; these are on the CPU."""
    hessian = problem.hessian
    problem.centre, hessian.A = torch.tensor(problem.centre), torch.tensor(hessian.A)
    if hessian.factors is not None:
        hessian._factors = torch.tensor(hessian.factors)
    return problem
