"""The layer that is timed."""

from dataclasses import dataclass

import moonshot as ms
import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights (m, d) and factors (n, m, d) in float32, the shared matrix (d, d) in float64."""

    weight: np.ndarray
    shared: np.ndarray
    factors: np.ndarray

    def single(self) -> ms.Problem:
        """The problem of the shared part alone, a new one each time, so that no factorisation is reused."""
        return ms.Problem(self.weight, ms.RowHessian(self.shared))

    def joint(self) -> ms.Problem:
        """The problem with the factors, a new one each time."""
        return ms.Problem(self.weight, ms.RowHessian(self.shared, self.factors.transpose(1, 2, 0)))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights and the shared matrix in float32, as the references in torch take them."""
        return torch.from_numpy(self.weight), torch.from_numpy(self.shared.astype("f"))


def random_layer(m: int, d: int, n: int, seed: int = 0) -> Layer:
    """Correlated inputs: 32 common directions, a mean, and noise that falls off over the columns.

    A has a mean diagonal of 1.01, a hundredth of it ridge; the factors add about a half.
    """
    rng = np.random.default_rng(seed)
    x = _normal(rng, 2 * d, 32) @ _normal(rng, 32, d) + _normal(rng, 1, d)
    x += 2 * np.geomspace(1, 0.05, d, dtype="f") * _normal(rng, 2 * d, d)
    shared = (x.T @ x).astype("d")
    shared = shared / np.mean(np.diag(shared)) + 0.01 * np.eye(d)
    factors = _normal(rng, n, m, d)
    factors *= np.float32((0.5 / max(n, 1)) ** 0.5)
    return Layer(_normal(rng, m, d), shared, factors)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype="f")
