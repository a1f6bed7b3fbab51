"""Small rows, whose optimum is known by enumeration."""

import moonshot as ms
import numpy as np
from benchmark_utils.random_layers import random_layer
from benchopt import BaseDataset

PATTERNS = {
    "50% per row": ms.Unstructured(0.5, scope="row"),
    "70% per row": ms.Unstructured(0.7, scope="row"),
    "2:4": ms.NM(2, 4),
}


class Dataset(BaseDataset):
    """Ten layers of ten rows of 14 columns (12 at 2:4), each layer with an A of its own."""

    name = "small"
    parameters = {
        "condition": [1e1, 1e2, 1e3, 1e4, 1e5, 1e6],
        "factors": [0, 3],
        "pattern": list(PATTERNS),
    }

    def get_data(self) -> dict:
        rng = np.random.default_rng(0)
        columns = 12 if self.pattern == "2:4" else 14
        layers = tuple(random_layer(rng, 10, columns, self.factors, self.condition) for _ in range(10))
        return {"layers": layers, "pattern": PATTERNS[self.pattern]}
