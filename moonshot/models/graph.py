"""Replay of a model whose parts are joined in any way: convolutional networks, encoder-decoders, one's own module.

A part is a module that is called once in a pass of the model. What lies between parts need not be known: to find
what a part reads in the partly pruned model, the model is run with the parts before it replaced by what they
returned, and stopped where the part is called. One dense pass keeps what every part reads and the loss
gradient at what it returns; when its turn comes, a part is run alone.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moonshot.models.adapter import Adapter, Parts
from moonshot.models.batchnorm import has_running_statistics
from moonshot.models.calibration import Batch, batch_samples, decoder_mask, take, token_mask
from moonshot.models.layer_view import LayerView
from moonshot.models.left_out import shared_between
from moonshot.models.losses import Loss, check_loss, gradients_of, loss_of, naming_sample
from moonshot.models.modules import ModelError, hooked, replaced
from moonshot.models.offload import Offload, Offloaded, read_all
from moonshot.models.precision import (
    activation_dtype,
    as_read,
    as_stored,
    placed,
    tensors_of,
    tensors_outside,
)
from moonshot.models.recording import (
    Seen,
    differentiable,
    gradient_dtype,
    main_output,
    output_gradients,
    recording,
)
from moonshot.models.replay import Replay
from moonshot.models.settings import without_cache
from moonshot.models.statistics import LayerStatistics
from moonshot.models.trial_run import TrialRun

_LAYERS = 4  # in a part at most, where it can be divided
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class GraphAdapter(Adapter):
    """The finest parts that run once each in a pass of the model; a subclass can name others."""

    whole_model = True

    def parts(self, model: nn.Module, run: TrialRun) -> Parts:
        views = dict(self.layers("", model))
        running = {module for name in run.reached(views) for module in views[name].modules}
        parts = self._divided("", model, running, run)
        if shared := shared_between(self.layers(*part) for part in parts):
            raise ModelError(
                f"{', '.join(shared)} have one weight and run apart from each other: the loss must call the model once"
            )
        if repeated := [name or "the model" for name, part in parts if part not in run.once]:
            raise ModelError(
                f"{', '.join(repeated)} ran more than once for one loss, or not for every batch: it must call the "
                "model once"
            )
        inside = {module for _, part in parts for module in part.modules()}
        parts += [  # batch norms between them take their turns too, for their running statistics
            (name, module)
            for name, module in model.named_modules()
            if module in run.once and module not in inside and has_running_statistics(module)
        ]
        return sorted(parts, key=lambda part: run.order.index(part[1]))

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
        return GraphReplay(model, parts, batches, loss, gradients, offload, dense)

    def _divided(self, name: str, module: nn.Module, running: set[nn.Module], run: TrialRun) -> Parts:
        """A module divided until a part has few layers that run, or what is in it does not run exactly once.

        A part holds all calls of its layers: a module of which one layer runs elsewhere too is divided no further.
        """
        once = run.once

        def count(part: nn.Module) -> int:
            return sum(view.module in running for _, view in self.layers("", part))

        children = [
            (f"{name}.{key}".lstrip("."), child) for key, child in module.named_children() if count(child)
        ]
        if not children or (module in once and count(module) <= _LAYERS):
            return [(name, module)] if count(module) else []
        parts = [part for child in children for part in self._divided(*child, running, run)]
        layers = [[*self.layers(*part)] for part in parts]
        divided = not shared_between(layers) and all(
            part in once and run.encloses(part, dict(of_part).values())
            for (_, part), of_part in zip(parts, layers, strict=True)
        )
        return parts if divided or module not in once else [(name, module)]


class _Reached(Exception):
    """The part is about to run: the rest of the model need not."""


class GraphReplay:
    """What every part returns in the partly pruned model, as far as the replay has come.

    gradients: whether the statistics need gradients; dense: whether `dense_output` is wanted. The inputs, outputs and
    output gradients of all parts wait in `offload`, in the model's dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: list[tuple[str, nn.Module]],
        batches: list[Batch],
        loss: Loss,
        gradients: bool,
        offload: Offload,
        dense: bool = False,
    ):
        self.parts, self.batches = parts, batches
        self._masks = [(token_mask(batch), decoder_mask(batch)) for batch in batches]
        self._model, self._loss, self._offload = model, loss, offload
        self._dtype = activation_dtype(model)
        self._outside = tensors_outside(model, [part for _, part in parts])
        self._dense: list[list[_Arguments]] = []  # by batch and part
        self._gradients: list[list[Any]] = []  # by batch and part, of each result
        self._results: list[list[Any]] = [[] for _ in batches]  # by batch and part
        self._arguments: list[_Arguments] = []  # of the part whose turn it is, by batch
        self._wants_dense = dense
        self._dense_outputs: list[Offloaded] = []  # of the part whose turn it is, by batch
        if gradients or dense:
            with placed(tensors_of(model)), torch.set_grad_enabled(gradients):
                for b, batch in enumerate(batches):
                    with naming_sample(b, batch_samples(batch), partial(self._loss_of, batch)):
                        self._run_dense(batch, gradients)

    @torch.no_grad()
    def _loss_of(self, batch: Batch, sample: int) -> None:
        """Raises LossNotFiniteError where that is what a sample's loss is."""
        check_loss(loss_of(self._loss, self._model, take(batch, [sample])))

    def _run_dense(self, batch: Batch, gradients: bool) -> None:
        """One dense pass, forward and, for gradients, backward."""
        arguments: list[_Arguments] = []
        results: list[list[Tensor]] = []

        def before(_part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments.append(self._stored(without_cache(args, kwargs)))

        def after(_part: nn.Module, _args: tuple, output: Any) -> Any:
            output = tree_map(
                _tracked, output
            )  # a part without gradients of its own, such as a frozen one, too
            outside = tree_map(_viewed, output)  # not what the part itself makes of one result for another
            results.append(differentiable(outside))
            return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outside)

        with (
            hooked(
                part.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for _, part in self.parts
            ),
            hooked(part.register_forward_hook(after) for _, part in self.parts),
        ):
            loss = loss_of(self._loss, self._model, batch)
        check_loss(loss)
        if len(arguments) != len(self.parts):
            raise ModelError(
                f"{len(arguments)} of {len(self.parts)} parts of the model ran in a batch: every batch must "
                "call the same ones once"
            )
        self._dense.append(arguments)
        if not gradients:
            return
        flat = [result for made in results for result in made if result.requires_grad]
        found = iter(gradients_of(loss * batch_samples(batch), flat))
        dtype = gradient_dtype(self._dtype)
        self._gradients.append([])
        for made in results:
            at_results = [next(found) if result.requires_grad else None for result in made]
            self._gradients[-1].append(
                self._offload.store_all([None if g is None else g.to(dtype) for g in at_results])
            )

    def observe(self, index: int, statistics: LayerStatistics) -> None:
        """Run a part, still dense and `placed`, on every batch and hand what its layers see to `statistics`."""
        _, part = self.parts[index]
        layers = statistics.layers
        self._dense_outputs = []
        with placed(self._outside):
            self._arguments = [self._reach(index, b) for b in range(len(self.batches))]
        for b, batch in enumerate(self.batches):
            dense_inputs, deltas = self._differentiate(index, b, layers)
            if layers:
                inputs: Seen = dense_inputs if index == 0 else {}  # nothing before it is pruned
                if not inputs:
                    args, kwargs = _to_read(self._arguments[b])
                    with torch.no_grad(), recording(layers, inputs):
                        part(*args, **kwargs)
                statistics.observe(batch_samples(batch), inputs, deltas, dense_inputs, *self._masks[b])

    def _differentiate(self, index: int, b: int, layers: dict[str, LayerView]) -> tuple[Seen, Seen]:
        """Run the dense part on a batch: what its layers read, and the gradients at what they return."""
        differentiated = bool(self._gradients and layers)
        if not (differentiated or self._wants_dense):
            return {}, {}
        _, part = self.parts[index]
        inputs: Seen = {}
        outputs: Seen = {}
        args, kwargs = _to_read(self._dense[b][index])
        with torch.set_grad_enabled(differentiated), recording(layers, inputs, outputs):
            result = part(*args, **kwargs)
        self._dense[b][index] = ((), {})
        if self._wants_dense:
            self._dense_outputs.append(self._stored(main_output(result)))
        if not differentiated:
            return {}, {}
        deltas = output_gradients(result, read_all(self._gradients[b][index]), outputs)
        self._gradients[b][index] = []
        return inputs, deltas

    def output(self, index: int, b: int) -> Tensor:
        _, part = self.parts[index]
        args, kwargs = _to_read(self._arguments[b])
        return main_output(part(*args, **kwargs))

    def dense_output(self, index: int, b: int) -> Tensor:
        return as_read(self._dense_outputs[b].read())

    def output_moment(self, index: int) -> Tensor | None:
        return None  # parts return anything, in any layout

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run the part as it is now, for the inputs of those after it, if there are any."""
        if index == len(self.parts) - 1:
            return
        _, part = self.parts[index]
        for b, arguments in enumerate(self._arguments):
            args, kwargs = _to_read(arguments)
            self._results[b].append(self._stored(part(*args, **kwargs)))

    @torch.no_grad()
    def _reach(self, index: int, b: int) -> _Arguments:
        """What part `index` is called with in batch b, those before it having returned what they did.

        What is outside of the parts is `placed`.
        """
        found: list[_Arguments] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            found.append(self._stored(without_cache(args, kwargs)))
            raise _Reached

        def returned(k: int) -> Callable:
            return lambda *args, **kwargs: _to_read(self._results[b][k])

        forwards = [returned(k) for k in range(index)] + [stop]
        with replaced([part for _, part in self.parts[: index + 1]], forwards), suppress(_Reached):
            loss_of(self._loss, self._model, self.batches[b])
        if not found:
            raise ModelError(f"{self.parts[index][0]} did not run: every batch must call the same parts once")
        return found[0]

    def _stored(self, tree: Any) -> Any:
        """A stored copy of whatever a module reads or returns, floating-point tensors in the model's dtype."""

        def copied(leaf: Any) -> Any:
            return as_stored(leaf.detach(), self._dtype) if isinstance(leaf, Tensor) else leaf

        return self._offload.store_all(tree_map(copied, tree))


def _to_read(tree: Any) -> Any:
    """A copy of stored tensors, which a module may change in place, as it reads them."""
    return tree_map(lambda leaf: as_read(leaf) if isinstance(leaf, Tensor) else leaf, read_all(tree))


def _viewed(leaf: Any) -> Any:
    """A tensor with a place of its own in the graph that gradients are computed by."""
    return leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf


def _tracked(leaf: Any) -> Any:
    """A floating-point tensor that gradients are computed through, and that a module may change in place."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf if leaf.requires_grad else leaf.detach().requires_grad_().clone()
