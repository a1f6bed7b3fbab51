"""A model divided into parts that run one after the other, and what is to be known of the layers in them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import isclose
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moonshot.models.adapter import Adapter, Parts
from moonshot.models.batch_sizes import joined, logits_at_once, replayed_at_once
from moonshot.models.batch_tree import leaves
from moonshot.models.blocks import Chain, find_blocks
from moonshot.models.calibration import (
    Batch,
    batch_samples,
    batch_tokens,
    decoder_mask,
    is_of_decoder,
    one_by_one,
    split,
    take,
    token_mask,
)
from moonshot.models.chain import ChainAdapter
from moonshot.models.graph import GraphAdapter
from moonshot.models.in_turn import InTurn, between_passes
from moonshot.models.layer_view import LayerView
from moonshot.models.left_out import left_out, shared_between
from moonshot.models.losses import Loss, LossNotFiniteError, model_loss, naming_sample
from moonshot.models.modules import ModelError, check_model, evaluating
from moonshot.models.offload import Offload
from moonshot.models.precision import (
    device_of_passes,
    home,
    itemsize_of_passes,
    tensors_of,
)
from moonshot.models.replay import Replay
from moonshot.models.roles import routers
from moonshot.models.targets import TargetError, listed, select
from moonshot.models.trial_run import TrialRun, trial_run

_CHAIN = 0.8  # the share of all prunable weights that a chain of blocks must hold
_SAME = 1e-3  # relative difference of the loss through a chain
_ALIKE = 1e-4, 1e-2  # the same, of a batch and of its samples, in single and in half precision


@dataclass(frozen=True)
class Partition:
    """The parts that an adapter finds, by name and in the order in which they run, and what is known of their layers.

    heads: names of the layers that the adapter leaves alone, such as what is on top of a transformers model.
    routers: names of the layers that choose among experts, or weigh them.
    unreached: the layers that no sample of any batch reached, in a part or not.
    left_out: {name: why it stays as it is} of layers and other weights that cannot be pruned (models.left_out).
    outside: names of the layers, and of modules with other weights, that are in no part.
    decoder: names of the layers that read the decoder's tokens in an encoder-decoder.
    routed: some layers do not read the same number of rows for every sample, such as experts.
    one_by_one: samples are replayed alone, so that all that a layer reads in a batch belongs to one sample, and none of
    it is padding: where layers are routed, or where a batch is not one sample after the other in what a layer reads.
    summed: the loss of a batch is the sum over its samples.
    weighted: it is another mean than that of its samples' losses, such as a mean over all tokens, and samples are
    replayed alone, as they are.
    """

    adapter: Adapter
    parts: Parts
    heads: frozenset[str] = frozenset()
    routers: frozenset[str] = frozenset()
    unreached: dict[str, LayerView] = field(default_factory=dict)
    routed: bool = False
    one_by_one: bool = False
    summed: bool = False
    weighted: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    decoder: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()

    def layers(self) -> dict[str, LayerView]:
        """{name in the model: layer} of all in the parts that can be pruned, and of those that were not reached."""
        found = self.unreached | {name: view for part in self.parts for name, view in self.layers_in(*part)}
        return {name: view for name, view in found.items() if name not in self.left_out}

    def layers_in(self, name: str, module: nn.Module) -> Iterator[tuple[str, LayerView]]:
        """(name in the model, layer) of the layers in a part."""
        return self.adapter.layers(name, module)

    def select(self, targets: str | Iterable[str] | None, ignore: str | Iterable[str]) -> list[str]:
        """The names of the layers to prune (`targets.select`); without targets, all but heads and routers.

        Raises TargetError for an expression that matches nothing, and where all that match are left out.
        """
        matching = self._matching(targets, ignore)
        if found := [name for name in matching if name not in self.left_out]:
            return found
        raise TargetError(f"no layer is left to prune: {_reasons(self.skipped(targets, ignore))}")

    def skipped(self, targets: str | Iterable[str] | None, ignore: str | Iterable[str]) -> dict[str, str]:
        """{name: why it stays as it is} of those that `select` would give and that cannot be pruned."""
        return {name: self.left_out[name] for name in self._matching(targets, ignore) if name in self.left_out}

    def left_alone(self) -> dict[str, str]:
        """{name: why it is pruned only if it is named, or cannot be named at all} of all such."""
        return (
            dict.fromkeys(sorted(self.outside), "outside the blocks")
            | dict.fromkeys(sorted(self.heads), "on top of the base model")
            | dict.fromkeys(sorted(self.routers), "routers of experts")
        )

    def _matching(self, targets: str | Iterable[str] | None, ignore: str | Iterable[str]) -> list[str]:
        left_alone = self.heads | self.routers
        names = [*self.layers(), *self.left_out]
        try:
            return select([n for n in names if targets is not None or n not in left_alone], targets, ignore)
        except TargetError as error:
            if self.outside:
                error.add_note(
                    "layers outside the blocks can be pruned with adapter=GraphAdapter() (models.graph)"
                )
            raise

    def check_reached(self, names: Iterable[str]) -> None:
        """Raises ModelError for a layer that no sample reached."""
        if unreached := [name for name in names if name in self.unreached]:
            raise ModelError(
                f"no calibration sample reached {listed(unreached)}: leave them out with ignore, or with "
                'unreached="skip" (--unreached skip)'
            )

    def batches(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        """The batches that are replayed, of one sample each where that must be."""
        if self.one_by_one:
            return _samples(model, batches)
        return split(batches, 1) if self.weighted else batches

    def replay(
        self,
        model: nn.Module,
        batches: list[Batch],
        loss: Loss,
        gradients: bool,
        offload: Offload,
        dense: bool = False,
    ) -> Replay:
        """The adapter's replay of the batches, or of larger ones where passes compute on a GPU that has the memory.

        Not with `dense`: what a refit does in a step is made of the batches as they are.
        """
        batches = self.batches(model, batches)
        alone = self.one_by_one or self.weighted
        if loss is model_loss and isinstance(self.adapter, ChainAdapter) and not (alone or dense):
            batches = self._joined(model, batches)
        if self.summed:
            loss = partial(_mean_of_sum, loss)
        return self.adapter.replay(model, self.parts, batches, loss, gradients, offload, dense)

    def _joined(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        device = device_of_passes() or home(model)
        layers = [[view for _, view in self.layers_in(*part)] for part in self.parts]
        length = max((batch_tokens(batch) // batch_samples(batch) for batch in batches), default=0)
        return joined(batches, replayed_at_once(model, layers, length, itemsize_of_passes(model), device))


def partition_model(
    model: nn.Module, batches: list[Batch], loss: Loss, adapter: Adapter | None = None
) -> Partition:
    """The parts of a model; without an adapter, a chain of blocks where the model is one, else the finest graph.

    Raises ModelError for a model without weights or layers, that does not run, or whose parts do not run once each.
    """
    check_model(model)
    trials = _Trials(model, loss, adapter or GraphAdapter())
    views, head = trials.views, trials.adapter.left_alone(model)
    reasons = left_out(model, views)
    weights = {n: view.weight.numel() for n, view in views.items() if n not in head and n not in reasons}
    if not weights:
        raise ModelError(
            f"{type(model).__name__} has no Linear or convolutional layer to prune"
            + (f": {_reasons(reasons)}" if reasons else "")
        )
    with evaluating(model), trials.placed():
        with _naming_weights(model), naming_sample(0, 1, lambda _: None):
            run = trials.run(take(batches[0], [0]))
        if not run.rows:
            raise ModelError("the loss ran no layer of the model: it must call model")
        found = _Samples(routed=True, alone=True)
        if not any(view.routed for view in views.values()):
            found = trials.compare(batches, run)
        if adapter is None:
            adapter = trials.adapter
            if _holds_most(adapter, trials.blocks, weights, run) and _is_chain(
                model, trials.blocks, take(batches[0], [0]), loss, run.loss
            ):
                adapter = ChainAdapter()
        for batch in _samples(model, batches) if found.alone else batches:
            if len(run.reached(views) | run.uncalled) == len(views) and not (
                found.routed and adapter.whole_model
            ):
                break
            run = run.and_then(trials.run(batch))
        decoder = trials.decoder(batches) if _has_decoder(model) else frozenset()
    reached = run.reached(views)
    reasons |= {
        name: "the model reads its weight without calling it"
        for name in views
        if name in run.uncalled and name not in reached
    }
    reasons |= {
        name: "the model also multiplies by its weight without calling it"
        for name in views
        if name in run.elsewhere and name in reached and name not in reasons
    }
    parts = adapter.parts(model, run)
    _check_parts(model, parts, run.order)
    _check_uses(adapter, parts, run)
    inside = {name for part in parts for name, _ in adapter.layers(*part)}
    unreached = {
        name: view
        for name, view in views.items()
        if name not in reached and (adapter.whole_model or name in inside) and name not in reasons
    }
    outside: frozenset[str] = frozenset()
    if adapter.whole_model:
        forgotten = [name for name in views if name in reached and name not in inside]
        reasons = dict.fromkeys(forgotten, "it is in none of the adapter's parts") | reasons
    else:
        outside = frozenset(
            name
            for name in (*views, *reasons)
            if not any(f"{name}.".startswith(f"{part}.") for part, _ in parts)
        )
        reasons = {name: reason for name, reason in reasons.items() if name not in outside}
    return Partition(
        adapter,
        parts,
        head,
        routers(model) if found.routed else frozenset(),
        unreached,
        *found,
        left_out=reasons,
        decoder=decoder,
        outside=outside,
    )


@contextmanager
def _naming_weights(model: nn.Module) -> Iterator[None]:
    """Where a loss is not finite and weights are not either, say that it is these."""
    try:
        yield
    except LossNotFiniteError as error:
        broken = [
            name
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not bool(parameter.float().isfinite().all())
        ]
        if broken:
            raise ModelError(
                f"{listed(broken)} hold NaN or infinity ({error}): load the model once more"
            ) from None
        raise


def _mean_of_sum(loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch, from a loss that is the sum over its samples."""
    return loss(model, batch) / batch_samples(batch)


def _reasons(left_out: Mapping[str, str]) -> str:
    return listed((f"{name}: {reason}" for name, reason in left_out.items()), "; ")


def _check_parts(model: nn.Module, parts: Parts, order: list[nn.Module]) -> None:
    """Raises ModelError for parts that are not the model's, are inside one another, or ran in another order."""
    modules = dict(model.named_modules())
    if not parts:
        raise ModelError(f"the adapter finds no parts in {type(model).__name__}: `parts` must name some")
    for name, part in parts:
        if modules.get(name) is not part:
            raise ModelError(f"the adapter's part {name!r} is not what the model has under that name")
    inside = [
        name for name, _ in parts for other, _ in parts if name != other and f"{name}.".startswith(f"{other}.")
    ]
    if inside or len({name for name, _ in parts}) < len(parts):
        raise ModelError(
            f"the adapter's parts overlap: {', '.join(inside) or 'one is named twice'}; each layer belongs to one part"
        )
    place = {module: k for k, module in enumerate(order)}
    ran = [(name, place[part]) for name, part in parts if part in place]
    for (before, first), (name, second) in pairwise(ran):
        if second < first:
            raise ModelError(
                f"the adapter's part {name!r} runs before {before!r}: `parts` must give them in the order in "
                "which they run"
            )


def _check_uses(adapter: Adapter, parts: Parts, run: TrialRun) -> None:
    """Raises ModelError for a layer that also runs outside of its part, where nothing would be seen of it."""
    for name, part in parts:
        for layer, view in adapter.layers(name, part):
            if not run.encloses(part, [view]):
                raise ModelError(
                    f"{layer} also runs outside of {name!r}, the part of the model that it is in: leave the part "
                    "out, or let a larger one hold all calls of the layer"
                )


class _Samples(NamedTuple):
    """How the samples of a batch go together: the fields of a Partition, of which `alone` is one_by_one."""

    routed: bool = False
    alone: bool = False
    summed: bool = False
    weighted: bool = False


class _Trials:
    """Trial runs of one model."""

    def __init__(self, model: nn.Module, loss: Loss, adapter: Adapter):
        self.model, self.loss, self.adapter = model, loss, adapter
        self.blocks = find_blocks(model)
        self.views = dict(adapter.layers("", model))

    def placed(self) -> AbstractContextManager[None]:
        """What is there between trial runs."""
        return between_passes(self.model, [block for _, block in self.blocks])

    def run(self, batch: Batch) -> TrialRun:
        return trial_run(self.model, self.blocks, self.views, batch, self.loss)

    def decoder(self, batches: list[Batch]) -> frozenset[str]:
        """Layers that read as many tokens where the encoder reads one less: they read the decoder's.

        Where the encoder reads no text but sounds or images, those that read one less where the decoder does. Empty
        where nothing is padding, so that it does not matter.
        """
        sample = take(batches[0], [0])
        ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
        padded = any(token_mask(batch) is not None or decoder_mask(batch) is not None for batch in batches)
        if padded and not isinstance(ids, Tensor) and (short := _with_a_shorter_decoder(sample)):
            before, after = self.run(sample), self.run(short)
            return frozenset(name for name, tokens in before.tokens.items() if after.tokens.get(name) != tokens)
        if not padded or not isinstance(ids, Tensor) or ids.shape[-1] < 2:
            return frozenset()
        names = ["input_ids", *(["attention_mask"] if "attention_mask" in sample else [])]
        mask = token_mask(sample)
        spare = 0 if mask is None else int(mask[0].int().argmin())
        rest = [k for k in range(ids.shape[-1]) if k != spare]
        before = self.run(sample)
        after = self.run({**sample, **{name: sample[name][..., rest] for name in names}})
        return frozenset(name for name, tokens in before.tokens.items() if after.tokens.get(name) == tokens)

    def compare(self, batches: list[Batch], first: TrialRun) -> "_Samples":
        """What the samples of a batch show alone and together.

        first: what the first sample of the first batch has shown.

        Of the first batch with several samples, as many as have their logits at once (`logits_at_once`), two at least;
        where each has one, of the first 16 in the sizes of the first.
        """
        several = next((batch for batch in batches if batch_samples(batch) > 1), None)
        if several is not None:
            at_once = logits_at_once(self.model) // max(batch_tokens(take(several, [0])), 1)
            several = take(several, list(range(min(batch_samples(several), max(at_once, 2)))))
        if several is None:
            samples = [batch for batch in batches if _sizes(batch) == _sizes(batches[0])][:16]
        else:
            samples = [take(several, [k]) for k in range(batch_samples(several))]
        if several is not None and batch_samples(batches[0]) == 1:
            first = self.run(samples[0])
        alone = {name: [sums.clone() for sums in calls] for name, calls in first.sums.items()}
        losses = [first.loss]
        for sample in samples[1:]:
            run = self.run(sample)
            if run.rows != first.rows:
                return _Samples(routed=True, alone=True)
            alone = {name: list(map(_joined, calls, run.sums[name])) for name, calls in alone.items()}
            losses.append(run.loss)
        if several is None:
            return _Samples()
        together = self.run(several)
        if _rearranged(alone, together.sums):
            return _Samples(alone=True)
        if self._alike(together.loss, sum(losses) / len(losses)) or not _same(alone, together.sums):
            return _Samples()
        summed = self._alike(together.loss, sum(losses))
        return _Samples(summed=summed, weighted=not summed and self._is_weighted(several, losses))

    def _is_weighted(self, batch: Batch, losses: list[float]) -> bool:
        """Whether a loss is some mean over samples, and does not compare them with each other (is contrastive).

        Then that of a sample twice is that of the sample. losses: of the batch's samples.
        """
        loss, k = max((abs(loss), k) for k, loss in enumerate(losses))
        return loss > 0 and self._alike(self.run(take(batch, [k, k])).loss, losses[k])

    def _alike(self, one: float, other: float) -> bool:
        return isclose(one, other, rel_tol=_ALIKE[itemsize_of_passes(self.model) < 4])


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


def _rearranged(alone: dict[str, list[Tensor]], together: dict[str, list[Tensor]]) -> bool:
    """Whether layers read other rows in a batch than for one sample after the other, or the same in another order.

    Not where they read as many other ones: rows of which each depends on the whole batch are in some order too.
    """
    if {name: len(calls) for name, calls in alone.items()} != {
        name: len(calls) for name, calls in together.items()
    }:
        return True
    pairs = [pair for name in alone for pair in zip(alone[name], together[name], strict=True)]
    return any(
        len(one) != len(other) or (not _close(one, other) and _close(one.sort().values, other.sort().values))
        for one, other in pairs
    )


def _same(alone: dict[str, list[Tensor]], together: dict[str, list[Tensor]]) -> bool:
    """Whether layers read in a batch what they read of its samples alone, so that no sample depends on others."""
    return all(
        _close(one, other) for name in alone for one, other in zip(alone[name], together[name], strict=True)
    )


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, equal_nan=True)


def _sizes(batch: Batch) -> list[torch.Size]:
    return [leaf.shape for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def _has_decoder(model: nn.Module) -> bool:
    """Whether a batch has two sequences of tokens, each with a mask of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _with_a_shorter_decoder(sample: Batch) -> Batch | None:
    """A sample without one token of its decoder's, padding if there is any; None where it has one token."""
    mask = decoder_mask(sample)
    texts = {
        n: leaf for n, leaf in sample.items() if is_of_decoder(n) and isinstance(leaf, Tensor) and leaf.ndim > 1
    }
    length = max((leaf.shape[1] for leaf in texts.values()), default=0)
    if length < 2:
        return None
    spare = length - 1 if mask is None else int(mask[0].int().argmin())
    rest = [k for k in range(length) if k != spare]
    return {**sample, **{name: leaf[:, rest] for name, leaf in texts.items() if leaf.shape[1] == length}}


def _samples(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    return one_by_one(batches, aligned=not _has_decoder(model))


def _holds_most(adapter: Adapter, blocks: Parts, weights: Mapping[str, int], run: TrialRun) -> bool:
    """Whether the blocks hold most of the weights, each its own, and all of their uses. weights: of each layer."""
    layers = [list(adapter.layers(*block)) for block in blocks]
    share = sum(weights[name] for block in layers for name, _ in block if name in weights)
    alone = all(
        run.encloses(block, dict(views).values()) for (_, block), views in zip(blocks, layers, strict=True)
    )
    return share >= _CHAIN * sum(weights.values()) and alone and not shared_between(layers)


@torch.no_grad()
def _is_chain(model: nn.Module, blocks: Parts, sample: Batch, loss: Loss, expected: float) -> bool:
    """Whether the blocks, one after the other, turn hidden states of one shape into the model's own loss.

    What is outside of them is `placed`.
    """
    chain = Chain(model, [block for _, block in blocks], loss)
    turns = InTurn([tensors_of(block) for block in chain.blocks])
    try:
        hidden, calls = chain.enter(sample)
        for index, call in enumerate(calls):
            before = hidden.shape
            with turns.placed(index):
                hidden = chain.run(index, hidden, call)
            if hidden.shape != before:
                return False
        with torch.enable_grad():
            found, _ = chain.leave(sample, hidden)
    except (ModelError, TypeError, IndexError, AttributeError, RuntimeError, ValueError):
        return False  # whatever a model does that is no chain
    return abs(found - expected) <= _SAME * max(abs(expected), 1e-6)
