"""The statistics of layers, one for each term of an objective, from what the layers see batch by batch."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moonshot.layer.objectives import Objective, Observation
from moonshot.linalg import half_products
from moonshot.linalg.backend import computing_on, native
from moonshot.models.layer_view import LayerView
from moonshot.models.modules import ModelError
from moonshot.models.ranks import Ranks
from moonshot.models.recording import Seen
from moonshot.models.targets import listed


class LayerStatistics:
    """Statistics of some layers, for each group of a layer and each term of the objective.

    A term that reads inputs alone has one statistic for all linear layers with the same input (q/k/v; gate/up).

    tokens: how many rows each layer has read in the partly pruned model, padding apart.
    without_gradient: the layers, once they were asked for (`of`), that the loss does not depend on.
    """

    def __init__(
        self,
        layers: dict[str, LayerView],
        objective: Objective,
        factors: int,
        signs: Tensor,
        routed: bool = False,
        decoder: Container[str] = (),
        first: int = 0,
    ):
        """signs: (samples,) of all calibration samples, +1 or -1; first: the index of the first that is observed here.

        routed: whether layers may read other tokens in the partly pruned model than in the dense one, as experts do.
        decoder: the layers that read the decoder's tokens in an encoder-decoder, whose padding is another.
        Output gradients are then paired with the inputs of the dense model, and a layer may read nothing at all.
        """
        self.layers, self.routed, self._decoder = layers, routed, decoder
        self.terms = [term for _, term in objective.weighted_terms]
        self.needs = objective.needed
        self.tokens = dict.fromkeys(layers, 0)
        self._statistics: dict[tuple[str, int, int], Any] = {}  # by layer, group and term
        self._owner: dict[str, str] = {}  # layer -> the first layer that reads the same input
        self._factors = min(factors, len(signs))
        self._signs = signs * (self._factors / len(signs)) ** 0.5
        self._seen = first
        self.without_gradient: set[str] = set()
        self._gradients: dict[str, Tensor] = {}  # (factors, groups, m, d)

    def observe(
        self,
        samples: int,
        inputs: Seen,
        deltas: Seen,
        dense_inputs: Seen,
        mask: Tensor | None,
        decoder_mask: Tensor | None = None,
    ) -> None:
        """One batch. inputs: in the partly pruned model; deltas: the gradients at outputs; dense_inputs: with these.

        mask: (samples, tokens), True where a token is real; None where all are. decoder_mask: of the decoder's tokens.
        """
        masks = {name: decoder_mask if name in self._decoder else mask for name in self.layers}
        first_reader: dict[tuple, str] = {}
        summed = [k for k, term in enumerate(self.terms) if term.needs & {"inputs", "output_gradients"}]
        paired = [k for k in summed if "output_gradients" in self.terms[k].needs]
        for name, view in self.layers.items():
            mask = masks[name]
            with computing_on(view.weight):
                read, dense, at_outputs = (
                    [view.by_sample(tensor, samples) for tensor in seen.get(name, [])]
                    for seen in (inputs, dense_inputs, deltas)
                )
                if read:
                    reads = tuple((x.data_ptr(), x.shape) for x in read) if view.plain_rows else (name,)
                    self._owner.setdefault(name, first_reader.setdefault(reads, name))
                    self.tokens[name] += sum(_count(view, x, mask) for x in read)
                if self.routed:
                    self._accumulate(name, view, read, None, mask, [k for k in summed if k not in paired])
                    self._accumulate(name, view, dense, at_outputs, mask, paired)
                else:
                    self._accumulate(name, view, read, at_outputs or None, mask, summed)
                if "gradients" in self.needs:
                    for x, delta in zip(dense, at_outputs, strict=True):
                        self._add_gradients(name, view, x, delta, samples, mask)
        self._seen += samples

    def _accumulate(
        self,
        name: str,
        view: LayerView,
        inputs: list[Tensor],
        deltas: list[Tensor] | None,
        mask: Tensor | None,
        terms: list[int],
    ) -> None:
        """Add what was seen in some calls of a layer to the statistics of these terms."""
        owned = self._owner.get(name, name) == name
        wanted = [k for k in terms if owned or self.terms[k].needs != {"inputs"}]
        if not wanted:
            return
        at_outputs: list[Any] = deltas or [None] * len(inputs)
        for x, delta in zip(inputs, at_outputs, strict=True):
            rows_mask = _mask_of_rows(view, x, mask)
            for group in range(view.groups):
                for chunk in view.chunks(x, delta, group):
                    real = None if rows_mask is None else rows_mask[chunk.samples, chunk.positions]
                    if real is not None and not bool(real.any()):
                        continue
                    at = chunk.output_gradients
                    observation = Observation(
                        inputs=_rows(chunk.inputs, real),
                        output_gradients=None if at is None else _rows(at, real),
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
            dtype = torch.promote_types(x.dtype, torch.float32)
            shape = (self._factors, view.groups, *view.shape)
            self._gradients[name] = torch.zeros(shape, dtype=dtype, device=x.device)
        folded, rest = divmod(len(x), samples)  # other dimensions that the model has folded into the first
        if rest:
            raise ModelError(
                f"{name} reads {tuple(x.shape)} in a batch of {samples} samples, so that its gradient cannot be told "
                "by sample: leave it out with ignore, or choose an objective without Fisher()"
            )
        rows_mask = _mask_of_rows(view, x, mask)
        for group in range(view.groups):
            for chunk in view.chunks(x, delta, group):
                read, at = chunk.inputs, chunk.output_gradients
                assert at is not None  # delta was given
                if rows_mask is not None:  # what is padding may be NaN
                    padding = ~rows_mask[chunk.samples, chunk.positions][..., None]
                    read, at = read.masked_fill(padding, 0), at.masked_fill(padding, 0)
                for s in range(len(read)):
                    sample = self._seen + (chunk.samples.start + s) // folded
                    into = self._gradients[name][sample % self._factors, group]
                    sign = float(self._signs[sample])
                    if half_products.possible(at, read):
                        into.add_(half_products.product(at[s].T, read[s]), alpha=sign)
                    else:
                        into.addmm_(at[s].T, read[s], alpha=sign)

    def add_up(self, ranks: Ranks, owners: Mapping[str, int | None]) -> None:
        """Add what the other ranks have observed. owners: {layer: the rank that alone will ask for it, None for all}.

        The statistics of all terms must be arrays that add up (`Objective.additive`).
        """
        arrays = {key: torch.as_tensor(statistic) for key, statistic in self._statistics.items()}
        said = ranks.gather((self._owner, self.tokens, _kinds(arrays), _kinds(self._gradients)))
        seen_by, tokens, arrays_by, gradients_by = zip(*said, strict=True)
        self._owner = _merged(seen_by)
        if split := [name for seen in seen_by for name in seen if seen[name] != self._owner[name]]:
            raise ModelError(
                f"{listed(split)} read the same as another layer for some samples and not for others: leave them out "
                "with ignore, or prune in one process"
            )
        self.tokens = {name: sum(of_rank[name] for of_rank in tokens) for name in self.tokens}
        readers: dict[str, set[int]] = {}
        everyone = set(range(ranks.count))
        asking = {name: everyone if rank is None else {rank} for name, rank in owners.items()}
        for name, some in asking.items():
            readers.setdefault(self._owner.get(name, name), set()).update(some)
        for key, kind in _merged(arrays_by).items():
            name, _, k = key
            wanted = readers[name] if self.terms[k].needs == {"inputs"} else asking[name]
            total = _or_zeros(arrays.pop(key, None), kind, self.layers[name])
            ranks.sum_([total], *(wanted if len(wanted) == 1 else ()))
            self._statistics.pop(key, None)
            if ranks.index in wanted:
                self._statistics[key] = native(total)
        for name, kind in _merged(gradients_by).items():
            gradients = _or_zeros(self._gradients.pop(name, None), kind, self.layers[name])
            ranks.sum_([gradients], owners[name])
            if ranks.index in asking[name]:
                self._gradients[name] = gradients

    def of(self, name: str, again: bool = False) -> list[list[Any]]:
        """For each group of a layer its statistics in the order of the objective's terms.

        again: whether they will be asked for once more; if not, the layer's gradients are let go.
        """
        view, gradients = self.layers[name], self._gradients.get(name)
        if not again:
            self._gradients.pop(name, None)
        if name not in self._owner and not self.routed:
            raise ModelError(f"no calibration batch reached the layer {name}: leave it out with ignore")
        if gradients is not None and not bool(gradients.any()):
            self.without_gradient.add(name)
        if gradients is None and self.routed:  # what the loss does not pass through has none
            gradients = torch.zeros(
                (1, view.groups, *view.shape), dtype=torch.float32, device=view.weight.device
            )
        groups = []
        with computing_on(view.weight):
            for group in range(view.groups):
                statistics = []
                for k, term in enumerate(self.terms):
                    owner = self._owner.get(name, name) if term.needs == {"inputs"} else name
                    statistic = self._statistics.get((owner, group, k))
                    if statistic is None and term.needs != {"gradients"}:
                        statistic = term.accumulate(None, _nothing(view))
                    if "gradients" in term.needs:
                        of_group = None if gradients is None else gradients[:, group]
                        statistic = term.accumulate(statistic, Observation(gradients=of_group))
                    statistics.append(statistic)
                groups.append(statistics)
        return groups


_Kind = tuple[torch.Size, torch.dtype]


def _kinds(tensors: Mapping[Any, Tensor]) -> dict[Any, _Kind]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


def _merged(mappings: Iterable[Mapping]) -> dict:
    """All that is in any of the mappings, in the first that has it."""
    found: dict = {}
    for mapping in mappings:
        found = {**found, **{key: value for key, value in mapping.items() if key not in found}}
    return found


def _or_zeros(tensor: Tensor | None, kind: _Kind, view: LayerView) -> Tensor:
    shape, dtype = kind
    return torch.zeros(shape, dtype=dtype, device=view.weight.device) if tensor is None else tensor


def _nothing(view: LayerView) -> Observation:
    """One token that is zero."""
    m, d = view.shape
    zeros = torch.zeros((1, m + d), dtype=torch.float32, device=view.weight.device)
    return Observation(inputs=zeros[:, :d], output_gradients=zeros[:, d:])


def _count(view: LayerView, x: Tensor, mask: Tensor | None) -> int:
    """Rows of what a layer read, without the padded tokens."""
    rows_mask = _mask_of_rows(view, x, mask)
    return _positions(view, x).numel() * len(x) if rows_mask is None else int(rows_mask.sum())


def _positions(view: LayerView, x: Tensor) -> torch.Size:
    """The sizes of a sample of what a layer read, in rows."""
    return (
        x.shape[1:-1]
        if view.plain_rows
        else torch.Size(view.positions(tuple(view.channels_last(x).shape[1:-1])))
    )


def _mask_of_rows(view: LayerView, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """(samples, positions), True where a row of what a layer read is of a real token; None where it reads no tokens.

    A mask says nothing of a pooler that reads one row a sample, nor of channels, which may be as many as the tokens.
    """
    if mask is None or x.ndim < 3 or len(x) != len(mask):
        return None
    rows, sizes = _positions(view, x), mask.shape[1:]
    same = rows == sizes or (len(sizes) > 1 and rows.numel() == sizes.numel())
    return mask.flatten(1) if same else None


def _rows(chunk: Tensor, real: Tensor | None) -> Tensor:
    """(rows, columns) of a chunk (samples, positions, columns), without the padded tokens."""
    return chunk.flatten(0, 1) if real is None else chunk[real]
