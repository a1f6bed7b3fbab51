"""Replay of a chain of blocks, of which each reads the one before: what Llama and most transformers are.

One backward pass over the dense model, a block at a time, keeps the loss gradient at every block's output
(`block_gradients`). When a block's turn comes, it is run alone, forward from its inputs and backward from that
gradient, so that one block's statistics and activations are in memory at a time.
"""

from functools import partial

import torch
from torch import Tensor, nn

from moonshot.models.adapter import Adapter, Parts
from moonshot.models.blocks import Call, Chain, find_blocks
from moonshot.models.calibration import Batch, batch_samples, decoder_mask, real_tokens, take, token_mask
from moonshot.models.in_turn import InTurn
from moonshot.models.layer_view import LayerView
from moonshot.models.losses import Loss, naming_sample
from moonshot.models.offload import Offload, Offloaded, in_turn
from moonshot.models.precision import activation_dtype, as_read, as_stored, placed, tensors_of, widened
from moonshot.models.recording import Seen, gradient_dtype, output_gradients, recording
from moonshot.models.replay import Replay
from moonshot.models.statistics import LayerStatistics
from moonshot.models.trial_run import TrialRun


class ChainAdapter(Adapter):
    """The blocks of a transformer, each of which reads the one before and nothing else."""

    def parts(self, model: nn.Module, run: TrialRun) -> Parts:
        return find_blocks(model)

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
        return ChainReplay(model, parts, batches, loss, gradients, offload, dense)


class ChainReplay:
    """The blocks' inputs in the partly pruned model and in the dense one, as far as the replay has come.

    gradients: whether the statistics need gradients; dense: whether `dense_output` is wanted. What is not
    needed yet is stored in `offload`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[tuple[str, nn.Module]],
        batches: list[Batch],
        loss: Loss,
        gradients: bool,
        offload: Offload,
        dense: bool = False,
    ):
        self.parts, self.batches = blocks, batches
        self._masks = [(token_mask(batch), decoder_mask(batch)) for batch in batches]
        self._chain = Chain(model, [block for _, block in blocks], loss)
        self._dtype = activation_dtype(model)
        self._pruned: list[Offloaded] = []
        self._calls: list[list[Call]] = []
        with placed(self._chain.outside):
            for batch in batches:
                hidden, calls = self._chain.enter(batch)
                self._pruned.append(offload.store(as_stored(hidden, self._dtype)))
                self._calls.append(calls)
        self._dense: list[Offloaded] = []
        self._gradients: list[list[Offloaded]] = []
        if gradients:
            self._gradients = block_gradients(self._chain, batches, self._pruned, self._calls, offload)
        if gradients or dense:
            self._dense = [offload.store(hidden.read()) for hidden in self._pruned]
        self._wants_moments = gradients and dense
        self._moment: Tensor | None = None  # of the block whose turn it is

    def observe(self, index: int, statistics: LayerStatistics) -> None:
        """Run a block, still dense and `placed`, on every batch and hand what its layers see to `statistics`."""
        gradients = self._gradients[index] if self._gradients else []
        self._moment = None
        for b in in_turn(self._pruned, self._dense, gradients):
            batch = self.batches[b]
            wanted = gradients and (statistics.layers or self._wants_moments)
            gradient = widened(gradients[b].read()) if wanted else None
            dense_inputs, deltas = self._differentiate(index, b, statistics.layers, gradient)
            if gradient is not None and self._wants_moments:
                self._moment = _with_moment(self._moment, real_tokens(gradient, batch))
            if statistics.layers:
                inputs: Seen = dense_inputs if index == 0 else {}  # nothing before it is pruned
                if not inputs:
                    with torch.no_grad(), recording(statistics.layers, inputs):
                        self._chain.run(index, self._pruned[b].read(), self._calls[b][index])
                statistics.observe(batch_samples(batch), inputs, deltas, dense_inputs, *self._masks[b])
        if self._gradients:
            self._gradients[index] = []

    def _differentiate(
        self, index: int, b: int, layers: dict[str, LayerView], gradient: Tensor | None
    ) -> tuple[Seen, Seen]:
        """Run the dense block on a batch: what its layers read, and the gradients at what they return.

        gradient: that at what the block returns, if it is wanted.
        """
        if not self._dense:
            return {}, {}
        inputs: Seen = {}
        outputs: Seen = {}
        differentiated = bool(layers) and gradient is not None
        leaf = as_read(self._dense[b].read()).requires_grad_()
        with torch.set_grad_enabled(differentiated), recording(layers, inputs, outputs):
            output = self._chain.run(index, leaf, self._calls[b][index])
        self._dense[b].replace(as_stored(output.detach(), self._dtype))
        if not differentiated:
            return {}, {}
        return inputs, output_gradients(output, [gradient], outputs)

    def output(self, index: int, b: int) -> Tensor:
        return self._chain.run(index, self._pruned[b].read(), self._calls[b][index])

    def dense_output(self, index: int, b: int) -> Tensor:
        return as_read(self._dense[b].read())

    def output_moment(self, index: int) -> Tensor | None:
        return self._moment

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run the block as it is now, for the inputs of the next one, if there is one."""
        if index == len(self.parts) - 1:
            return
        for b in in_turn(self._pruned):
            self._pruned[b].replace(as_stored(self.output(index, b), self._dtype))


def _with_moment(moment: Tensor | None, gradients: Tensor) -> Tensor:
    """A sum of `g g'`, (channels, channels), with those of more tokens."""
    rows = gradients.flatten(0, -2).double()
    return rows.T @ rows if moment is None else moment.addmm_(rows.T, rows)


def block_gradients(
    chain: Chain, batches: list[Batch], hidden: list[Offloaded], calls: list[list[Call]], offload: Offload
) -> list[list[Offloaded]]:
    """gradients[k][b]: the gradient of sample losses at the output of block k in batch b.

    hidden: the first block's inputs, one for each batch. Each batch's mean loss counts as many times as the batch
    has samples. In the dtype of `hidden` (bfloat16 for float16, whose range is too small), one hidden state for each
    block and batch, all stored in `offload`.
    """
    hidden_dtype = activation_dtype(chain.model)
    dtype = gradient_dtype(hidden_dtype)
    boundaries, count = [hidden], len(chain.blocks)
    blocks = [tensors_of(block) for block in chain.blocks]
    turns = InTurn([*blocks, chain.outside, *blocks[:0:-1]])
    for k in range(count):
        boundaries.append([])
        with torch.no_grad(), turns.placed(k):
            for b in in_turn(boundaries[k]):
                output = chain.run(k, boundaries[k][b].read(), calls[b][k])
                boundaries[k + 1].append(offload.store(as_stored(output, hidden_dtype)))
    with turns.placed(count):
        for b in in_turn(boundaries[-1]):
            batch, hidden_states = batches[b], boundaries[-1][b].read()
            with naming_sample(b, batch_samples(batch), partial(_leave_one, chain, batch, hidden_states)):
                _, gradient = chain.leave(batch, hidden_states)
            boundaries[-1][b].replace((gradient * batch_samples(batch)).to(dtype))
    for k in range(count - 1, 0, -1):
        with turns.placed(2 * count - k):
            for b in in_turn(boundaries[k], boundaries[k + 1]):
                stored = boundaries[k][b]
                leaf = as_read(stored.read()).requires_grad_()
                output = chain.run(k, leaf, calls[b][k])
                above = boundaries[k + 1][b].read().to(output.dtype)
                (gradient,) = torch.autograd.grad(output, leaf, above)
                stored.replace(gradient.to(dtype))
    return boundaries[1:]


def _leave_one(chain: Chain, batch: Batch, hidden: Tensor, sample: int) -> None:
    """`Chain.leave` with one sample of a batch, whose hidden states may be several rows."""
    rows = len(hidden) // batch_samples(batch)
    chain.leave(take(batch, [sample]), hidden[sample * rows : (sample + 1) * rows])
