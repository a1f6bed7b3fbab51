"""What a model's parts are run by, one after the other: the protocol that chain and graph replays have in common."""

from typing import Protocol

from torch import nn

from moonshot.models.statistics import LayerStatistics


class Replay(Protocol):
    """A model run part by part: `observe` each while it is dense, prune its layers, then `advance`.

    parts: (name, module), in the order in which the model runs them.
    """

    parts: list[tuple[str, nn.Module]]

    def observe(self, index: int, statistics: LayerStatistics) -> None:
        """Run part `index`, still dense and in float32, on every batch; hand what its layers see to `statistics`.

        Inputs are those that the pruned parts before it give, gradients those of the dense model.
        """

    def advance(self, index: int) -> None:
        """Run part `index` as it is now, in float32, for the inputs of those after it."""
