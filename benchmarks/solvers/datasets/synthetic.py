"""A layer of moderate size with a known spectrum, in float32."""

from dataclasses import replace

import moonshot as ms
import numpy as np
from benchmark_utils.random_layers import random_layer
from benchopt import BaseDataset


class Dataset(BaseDataset):
    """256 x 512, 8 factors."""

    name = "synthetic"
    parameters = {"condition": [1e3], "pattern": ["2:4", "70%"]}

    def get_data(self) -> dict:
        layer = random_layer(np.random.default_rng(0), 256, 512, 8, self.condition)
        layer = replace(layer, weight=layer.weight.astype("f"), U=layer.U.astype("f"))
        return {"layers": (layer,), "pattern": ms.as_pattern(self.pattern)}
