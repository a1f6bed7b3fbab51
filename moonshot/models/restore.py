"""A model put back as it was: weights of layers and batch-norm statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from moonshot.models.batchnorm import running_statistics
from moonshot.models.layer_view import LayerView
from moonshot.models.offload import Offload


@contextmanager
def restored_on_failure(
    model: nn.Module, layers: Iterable[LayerView], offload: Offload
) -> Iterator[Callable[[], None]]:
    """Put weights and batch-norm statistics back if what runs inside fails; yields a function that does so any time.

    The layers' weights as they were wait in `offload`.
    """
    layers = list(layers)
    originals = [offload.store(view.matrices()) for view in layers]
    statistics = [(buffer, buffer.clone()) for buffer in running_statistics(model)]

    def restore() -> None:
        for view, original in zip(layers, originals, strict=True):
            view.assign(original.read())
        for buffer, value in statistics:
            buffer.copy_(value)

    try:
        yield restore
    except BaseException:
        restore()
        raise
