"""The loss of a text from some of its tokens at a time: the same loss, and the same gradient."""

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, GPT2Config, LlamaConfig

import moonshot as ms
from moonshot.models import blocks, partition
from moonshot.models.blocks import Chain, find_blocks
from moonshot.models.losses import model_loss
from moonshot.models.pieces import can_be_taken_apart, in_pieces, pieces
from tests.models import decoder, tokens, weights

PADDED = torch.ones(6, 16, dtype=torch.long)
PADDED[0, :7] = PADDED[3, 5:] = 0
LABELS = torch.where(torch.arange(16) % 3 == 1, tokens(), -100)
BATCHES = {
    "plain": dict(input_ids=tokens()),
    "padded": dict(input_ids=tokens(), attention_mask=PADDED),
    "labels": dict(input_ids=tokens(), labels=LABELS),
}
FAMILIES = {
    "Llama": (LlamaConfig, {}),
    "GPT-2": (GPT2Config, dict(bos_token_id=1, eos_token_id=2)),
    "Gemma 2": (Gemma2Config, dict(final_logit_softcapping=2.0, bos_token_id=1, eos_token_id=2)),
    "Cohere": (CohereConfig, dict(logit_scale=0.3, bos_token_id=1, eos_token_id=2)),
}


def entered(model, batch, loss=model_loss):
    """The model cut open at its blocks, and what its last one returns."""
    chain = Chain(model, [block for _, block in find_blocks(model)], loss)
    hidden, calls = chain.enter(batch)
    with torch.no_grad():
        for index, call in enumerate(calls):
            hidden = chain.run(index, hidden, call)
    return chain, hidden


@pytest.mark.parametrize("size", [1, 4, 7, 15, 99])
@pytest.mark.parametrize("name", BATCHES)
def test_pieces_have_every_target_once(name, size):
    batch = BATCHES[name]
    found = list(pieces(batch, size))
    real = batch.get("attention_mask", torch.ones(6, 16)).bool()
    is_target = real[:, 1:] & real[:, :-1] & (batch.get("labels", tokens()) != -100)[:, 1:]
    assert sum(piece.targets for piece in found) == int(is_target.sum())
    assert all(piece.batch["input_ids"].shape[1] <= size + 1 for piece in found)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_those_of_the_whole(family, name):
    config, changes = FAMILIES[family]
    chain, hidden = entered(decoder(config, **changes).eval(), BATCHES[name])
    assert can_be_taken_apart(chain._leave, BATCHES[name], hidden)
    loss, gradient = chain._leave(BATCHES[name], hidden)
    for size in (1, 5):
        found, at_pieces = in_pieces(chain._leave, BATCHES[name], hidden, size)
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
        torch.testing.assert_close(at_pieces, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["plain", "padded"])
def test_a_model_is_pruned_as_with_all_logits_at_once(monkeypatch, name):
    sizes = []

    def prune(at_once):
        monkeypatch.setattr(blocks, "logits_at_once", lambda *_: at_once)
        monkeypatch.setattr(partition, "logits_at_once", lambda _: at_once)
        model = decoder()
        model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.shape[:2].numel()))
        ms.prune(model, [BATCHES[name]], "2:4", objective=ms.Fisher() + ms.TokenFisher(), solver=ms.SparseGPT())
        return weights(model)

    whole = prune(2**20)
    most = max(sizes)
    sizes.clear()
    found = prune(24)
    assert max(sizes) <= 2 * 16 <= most  # two samples that show how the model runs; 6 x 5 in a piece
    for parameter, value in whole.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-3, atol=1e-5)


class Smooth(torch.nn.Module):
    """A last norm that looks at more than one token."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


def test_what_is_not_token_by_token_after_the_blocks_is_not_taken_apart():
    model = decoder()
    model.model.norm = Smooth()
    chain, hidden = entered(model.eval(), BATCHES["plain"])
    assert not can_be_taken_apart(chain._leave, BATCHES["plain"], hidden)


def test_what_is_not_taken_apart_is_run_a_few_samples_at_a_time(monkeypatch):
    model, sizes = decoder(), []
    model.model.norm = Smooth()
    chain, hidden = entered(model.eval(), BATCHES["plain"])
    loss, gradient = chain._leave(BATCHES["plain"], hidden)
    monkeypatch.setattr(blocks, "logits_at_once", lambda *_: 24)
    monkeypatch.setattr(blocks, "tokens_at_once", lambda *_: 5 * 16)
    model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    found, at_samples = chain.leave(BATCHES["plain"], hidden)
    assert sizes[-2:] == [5, 1]
    assert found == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close(at_samples, gradient, rtol=1e-4, atol=1e-7)


def test_a_batch_of_more_than_text_and_ones_own_loss_stay_whole(monkeypatch):
    monkeypatch.setattr(blocks, "logits_at_once", lambda *_: 24)
    monkeypatch.setattr(blocks, "in_pieces", lambda *_: pytest.fail("it was taken apart"))
    for batch, loss in (
        (BATCHES["plain"] | {"return_dict": True}, model_loss),
        (BATCHES["plain"], lambda model, batch: model_loss(model, batch)),
    ):
        chain, hidden = entered(decoder().eval(), batch, loss)
        chain.leave(batch, hidden)
