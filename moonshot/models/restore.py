"""A model put back as it was: weights of layers, norms and biases, batch-norm statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moonshot.models.batchnorm import running_statistics
from moonshot.models.layer_view import LayerView
from moonshot.models.offload import Offload


@contextmanager
def restored_on_failure(
    model: nn.Module, layers: Iterable[LayerView], offload: Offload
) -> Iterator[Callable[[], None]]:
    """Put weights, vectors and batch-norm statistics back if what runs inside fails; yields a function that does so.

    The layers' weights as they were are stored in `offload`.
    """
    layers = list(layers)
    originals = [offload.store(view.matrices()) for view in layers]
    vectors = [parameter.data for parameter in model.parameters() if parameter.ndim < 2]
    others = [(tensor, tensor.clone()) for tensor in (*vectors, *running_statistics(model))]

    def restore() -> None:
        for view, original in zip(layers, originals, strict=True):
            view.assign(original.read())
        for tensor, value in others:
            if not torch.equal(tensor, value):  # which may lie in a file
                tensor.copy_(value)

    try:
        yield restore
    except BaseException:
        restore()
        raise
