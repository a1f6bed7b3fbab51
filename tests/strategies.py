"""Random layers of known conditioning, and degenerate ones, for the tests to run on."""

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np

from moonshot.linalg import RowHessian
from moonshot.problem import Problem


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


DEGENERATE = degenerate_layers()
