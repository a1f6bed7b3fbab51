"""The statistics of layers, one for each term of an objective, from what the layers see batch by batch."""

from typing import Any

import torch
from torch import Tensor

from moonshot.models.blocks import ModelError
from moonshot.models.layers import LayerView
from moonshot.models.recording import Seen
from moonshot.objectives import Objective, Observation


class LayerStatistics:
    """Statistics of some layers, for each group of a layer and each term of the objective.

    A term that reads inputs alone has one statistic for all Linear layers with the same input (q/k/v; gate/up).
    """

    def __init__(self, layers: dict[str, LayerView], objective: Objective, factors: int, signs: Tensor):
        """signs: (samples,) of all calibration samples, +1 or -1."""
        self.layers = layers
        self.terms = [term for _, term in objective.weighted_terms]
        self.needs = frozenset[str]().union(*(term.needs for term in self.terms))
        self._statistics: dict[tuple[str, int, int], Any] = {}  # by layer, group and term
        self._owner: dict[str, str] = {}  # layer -> the first layer that reads the same input
        self._factors = min(factors, len(signs))
        self._signs = signs * (self._factors / len(signs)) ** 0.5
        self._seen = 0
        self._gradients: dict[str, Tensor] = {}  # (factors, groups, m, d)

    def observe(
        self, samples: int, inputs: Seen, deltas: Seen, dense_inputs: Seen, mask: Tensor | None
    ) -> None:
        """One batch. inputs: in the partly pruned model; deltas: the gradients at outputs; dense_inputs: with these.

        mask: (samples, tokens), True where a token is real; None where all are.
        """
        first_reader: dict[tuple, str] = {}
        for name, view in self.layers.items():
            if name not in inputs:
                continue
            reads = (
                (name,) if type(view) is not LayerView else tuple((x.data_ptr(), x.shape) for x in inputs[name])
            )
            owner = self._owner.setdefault(name, first_reader.setdefault(reads, name))
            at_outputs: list[Any] = deltas.get(name) or [None] * len(inputs[name])
            for x, delta in zip(inputs[name], at_outputs, strict=True):
                for group in range(view.groups):
                    self._accumulate(name, owner, view, group, x, delta, mask)
            if "gradients" in self.needs:
                for x, delta in zip(dense_inputs[name], at_outputs, strict=True):
                    self._add_gradients(name, view, x, delta, samples, mask)
        self._seen += samples

    def _accumulate(
        self,
        name: str,
        owner: str,
        view: LayerView,
        group: int,
        x: Tensor,
        delta: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        wanted = [
            k
            for k, term in enumerate(self.terms)
            if "gradients" not in term.needs and (owner == name or term.needs != {"inputs"})
        ]
        if not wanted:
            return
        for chunk in view.chunks(x, delta, group):
            real = None if mask is None or mask.shape != x.shape[:2] else mask[chunk.samples, chunk.positions]
            if real is not None and not bool(real.any()):
                continue
            observation = Observation(
                inputs=_rows(chunk.inputs, real),
                output_gradients=None
                if chunk.output_gradients is None
                else _rows(chunk.output_gradients, real),
            )
            for k in wanted:
                key = (name, group, k)
                self._statistics[key] = self.terms[k].accumulate(self._statistics.get(key), observation)

    def _add_gradients(
        self, name: str, view: LayerView, x: Tensor, delta: Tensor, samples: int, mask: Tensor | None
    ) -> None:
        """Add each sample's gradient, times its random sign, to one of the factors, in turn.

        E over the signs of the sum over factors f of (f . v)^2 is the sum over samples of (g_s . v)^2.
        """
        if name not in self._gradients:
            self._gradients[name] = torch.zeros((self._factors, view.groups, *view.shape), device=x.device)
        folded, rest = divmod(len(x), samples)  # other dimensions that the model has folded into the first
        if rest:
            raise ModelError(
                f"{name} reads {tuple(x.shape)} in a batch of {samples} samples, so that its gradient cannot be told "
                "by sample: leave it out with ignore, or choose an objective without Fisher()"
            )
        for group in range(view.groups):
            for chunk in view.chunks(x, delta, group):
                at = chunk.output_gradients
                assert at is not None  # delta was given
                if mask is not None and mask.shape == x.shape[:2]:
                    at = at.masked_fill(~mask[chunk.samples, chunk.positions][..., None], 0)
                for s in range(len(chunk.inputs)):
                    sample = self._seen + (chunk.samples.start + s) // folded
                    into = self._gradients[name][sample % self._factors, group]
                    into.addmm_(at[s].T, chunk.inputs[s], alpha=float(self._signs[sample]))

    def pop(self, name: str) -> list[list[Any]]:
        """For each group of a layer its statistics in the order of the objective's terms; gradients are let go."""
        view, gradients = self.layers[name], self._gradients.pop(name, None)
        if name not in self._owner:
            raise ModelError(f"no calibration batch reached the layer {name}: leave it out with ignore")
        groups = []
        for group in range(view.groups):
            statistics = []
            for k, term in enumerate(self.terms):
                if "gradients" in term.needs:
                    of_group = None if gradients is None else gradients[:, group]
                    statistics.append(term.accumulate(None, Observation(gradients=of_group)))
                else:
                    owner = self._owner[name] if term.needs == {"inputs"} else name
                    statistics.append(self._statistics[owner, group, k])
            groups.append(statistics)
        return groups


def _rows(chunk: Tensor, real: Tensor | None) -> Tensor:
    """(rows, columns) of a chunk (samples, positions, columns), without the padded tokens."""
    return chunk.flatten(0, 1) if real is None else chunk[real]
