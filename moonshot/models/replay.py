"""What each layer of a block sees: its inputs, output gradients and per-sample gradients, by replay.

One backward pass over the dense model, a block at a time, keeps the loss gradient at every block's output
(`block_gradients`). When a block's turn comes, it is run alone, forward from its inputs and backward from that gradient
(`observe_block`), so that statistics of one block are in memory at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moonshot.models.blocks import Call, Chain, in_float32
from moonshot.models.calibration import Batch, token_mask
from moonshot.objectives import Objective, Observation


def block_gradients(
    chain: Chain, batches: list[Batch], hidden: list[Tensor], calls: list[list[Call]]
) -> list[list[Tensor]]:
    """gradients[k][b]: the gradient of sample losses at the output of block k in batch b.

    hidden: the first block's inputs, one for each batch. Each batch's mean loss counts as many times as the batch
    has samples. Kept in the dtype of `hidden` (bfloat16 for float16, whose range is too small); memory: one
    hidden state for each block and batch.
    """
    boundaries = [hidden]
    for k, block in enumerate(chain.blocks):
        with torch.no_grad(), in_float32(list(block.parameters())):
            boundaries.append([chain.run(k, h, calls[b][k]).to(h.dtype) for b, h in enumerate(boundaries[k])])
    kept = torch.bfloat16 if hidden[0].dtype == torch.float16 else hidden[0].dtype
    for b, batch in enumerate(batches):
        _, gradient = chain.leave(batch, boundaries[-1][b])
        boundaries[-1][b] = (gradient * len(batch["input_ids"])).to(kept)
    for k in range(len(chain.blocks) - 1, 0, -1):
        block = chain.blocks[k]
        with in_float32(list(block.parameters())):
            for b, h in enumerate(boundaries[k]):
                leaf = h.float().requires_grad_()
                output = chain.run(k, leaf, calls[b][k])
                (gradient,) = torch.autograd.grad(output, leaf, boundaries[k + 1][b].float())
                boundaries[k][b] = gradient.to(kept)
    return boundaries[1:]


class BlockStatistics:
    """The statistics of the layers of one block, one for each term of an objective.

    A term that reads inputs alone has one statistic for all layers with the same input (q/k/v; gate/up).
    """

    def __init__(self, layers: dict[str, nn.Linear], objective: Objective, factors: int, samples: int):
        self.layers, self.objective = layers, objective
        self.terms = [term for _, term in objective.weighted_terms]
        self.needs = frozenset().union(*(term.needs for term in self.terms))
        self._statistics: dict[tuple[Any, int], Any] = {}
        self._owner: dict[str, str] = {}  # layer -> the first layer that reads the same input
        self._factors = min(factors, samples)
        self._samples = samples
        self._seen = 0
        self._gradients: dict[str, Tensor] = {}

    def observe(
        self,
        inputs: dict[str, Tensor],
        output_gradients: dict[str, Tensor],
        dense_inputs: dict[str, Tensor],
        mask: Tensor,
        signs: Tensor,
    ) -> None:
        """One batch. inputs: of the partly pruned model, the others of the dense one; all (samples, tokens, .)."""
        real = None if bool(mask.all()) else mask
        first_reader: dict[int, str] = {}
        tokens: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            owner = self._owner.setdefault(name, first_reader.setdefault(inputs[name].data_ptr(), name))
            if owner not in tokens:
                tokens[owner] = _real_tokens(inputs[owner], real)
            delta = _real_tokens(output_gradients[name], real) if output_gradients else None
            for position, term in enumerate(self.terms):
                if "gradients" in term.needs or (term.needs == {"inputs"} and owner != name):
                    continue
                key = (name, position)
                observation = Observation(inputs=tokens[owner], output_gradients=delta)
                self._statistics[key] = term.accumulate(self._statistics.get(key), observation)
            if "gradients" in self.needs:
                self._add_gradients(name, layer, dense_inputs[name], output_gradients[name], real, signs)
        self._seen += len(mask)

    def _add_gradients(
        self, name: str, layer: nn.Linear, x: Tensor, delta: Tensor, real: Tensor | None, signs: Tensor
    ) -> None:
        """Add each sample's gradient, times its random sign, to one of the factors, in turn.

        E over the signs of the sum over factors f of (f . v)^2 is the sum over samples of (g_s . v)^2.
        """
        if name not in self._gradients:
            shape = (self._factors, *layer.weight.shape)
            self._gradients[name] = torch.zeros(shape, device=x.device)
        if real is not None:
            x, delta = (tensor.masked_fill(~real[..., None], 0) for tensor in (x, delta))
        signed = delta * (signs * (self._factors / self._samples) ** 0.5)[:, None, None]
        for s in range(len(x)):
            slot = (self._seen + s) % self._factors
            self._gradients[name][slot].addmm_(signed[s].T, x[s])

    def pop(self, name: str) -> list[Any]:
        """The statistics of one layer, in the order of the objective's terms; its gradients are let go."""
        statistics = []
        gradients = self._gradients.pop(name, None)
        for position, term in enumerate(self.terms):
            if "gradients" in term.needs:
                statistics.append(term.accumulate(None, Observation(gradients=gradients)))
            else:
                owner = self._owner[name] if term.needs == {"inputs"} else name
                statistics.append(self._statistics[owner, position])
        return statistics


def _real_tokens(tensor: Tensor, real: Tensor | None) -> Tensor:
    """(tokens, .) of a batch (samples, tokens, .), without the padded ones."""
    return tensor.flatten(0, 1) if real is None else tensor[real]


def observe_block(
    chain: Chain,
    index: int,
    statistics: BlockStatistics,
    batches: list[Batch],
    calls: list[list[Call]],
    pruned: list[Tensor],
    dense: list[Tensor],
    gradients: list[Tensor] | None,
    signs: Tensor,
) -> None:
    """Run one block, still dense, on every batch and hand what its layers see to `statistics`.

    pruned: the block's inputs in the partly pruned model, dense: in the dense one, where the gradients belong;
    after the call `dense` holds the dense block's outputs.
    """
    if not statistics.layers:
        with torch.no_grad():
            for b, hidden in enumerate(dense):
                dense[b] = chain.run(index, hidden, calls[b][index]).to(hidden.dtype)
        return
    first = 0
    for b, batch in enumerate(batches):
        mask = token_mask(batch)
        call = calls[b][index]
        dense_inputs: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        if gradients is not None:
            leaf = dense[b].float().requires_grad_()
            outputs: dict[str, Tensor] = {}
            with _recording(statistics.layers, dense_inputs, outputs):
                output = chain.run(index, leaf, call)
            found = torch.autograd.grad(output, list(outputs.values()), gradients[b].float(), allow_unused=True)
            for (name, out), delta in zip(outputs.items(), found, strict=True):
                deltas[name] = torch.zeros_like(out) if delta is None else delta
            dense[b] = output.detach().to(dense[b].dtype)
        inputs: dict[str, Tensor] = {}
        with torch.no_grad(), _recording(statistics.layers, inputs, {}):
            chain.run(index, pruned[b], call)
        statistics.observe(inputs, deltas, dense_inputs, mask, signs[first : first + len(mask)])
        first += len(mask)


@contextmanager
def _recording(
    layers: dict[str, nn.Linear], inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Iterator[None]:
    def hook(name: str):
        def record(_module, args, output):
            inputs[name] = args[0].detach()
            outputs[name] = output

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
