"""Random layers of known spectrum."""

import numpy as np

from .grading import Layer


def random_layer(rng: np.random.Generator, m: int, d: int, factors: int, condition: float) -> Layer:
    """Normal weights, eigenvalues of A from 1 down to 1 / condition, factors that add 0.3 of A's trace."""
    eigenvalues = np.geomspace(1, 1 / condition, d)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    a = (basis * eigenvalues) @ basis.T
    u = None
    if factors:
        u = rng.normal(size=(m, d, factors)) * np.sqrt(0.3 * eigenvalues.sum() / (d * factors))
    return Layer(rng.normal(size=(m, d)), (a + a.T) / 2, u)
