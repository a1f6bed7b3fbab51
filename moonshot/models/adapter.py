"""What moonshot must know of a kind of model: its parts, the layers in them, and how to run them one by one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import nn

from moonshot.models.calibration import Batch
from moonshot.models.layer_view import LayerView
from moonshot.models.layers import layers_of
from moonshot.models.losses import Loss
from moonshot.models.offload import Offload
from moonshot.models.replay import Replay
from moonshot.models.roles import heads
from moonshot.models.trial_run import TrialRun

Parts = list[tuple[str, nn.Module]]


class Adapter(ABC):
    """How a model is pruned part by part.

    `ChainAdapter` and `GraphAdapter` are the two there are. A model that needs more than they find out by themselves
    gets one of its own, usually a GraphAdapter with other parts or other layers (docs/extending.md).

    whole_model: whether layers outside the parts are skipped by name, or count as layers that no sample reached where
    none did; if not, they are no concern of pruning.
    """

    whole_model = False

    @abstractmethod
    def parts(self, model: nn.Module, run: TrialRun) -> Parts:
        """(name in the model, module) of the parts, in the order in which they run; no part is inside another.

        run: what was seen when the calibration data ran through the model.
        """

    @abstractmethod
    def replay(
        self,
        model: nn.Module,
        parts: Parts,
        batches: list[Batch],
        loss: Loss,
        gradients: bool,
        offload: Offload,
        dense: bool = False,
    ) -> Replay:
        """What runs the parts one after the other. gradients: whether statistics need those of the loss.

        dense: whether what the dense parts return is wanted (Replay.dense_output).
        offload: where hidden states and gradients are stored until they are wanted.
        """

    def layers(self, name: str, module: nn.Module) -> Iterator[tuple[str, LayerView]]:
        """(name in the model, layer) of every layer that can be pruned in a module of the model with this name.

        By default Linear layers, convolutions and experts; another kind is a subclass of LayerView.
        """
        return layers_of(name, module)

    def left_alone(self, model: nn.Module) -> frozenset[str]:
        """Names of layers that are pruned only where targets name them: by default a transformers model's heads."""
        return heads(model)
