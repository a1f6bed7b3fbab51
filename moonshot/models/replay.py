"""What a model's parts are run by, one after the other: the protocol that chain and graph replays have in common."""

from typing import Protocol

from torch import Tensor, nn

from moonshot.models.calibration import Batch
from moonshot.models.statistics import LayerStatistics


class Replay(Protocol):
    """A model run part by part: `observe` each while it is dense, prune its layers, then `advance`.

    Meanwhile the part is `placed`, as `precision.as_read` and `as_stored` suppose of what it reads and returns.

    parts: (name, module), in the order in which the model runs them; batches: what it is run on.
    """

    parts: list[tuple[str, nn.Module]]
    batches: list[Batch]

    def observe(self, index: int, statistics: LayerStatistics) -> None:
        """Run part `index`, still dense and `placed`, on every batch; hand what its layers see to `statistics`.

        Inputs are those that the pruned parts before it give, gradients those of the dense model.
        """

    def output(self, index: int, b: int) -> Tensor:
        """What part `index`, observed before, returns as it is now on batch b of the partly pruned model.

        Of several results the hidden states (`recording.main_output`).
        """

    def dense_output(self, index: int, b: int) -> Tensor:
        """As `output`, of the dense part in the dense model; for a replay that was made with `dense`."""

    def output_moment(self, index: int) -> Tensor | None:
        """The sum of `g g'` over the loss gradients g at what tokens make part `index` return, (channels, channels).

        Of a part observed before, in the dense model, without padded tokens, in float64; for a replay that was made
        with `dense`. None where there are no gradients, or where it is not known which axis has the channels.
        """

    def advance(self, index: int) -> None:
        """Run part `index` as it is now, for the inputs of those after it."""
