"""How many tokens run at once, on a CPU and by the memory of a GPU, on which the answers do not depend."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig

import moonshot as ms
from moonshot.files import plan as planning
from moonshot.models import batch_sizes
from moonshot.models.batch_sizes import joined, logits_at_once, replayed_at_once
from moonshot.models.blocks import find_blocks
from moonshot.models.calibration import as_batches
from moonshot.models.layers import layers_of
from moonshot.models.losses import model_loss
from tests.models import JOINT, decoder, tokens, weights
from tests.stand_in import GPU, StandIn, there_is_a_gpu

CPU = torch.device("cpu")
WIDTH = 64 + 48 + 48 + 64 + 3 * 80  # what the layers of a block of `decoder` read and return for a token
WORK = dict(objective=JOINT, solver=ms.SparseGPT())


def parts(model):
    return [dict(layers_of(*block)).values() for block in find_blocks(model)]


@pytest.mark.parametrize(
    ("count", "more", "found"),
    [(2048, 0, 2048), (4096, -1, 2048), (4096, 0, 4096), (8191, 0, 4096), (2**14, 0, 2**14), (2**20, 0, 2**14)],
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tokens_by_the_memory_of_a_gpu(monkeypatch, itemsize, count, more, found):
    model = decoder()
    there_is_a_gpu(monkeypatch, 8 * (4 * WIDTH * itemsize * count + more))
    assert replayed_at_once(model, parts(model), 16, itemsize, GPU) == found
    assert replayed_at_once(model, parts(model), 16, itemsize, CPU) == 2048


def test_attention_that_has_all_its_scores_takes_fewer_tokens(monkeypatch):
    model = decoder()
    there_is_a_gpu(monkeypatch, 8 * 4 * (WIDTH + 64 * 100) * 4 * 4096)
    assert replayed_at_once(model, parts(model), 100, 4, GPU) == 2**14
    model.set_attn_implementation("eager")
    assert replayed_at_once(model, parts(model), 100, 4, GPU) == 4096
    assert replayed_at_once(model, parts(model), 101, 4, GPU) == 2048


def test_logits_by_the_memory_of_a_gpu(monkeypatch):
    model = decoder(vocab_size=1000)
    there_is_a_gpu(monkeypatch, 8 * 16 * 2**26)
    assert logits_at_once(model) == logits_at_once(model, CPU) == 2**25 // 1000
    assert logits_at_once(model, GPU) == 2**26 // 1000
    there_is_a_gpu(monkeypatch, 10**15)
    assert logits_at_once(model, GPU) == 2**28 // 1000


batches = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.booleans()), max_size=12)


@given(batches, st.integers(1, 20))
def test_joined_batches_have_the_same_samples_in_the_same_order(shapes, most):
    made = [
        {"input_ids": torch.arange(samples * length).reshape(samples, length) + 100 * k}
        | ({"attention_mask": torch.ones(samples, length)} if masked else {})
        for k, (samples, length, masked) in enumerate(shapes)
    ]
    found = joined(made, most)
    rows = [[row.tolist() for batch in some for row in batch["input_ids"]] for some in (made, found)]
    assert rows[0] == rows[1]
    assert [batch for batch in found if "attention_mask" in batch] == [b for b in made if "attention_mask" in b]
    assert all(batch["input_ids"].numel() <= most for batch in found if all(batch is not one for one in made))
    sizes = {int(batch["input_ids"][0, 0]): batch["input_ids"].numel() for batch in made}  # by its first token
    for one, other in pairwise(found):
        ids = one["input_ids"], other["input_ids"]
        alike = ids[0].shape[1] == ids[1].shape[1] and one.keys() == other.keys() == {"input_ids"}
        assert not alike or ids[0].numel() + sizes[int(ids[1][0, 0])] > most


@pytest.fixture
def calls(monkeypatch):
    """Prune a decoder on a stand-in for a GPU, and say how many samples its second block ran on at once."""
    monkeypatch.setattr(batch_sizes, "_TOKENS", (32, 128))

    def prune(memory, make=decoder, calibration=None, **options):
        there_is_a_gpu(monkeypatch, memory)
        model, seen = make(), []
        _, block = find_blocks(model)[1]
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        with StandIn([]):
            ms.prune(
                model, tokens() if calibration is None else calibration, 0.5, device="cuda", **WORK | options
            )
        return model, max(seen)

    return prune


def test_a_gpu_with_memory_for_more_tokens_runs_fewer_batches_with_the_same_answer(calls):
    small, at_once = calls(0)
    assert at_once == 2
    large, at_once = calls(2**40)
    assert at_once == 6
    for name, value in weights(small).items():
        torch.testing.assert_close(weights(large)[name], value, rtol=1e-4, atol=1e-6)


def own_loss(model, batch):
    return model_loss(model, batch)


def experts():
    return decoder(MixtralConfig, num_local_experts=4)


@pytest.mark.parametrize(
    ("most", "options"),
    [
        (2, dict(refit=ms.Refit(epochs=1))),
        (2, dict(loss=own_loss)),
        (2, dict(adapter=ms.GraphAdapter())),
        (1, dict(make=experts)),
        (
            2,
            dict(calibration=[dict(input_ids=b, attention_mask=torch.ones_like(b)) for b in tokens().split(2)]),
        ),
    ],
    ids=["refit", "one's own loss", "graph", "experts", "more than texts"],
)
def test_what_must_stay_as_it_is_does(calls, most, options):
    assert calls(2**40, **options)[1] == most


def test_a_checkpoint_goes_on_with_other_batches(calls, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(layer, total):
        if layer.name.endswith("1.self_attn.q_proj"):
            raise Interrupted

    with pytest.raises(Interrupted):
        calls(0, checkpoint=tmp_path / "answers", on_layer=interrupt)
    whole, _ = calls(0)
    reports = []
    found, at_once = calls(
        2**40, checkpoint=tmp_path / "answers", on_layer=lambda layer, total: reports.append(layer)
    )
    assert at_once == 6 and len(reports) == 14
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-4, atol=1e-6)


def test_the_plan_has_the_batches_of_the_gpu(monkeypatch):
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e9)
    monkeypatch.setattr(planning, "_solver_seconds", lambda *_: 1.0)
    model, data = decoder(), as_batches(tokens(256, 64))

    def memory(on_device, **more):
        there_is_a_gpu(monkeypatch, on_device)
        return planning.plan(model, data, objective=JOINT, solver=ms.Magnitude(), device=GPU, **more).memory

    on_cpu = planning.plan(model, data, objective=JOINT, solver=ms.Magnitude(), device=CPU).memory
    assert memory(0) - on_cpu == sum(p.nbytes for p in model.model.layers[1].parameters())  # the next block
    running = 2048 * (2 * WIDTH + 64 * 64) * 4 * 2
    assert memory(8 * 4 * WIDTH * 4 * 8192) - memory(0) == 3 * running
    model = decoder(vocab_size=60_000)  # whose logits are the most that is there at once
    assert memory(2**40) - memory(0) == (2**28 // 60_000 - 2**25 // 60_000) * 60_000 * 4 * 4
    model = decoder()
    assert memory(2**40, refit=ms.Refit()) == memory(0, refit=ms.Refit())
