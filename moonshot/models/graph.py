"""Replay of a model whose segments are joined in any way: convolutional networks, encoder-decoders, one's own module.

A segment is a module that is called once in a pass of the model. What lies between segments need not be known: to find
what a segment reads in the partly pruned model, the model is run with the segments before it replaced by what they
returned, and stopped where the segment is called. One dense pass keeps what every segment reads and the loss
gradient at what it returns; when its turn comes, a segment is run alone.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moonshot.models.blocks import Loss, ModelError, check_loss, held, held_outside, in_float32, patched
from moonshot.models.calibration import Batch, batch_samples, token_mask
from moonshot.models.recording import Seen, differentiable, gradient_dtype, output_gradients, recording
from moonshot.models.scratch import Scratch, read_all
from moonshot.models.statistics import LayerStatistics

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """The segment is about to run: the rest of the model need not."""


class GraphReplay:
    """What every segment returns in the partly pruned model, as far as the replay has come.

    gradients: whether the statistics need gradients. The inputs, outputs and output gradients of all segments wait in
    `scratch`, in the model's dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        segments: list[tuple[str, nn.Module]],
        batches: list[Batch],
        loss: Loss,
        gradients: bool,
        scratch: Scratch,
    ):
        self.segments, self.batches = segments, batches
        self._model, self._loss, self._scratch = model, loss, scratch
        self._dtype = next(model.parameters()).dtype
        self._outside = held_outside(model, [segment for _, segment in segments])
        self._dense: list[list[_Arguments]] = []  # by batch and segment
        self._gradients: list[list[Any]] = []  # by batch and segment, of each result
        self._results: list[list[Any]] = [[] for _ in batches]  # by batch and segment
        self._arguments: list[_Arguments] = []  # of the segment whose turn it is, by batch
        if gradients:
            with in_float32(held(model)):
                for batch in batches:
                    self._differentiate(batch)

    def _differentiate(self, batch: Batch) -> None:
        """One dense pass, forward and backward."""
        arguments: list[_Arguments] = []
        results: list[list[Tensor]] = []

        def before(_segment: nn.Module, args: tuple, kwargs: dict[str, Any]) -> _Arguments:
            arguments.append(self._kept((args, kwargs)))
            return tree_map(_tracked, (args, kwargs))

        def after(_segment: nn.Module, _args: tuple, output: Any) -> Any:
            results.append(differentiable(output))
            return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

        handles = [s.register_forward_pre_hook(before, with_kwargs=True) for _, s in self.segments]
        handles += [s.register_forward_hook(after) for _, s in self.segments]
        try:
            loss = self._loss(self._model, batch)
        finally:
            for handle in handles:
                handle.remove()
        check_loss(loss)
        if len(arguments) != len(self.segments):
            raise ModelError(
                f"{len(arguments)} of {len(self.segments)} parts of the model ran in a batch: every batch must "
                "call the same ones once"
            )
        flat = [result for made in results for result in made if result.requires_grad]
        found = iter(torch.autograd.grad(loss * batch_samples(batch), flat, allow_unused=True) if flat else ())
        kept = gradient_dtype(self._dtype)
        self._dense.append(arguments)
        self._gradients.append([])
        for made in results:
            gradients = [next(found) if result.requires_grad else None for result in made]
            self._gradients[-1].append(
                self._scratch.keep_all([None if g is None else g.to(kept) for g in gradients])
            )

    def observe(self, index: int, statistics: LayerStatistics) -> None:
        """Run a segment, still dense and in float32, on every batch and hand what its layers see to `statistics`."""
        _, segment = self.segments[index]
        layers = statistics.layers
        self._arguments = []
        for b, batch in enumerate(self.batches):
            dense_inputs: Seen = {}
            deltas: Seen = {}
            if self._gradients and layers:
                args, kwargs = tree_map(_tracked, _in_float32(self._dense[b][index]))
                outputs: Seen = {}
                with torch.enable_grad(), recording(layers, dense_inputs, outputs):
                    result = segment(*args, **kwargs)
                deltas = output_gradients(result, read_all(self._gradients[b][index]), outputs)
                self._dense[b][index] = ((), {})
                self._gradients[b][index] = []
            self._arguments.append(self._reach(index, b))
            if layers:
                args, kwargs = _in_float32(self._arguments[b])
                inputs: Seen = {}
                with torch.no_grad(), recording(layers, inputs):
                    segment(*args, **kwargs)
                statistics.observe(batch_samples(batch), inputs, deltas, dense_inputs, token_mask(batch))

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run the segment as it is now, in float32, for the inputs of those after it."""
        _, segment = self.segments[index]
        for b, arguments in enumerate(self._arguments):
            args, kwargs = _in_float32(arguments)
            self._results[b].append(self._kept(segment(*args, **kwargs)))

    @torch.no_grad()
    def _reach(self, index: int, b: int) -> _Arguments:
        """What segment `index` is called with in batch b, those before it having returned what they did."""
        found: list[_Arguments] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            found.append(self._kept((args, kwargs)))
            raise _Reached

        def returned(k: int) -> Callable:
            return lambda *args, **kwargs: _in_float32(self._results[b][k])

        forwards = [returned(k) for k in range(index)] + [stop]
        replaced = patched([segment for _, segment in self.segments[: index + 1]], forwards)
        with in_float32(self._outside), replaced, suppress(_Reached):
            self._loss(self._model, self.batches[b])
        if not found:
            raise ModelError(
                f"{self.segments[index][0]} did not run: every batch must call the same parts once"
            )
        return found[0]

    def _kept(self, tree: Any) -> Any:
        """A copy, kept, of whatever a module reads or returns, floating-point tensors in the model's dtype."""

        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dtype = self._dtype if leaf.dtype == torch.float32 else leaf.dtype
            return leaf.detach().to(dtype, copy=True)

        return self._scratch.keep_all(tree_map(copied, tree))


def _in_float32(tree: Any) -> Any:
    """A copy of kept tensors, which a module may change in place, half precision in float32 so that it can read it."""
    halves = (torch.float16, torch.bfloat16)

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(torch.float32 if leaf.dtype in halves else leaf.dtype, copy=True)

    return tree_map(copied, read_all(tree))


def _tracked(leaf: Any) -> Any:
    """A floating-point tensor that gradients are computed through, and that a module may change in place."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf if leaf.requires_grad else leaf.detach().requires_grad_().clone()
