import torch
from torch import nn

import moonshot as ms


class Projection(nn.Module):
    """A layer of a kind that moonshot does not know: the weight is called `kernel` and lies (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return x @ self.kernel


class ProjectionView(ms.LayerView):
    parameter = "kernel"

    def weight_view(self):
        return self.weight.data.T[None]  # (groups, outputs, inputs), sharing memory


class ProjectionAdapter(ms.GraphAdapter):
    def layers(self, name, module):
        for path, inner in module.named_modules(prefix=name):
            if isinstance(inner, Projection):
                yield path, ProjectionView(inner)
