"""The experts of a mixture that are slices of one parameter, each as a matrix to prune."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from moonshot.models.layer_view import LayerView
from moonshot.models.precision import is_quantised


class ExpertView(LayerView):
    """One expert of a mixture: a slice of a parameter (experts, m, d), or (experts, d, m) if `is_transposed`."""

    routed = True

    def __init__(self, module: Any, parameter: str, expert: int):
        self.parameter, self.expert = parameter, expert
        super().__init__(module)

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter).data[self.expert]

    def matrix(self) -> Tensor:
        """(m, d), a view."""
        return self.weight.T if self.module.is_transposed else self.weight

    def weight_view(self) -> Tensor:
        return self.matrix()[None]


def experts_of(module: nn.Module) -> Iterator[tuple[str, ExpertView]]:
    """The experts in a module's three-dimensional parameters.

    `num_experts` and `is_transposed` are what transformers gives such a module (use_experts_implementation).
    """
    count = getattr(module, "num_experts", None)
    if not hasattr(module, "is_transposed"):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and len(parameter) == count and not is_quantised(parameter):
            yield from ((f"{name}.{k}", ExpertView(module, name, k)) for k in range(count))
