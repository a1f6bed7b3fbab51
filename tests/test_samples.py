"""What counts as a sample, as its tokens and as its targets; what reaches the model of a batch."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import moonshot as ms
from moonshot.app.data import text_windows
from moonshot.models.batch_tree import Shared, leaves, map_tensors, samples_of, take_samples, unshared
from moonshot.models.calibration import CalibrationError, as_batches, longest_text, one_by_one
from moonshot.models.layers import layer_view
from moonshot.models.losses import model_loss
from moonshot.models.modules import ModelError
from moonshot.models.partition import partition_model
from moonshot.models.sample_targets import with_equal_targets
from moonshot.models.statistics import LayerStatistics
from moonshot.pruning.fingerprint import data_digest

JOINT = 0.5 * ms.Reconstruction() + 0.3 * ms.Fisher() + 0.2 * ms.TokenFisher()
OPTIONS = dict(objective=JOINT, solver=ms.SparseGPT())


def llama(**changes):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    config = transformers.LlamaConfig(**(sizes | changes), pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tokens(samples=6, length=12):
    return torch.randint(3, 61, (samples, length), generator=torch.Generator().manual_seed(1))


def relatives(report):
    return {name: layer.terms for name, layer in report.layers.items()}


def assert_same(one, other, rel=1e-4):
    assert list(one.layers) == list(other.layers)
    for name, layer in one.layers.items():
        assert layer.terms == pytest.approx(other.layers[name].terms, rel=rel), name


# targets


def uneven():
    """Two texts, one of them with a quarter of the targets."""
    labels = tokens(2)
    labels[1, 3:] = -100
    return {"input_ids": tokens(2), "labels": labels}


def test_fisher_does_not_depend_on_how_samples_with_other_numbers_of_targets_are_batched():
    together = uneven()
    apart = [{name: tensor[k : k + 1] for name, tensor in together.items()} for k in range(2)]
    one, other = (ms.prune(llama(), batches, 0.5, **OPTIONS) for batches in ([together], apart))
    assert_same(one, other)


def test_the_loss_of_a_sample_is_the_mean_over_its_own_targets():
    model, batch = llama().eval(), uneven()
    name = "model.layers.0.mlp.down_proj"
    layer, gradients, reads = model.get_submodule(name), [], []
    handle = layer.register_forward_hook(lambda _m, args, _out: reads.append(args[0].detach().flatten(0, 1)))
    for k in range(2):
        model.zero_grad()
        model_loss(model, {key: tensor[k : k + 1] for key, tensor in batch.items()}).backward()
        gradients.append(layer.weight.grad.clone())
    handle.remove()
    objective = 0.5 * ms.Reconstruction() + 0.5 * ms.Fisher()
    problem = objective.problem(
        layer.weight.detach(), inputs=torch.cat(reads), gradients=torch.stack(gradients)
    )
    expected = ms.solve(problem, 0.5, ms.SparseGPT())
    report = ms.prune(model, [batch], 0.5, targets=name, objective=objective, solver=ms.SparseGPT())
    assert report.layers[name].terms == pytest.approx(expected.terms, rel=1e-3)


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 8, generator=generator), torch.arange(7) % 3, torch.rand(7, generator=generator)


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


def summed(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="sum")


def weighted(model, batch):
    losses = cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (losses * batch[2]).sum() / batch[2].sum()


def contrastive(model, batch):
    outputs = nn.functional.normalize(model(batch[0]), dim=-1)
    signs = 2 * torch.eye(len(outputs)) - 1
    return -nn.functional.logsigmoid(3 * (outputs @ outputs.T) * signs).sum() / len(outputs)


@pytest.mark.parametrize("loss", [summed, weighted])
def test_a_loss_that_is_no_mean_over_samples_gives_the_same_however_they_are_batched(loss):
    """Each sample's loss is what it is by itself."""
    model, name = classifier(), "0"
    weight, gradients = model.get_parameter("0.weight"), []
    for k in range(7):
        batch = [column[k : k + 1] for column in rows()]
        gradients += torch.autograd.grad(loss(model, batch), weight)
    problem = ms.Fisher().problem(weight.detach().clone(), gradients=torch.stack(gradients))
    expected = ms.solve(problem, 0.5, ms.SparseGPT())
    batches = [tuple(column[:5] for column in rows()), tuple(column[5:] for column in rows())]
    ms.prune(model, batches, {name: 0.5}, objective=ms.Fisher(), solver=ms.SparseGPT(), loss=loss)
    torch.testing.assert_close(weight.detach(), expected.weight, rtol=1e-3, atol=1e-5)


def test_a_loss_that_compares_samples_has_them_together():
    assert not partition_model(classifier(), [rows()], contrastive).weighted
    assert partition_model(classifier(), [rows()], weighted).weighted


def test_samples_without_a_target_are_left_out_and_named():
    batch = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in uneven().items()}
    batch["labels"][2] = -100
    padded = {"input_ids": tokens(2), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    padded["attention_mask"][0, 1:] = 0  # one token predicts none
    report = ms.prune(llama(), [batch, padded], 0.5, **OPTIONS)
    expected = ms.prune(llama(), [uneven(), {"input_ids": tokens(2)[1:]}], 0.5, **OPTIONS)
    assert_same(report, expected)
    assert report.unused == dict.fromkeys(["batch 0, sample 2", "batch 1, sample 0"], "it has no target")
    assert "2 samples left out: batch 0, sample 2: it has no target; batch 1" in str(report)
    with pytest.raises(CalibrationError, match="no calibration sample has a target"):
        ms.prune(llama(), tokens(4, 1), 0.5)
    with pytest.raises(CalibrationError, match="has 6 samples and labels for 5"):
        ms.prune(llama(), [{"input_ids": tokens(), "labels": tokens(5)}], 0.5)


@pytest.mark.parametrize(
    "model, batch, expected",
    [
        (t5, {"input_ids": tokens(3), "labels": torch.tensor([[5, -100], [5, 6], [-100, -100]])}, [[0], [1]]),
        (llama, {"input_ids": tokens(3), "labels": torch.tensor([[[1]], [[1]], [[-100]]])}, [[0, 1]]),
        (nn.Identity, {"pixel_values": torch.randn(3, 2), "labels": torch.tensor([1, 0, -100])}, [[0, 1]]),
        (nn.Identity, {"pixel_values": torch.randn(3, 2), "labels": torch.rand(3, 2)}, [[0, 1, 2]]),
        (
            nn.Identity,
            {"x": torch.randn(3, 2), "labels": [{"boxes": torch.randn(k, 4)} for k in (0, 0, 2)]},
            [[0, 1], [2]],
        ),
    ],
)
def test_targets_of_a_sample(model, batch, expected):
    first = next(iter(batch))
    found, _ = with_equal_targets(model(), [batch], model_loss)
    assert [len(part[first]) for part in found] == [len(run) for run in expected]
    for part, run in zip(found, expected, strict=True):
        assert torch.equal(part[first], batch[first][run])


def test_labels_of_a_loss_of_ones_own_may_mean_anything():
    batch = {"x": torch.randn(2, 3), "labels": torch.full((2,), -100)}
    found, left_out = with_equal_targets(nn.Identity(), [batch], lambda model, batch: model(batch["x"]).sum())
    assert len(found) == 1 and len(found[0]["x"]) == 2 and not left_out


def test_a_loss_that_is_not_finite_names_the_sample():
    x = torch.randn(6, 8)
    x[4] = torch.inf
    batches = [(x[:3], torch.arange(3)), (x[3:], torch.arange(3))]
    with pytest.raises(ModelError) as error:
        ms.prune(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)),
            batches,
            0.5,
            loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        )
    assert "finite scalar, got nan" in str(error.value)
    assert error.value.__notes__ == ["at sample 1 of batch 1 of the calibration samples that are used"]
    model, ids = llama(), torch.full((4, 4), 5)
    model.lm_head.weight.data[7] = torch.nan

    def loss(model, batch):
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits[:, batch["input_ids"].unique()], logits[:, 0].long() * 0)

    ids[3, 1] = 7  # in batches of two, the last sample alone reads it
    with pytest.raises(ModelError) as error:
        ms.prune(model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], 0.5, loss=loss, **OPTIONS)
    assert error.value.__notes__ == ["at sample 1 of batch 1 of the calibration samples that are used"]


# padding


def padded():
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[:, 6:] = 0
    return tokens(), mask


def test_the_encoders_mask_is_not_that_of_the_decoder():
    """As many inputs as labels: half of the inputs are padding, none of the labels."""
    ids, mask = padded()
    both = [{"input_ids": ids, "attention_mask": mask, "labels": tokens()}]
    short = [{"input_ids": ids[:, :6], "labels": tokens()}]
    one, other = (ms.prune(t5(), batches, 0.5, **OPTIONS) for batches in (both, short))
    assert_same(one, other, rel=1e-3)
    decoder = partition_model(t5(), both, model_loss).decoder
    assert "decoder.block.0.layer.0.SelfAttention.q" in decoder
    assert "decoder.block.0.layer.1.EncDecAttention.q" in decoder
    assert not {name for name in decoder if name.startswith("encoder") or name.endswith("EncDecAttention.k")}


@pytest.mark.parametrize("mask", ["labels", "decoder_attention_mask"])
def test_the_decoder_has_padding_of_its_own(mask):
    """Targets that are padded to the length of the inputs, or not."""
    ids, labels = tokens(), tokens(6, 7)
    filled = torch.cat([labels, torch.full((6, 5), -100)], 1)
    batch = {"input_ids": ids, "labels": filled}
    if mask == "decoder_attention_mask":
        batch["decoder_attention_mask"] = (filled != -100).long()
    one = ms.prune(t5(), [batch], 0.5, **OPTIONS)
    other = ms.prune(t5(), [{"input_ids": ids, "labels": labels}], 0.5, **OPTIONS)
    assert_same(one, other, rel=1e-3)


def test_the_decoder_of_sounds_has_padding_of_its_own():
    sizes = dict(vocab_size=61, d_model=32, num_mel_bins=8, max_source_positions=10, max_target_positions=32)
    stacks = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = dict(encoder_ffn_dim=48, decoder_ffn_dim=48)
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    config = transformers.WhisperConfig(**sizes, **stacks, **widths, **special)

    def pruned(labels):
        torch.manual_seed(0)
        model = transformers.WhisperForConditionalGeneration(config).eval()
        sounds = torch.randn(6, 8, 20, generator=torch.Generator().manual_seed(1))
        return ms.prune(model, [{"input_features": sounds, "labels": labels}], 0.5, **OPTIONS)

    labels = tokens(6, 7)
    assert_same(pruned(torch.cat([labels, torch.full((6, 5), -100)], 1)), pruned(labels), rel=1e-2)


def test_padding_of_embedded_texts_counts_for_nothing():
    ids, mask = padded()
    embedded = llama().get_input_embeddings()(ids).detach()
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"inputs_embeds": embedded, "attention_mask": mask, "labels": labels}
    one = ms.prune(llama(), [batch], 0.5, **OPTIONS)
    assert_same(one, ms.prune(llama(), [{"input_ids": ids[:, :6]}], 0.5, **OPTIONS))


def test_a_mask_is_of_tokens_and_not_of_channels():
    mask = torch.tensor([[True, True, False, False]] * 3)
    found = []
    for layer, shape in {
        nn.Linear(4, 2): (3, 4),  # a pooler: as many channels as there are tokens
        nn.Conv1d(4, 2, 3, padding=1): (3, 4, 4),
        nn.Conv1d(4, 2, 2): (3, 4, 4),  # its outputs are of three positions
        nn.Conv2d(4, 2, 1): (3, 4, 2, 2),
        nn.Linear(5, 2): (3, 4, 5),
    }.items():
        statistics = LayerStatistics({"layer": layer_view(layer)}, ms.Reconstruction(), 4, torch.ones(3))
        statistics.observe(3, {"layer": [torch.randn(shape)]}, {}, {}, mask)
        found.append(statistics.tokens["layer"])
    assert found == [3, 6, 9, 12, 6]


def test_padding_of_sounds_counts():
    """attention_mask is about samples of a sound there, of which the front end makes fewer frames."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=20
    )
    convolutions = dict(conv_dim=[8], conv_kernel=[10], conv_stride=[5], num_feat_extract_layers=1)
    embeddings = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    config = transformers.Wav2Vec2Config(**sizes, **convolutions, **embeddings, feat_extract_norm="layer")
    batch = {"input_values": torch.randn(3, 100), "labels": torch.randint(1, 20, (3, 2))}
    batch["attention_mask"] = torch.ones(3, 100, dtype=torch.long)
    batch["attention_mask"][:, 60:] = 0
    model = transformers.Wav2Vec2ForCTC(config).eval()
    counted, original = [], LayerStatistics.of

    def of(self, name, again=False):
        counted.append(self.tokens[name])
        return original(self, name, again)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerStatistics, "of", of)
        ms.prune(model, [batch], 0.5, targets="*layers*", **OPTIONS)
    assert set(counted) == {3 * 19}


# batches

Pair = collections.namedtuple("Pair", "x y")
Encoding = transformers.BatchEncoding


def test_everything_in_a_batch_reaches_the_model_as_it_came():
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x, labels, **others):
            seen.append(others)
            return Pair(None, cross_entropy(self.last(torch.relu(self.inner(x))), labels))

    class Loss:
        def __call__(self, model, batch):
            assert type(batch) is Encoding
            return model(**batch).y

    weights = np.ones(3)
    batch = Encoding(
        {
            "x": torch.randn(4, 6),
            "labels": torch.arange(4) % 3,
            "return_loss": True,
            "scale": 0.5,
            "names": ["a", "b", "c", "d"],
            "targets": [{"boxes": torch.randn(k + 1, 4)} for k in range(4)],
            "weights": weights,
            "of all": Shared(torch.arange(4)),
            "nested": collections.UserDict({"rows": torch.arange(4)}),
        }
    )
    ms.prune(Model(), [batch], 0.5, loss=Loss(), **OPTIONS)
    for others in seen:
        count = len(others["names"])
        assert others["return_loss"] is True and others["scale"] == 0.5 and others["weights"] is weights
        assert len(others["targets"]) == count == len(others["nested"]["rows"]) and len(others["of all"]) == 4
        assert isinstance(others["nested"], collections.UserDict)
    assert {len(others["names"]) for others in seen} == {1, 4}


@pytest.mark.parametrize(
    "batch, count",
    [
        ({"other": torch.zeros(5), "input_ids": torch.zeros(2, 3)}, 2),
        ({"x": torch.zeros(2, 3), "labels": [{"boxes": torch.zeros(7, 4)}] * 2}, 2),
        (([torch.zeros(3, 5, 5), torch.zeros(3, 4, 4)], [{"boxes": torch.zeros(1, 4)}] * 2), 2),
        ([{"image": torch.zeros(3, 4, 4)}] * 2, 2),
        ((torch.zeros(4, 2), (torch.zeros(4), torch.zeros(4))), 4),
        (Pair(np.zeros((2, 5)), torch.zeros(2)), 2),
        ({"shared": Shared(torch.zeros(9)), "x": torch.zeros(2)}, 2),
        ({"pixels": [torch.zeros(3, 5, 5), torch.zeros(3, 4, 4)], "labels": torch.zeros(2)}, 2),
        (([torch.zeros(3, 5, 5), torch.zeros(3, 4, 4)], torch.zeros(2)), 2),
        ({"flag": True}, None),
    ],
)
def test_samples_of_a_batch(batch, count):
    assert samples_of(batch) == count
    if count:
        one = take_samples(batch, [1])
        assert samples_of(one) == 1 and type(one) is type(batch)
        assert take_samples(batch, list(range(count))) is batch


def test_a_sample_of_a_batch():
    x, y = torch.arange(6.0).reshape(2, 3), [torch.zeros(3), torch.ones(4)]
    batch = {
        "input_ids": x,
        "lengths": [3, 2],
        "pair": (x, x),
        "weights": Shared(torch.ones(2)),
        "sizes": (1, 2, 3),
    }
    one = take_samples(batch, [1])
    assert torch.equal(one["input_ids"], x[1:]) and one["lengths"] == [2] and one["sizes"] == (1, 2, 3)
    assert all(torch.equal(part, x[1:]) for part in one["pair"]) and len(unshared(one)["weights"]) == 2
    images, targets = take_samples((y, [{"k": 0}, {"k": 1}]), [1])
    assert torch.equal(images[0], y[1]) and len(images) == 1 and targets == [{"k": 1}]
    masks, columns = [torch.zeros(2, 4), torch.ones(2, 4)], (torch.zeros(2), torch.zeros(2))
    one = take_samples({"pixels": x, "masks": masks, "columns": columns, "classes": (y[0], y[1])}, [1])
    assert len(one["masks"]) == 1 and torch.equal(one["masks"][0], masks[1])
    assert [len(column) for column in one["columns"]] == [1, 1] and torch.equal(one["classes"][0], y[1])
    assert [len(part) for part in take_samples((x, [x, x]), [1])[1]] == [1, 1]  # as a DataLoader has it
    doubled = map_tensors(lambda tensor: 2 * tensor, batch)
    assert torch.equal(doubled["weights"].value, torch.full((2,), 2.0)) and doubled["lengths"] == [3, 2]
    assert len(list(leaves(batch))) == 9


def test_positions_in_several_axes_have_the_samples_second():
    for count in (2, 3):
        ids, positions = tokens(count), torch.arange(36 * count).reshape(3, count, 12)
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        batch = Encoding({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        one = take_samples(batch, [1])
        assert type(one) is Encoding and torch.equal(one["position_ids"], positions[:, 1:2])
        first, *_ = one_by_one([batch], aligned=True)
        assert torch.equal(first["position_ids"], positions[:, :1, :7]) and first["input_ids"].shape == (1, 7)
        choices = {"input_ids": positions.movedim(1, 0), "position_ids": positions.movedim(1, 0)}
        assert torch.equal(take_samples(choices, [1])["position_ids"], positions.movedim(1, 0)[1:2])


def test_the_digest_of_data_sees_into_every_container():
    long = torch.arange(5000.0)
    other = long.clone()
    other[2500] = 0  # repr() leaves it out
    for wrap in (lambda x: {"x": x}, collections.UserDict, lambda x: Shared(x), lambda x: (x.numpy(),)):
        contents = [{"x": long}, {"x": other}] if wrap is collections.UserDict else [long, other]
        assert data_digest([wrap(contents[0])]) != data_digest([wrap(contents[1])])


def test_a_model_that_changes_its_inputs_reads_the_same_each_time():
    def loss(model, batch):
        x, y = batch
        x += 1
        return cross_entropy(model(x), y)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))

    x, y = torch.randn(12, 6), torch.arange(12) % 3
    before = x.clone()
    one = ms.prune(network(), [(x, y)], 0.5, loss=loss, **OPTIONS)
    assert torch.equal(x, before)
    other = ms.prune(network(), [(x + 1, y)], 0.5, loss=lambda m, b: cross_entropy(m(b[0]), b[1]), **OPTIONS)
    assert_same(one, other)


class InPlace(nn.Module):
    """Adds in place to what its layers have read."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.in_place = nn.Linear(6, 6), nn.Linear(6, 6), in_place

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.in_place:
            x += h
        else:
            x = x + h
        return self.second(x)


@pytest.mark.parametrize("blocks", [1, 3])
def test_what_a_layer_read_is_not_what_became_of_it(blocks):
    """In one part, and in blocks of a chain, which change in place the hidden states that they read."""
    batch = (torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)

    class Model(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.blocks = nn.ModuleList(InPlace(in_place) for _ in range(blocks))

        def forward(self, x):
            x = x.clone()
            for block in self.blocks:
                x = block(x)
            return x

    options = OPTIONS | {"loss": lambda model, batch: cross_entropy(model(batch[0]), batch[1])}
    for objective in (ms.Reconstruction(), JOINT):
        found = []
        for in_place in (True, False):
            model = Model(in_place).requires_grad_(False)  # what is trained could not do it
            found.append(ms.prune(model, [batch], 0.5, **(options | {"objective": objective})))
        assert_same(*found)


class TokensFirst(nn.Module):
    """Has the samples in the second dimension."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.relu(self.first(x.transpose(0, 1)))
        return self.last(torch.relu(self.second(hidden))).mean(0)


class TwoViews(nn.Module):
    """Reads the second views of all samples after the first ones, in a part of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        one, other = self.inner(torch.cat([x[:, 0], x[:, 1] ** 2])).chunk(2)
        return self.last(one - 2 * other)


class OneAfterTheOther(TwoViews):
    """Calls its layers for each sample."""

    def forward(self, x):
        return torch.cat([self.last(self.inner(sample[None, 0])) for sample in x])


@pytest.mark.parametrize("make", [TokensFirst, TwoViews, OneAfterTheOther])
@pytest.mark.parametrize("sizes", [[7], [1] * 7, [1, 6], [1, 3, 3]])
def test_samples_are_told_apart_however_they_are_batched(make, sizes):
    """Six samples in a batch of 12 tokens: the first dimension could be divided by the number of samples."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 12, 6, generator=generator), torch.arange(7) % 3
    reports = [
        ms.prune(
            make(),
            list(zip(x.split(split), y.split(split), strict=True)),
            0.5,
            loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
            **OPTIONS,
        )
        for split in (sizes, [6, 1])
    ]
    assert_same(*reports)


def test_what_is_padding_may_be_nan():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.first, self.last = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            real = attention_mask[..., None] > 0
            hidden = self.last(torch.relu(self.first(self.embedding(input_ids).masked_fill(~real, torch.nan))))
            return torch.where(real, hidden, 0).sum(1)

    def loss(model, batch):
        return cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    ids, mask = padded()
    whole = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(6) % 3}
    short = whole | {"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}
    assert_same(*(ms.prune(Masked(), [batch], 0.5, loss=loss, **OPTIONS) for batch in (whole, short)))


class PadsItsTargets(nn.Module):
    """Writes targets of different lengths into views of one tensor, which gradients could not pass through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, targets):
        padded = torch.zeros(len(targets), 4)
        for target, row in zip(targets, padded, strict=True):
            row[: len(target)].copy_(target)
        return nn.functional.mse_loss(self.last(torch.relu(self.first(x))), padded)


def test_no_gradients_pass_through_targets():
    x, targets = torch.randn(6, 6), [torch.ones(1 + k % 4) for k in range(6)]
    filled = torch.stack([nn.functional.pad(target, (0, 4 - len(target))) for target in targets])
    reports = [
        ms.prune(PadsItsTargets(), [(x, given)], 0.5, loss=lambda model, batch: model(*batch), **OPTIONS)
        for given in (targets, filled)
    ]
    assert_same(*reports)


def test_texts_in_three_dimensions():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.BertForMultipleChoice(config)
    ids = torch.stack([tokens(4, 9), tokens(4, 9).flip(0)], 1)
    mask = torch.ones_like(ids)
    mask[:, :, 6:] = 0
    labels = torch.tensor([0, 1, 1, 0])
    report = ms.prune(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}], 0.5, **OPTIONS)
    torch.manual_seed(0)
    short = [{"input_ids": ids[:, :, :6], "labels": labels}]
    assert_same(report, ms.prune(transformers.BertForMultipleChoice(config), short, 0.5, **OPTIONS), rel=1e-3)


@pytest.mark.parametrize(
    "batch, words",
    [
        (
            {"pixel_values": torch.zeros(40, 6), "image_grid_thw": torch.ones(2, 3)},
            "pixel_values .* 40 rows for 2",
        ),
        ({"image_grid_thw": torch.ones(3, 3)}, "image_grid_thw .* 3 rows for 2 samples, .* one sample each"),
    ],
)
def test_images_that_cannot_be_told_apart_by_text(batch, words):
    with pytest.raises(CalibrationError, match=words):
        as_batches([{"input_ids": tokens(2), **batch}])
    assert as_batches([{"input_ids": tokens(1), **batch}])


def test_texts_longer_than_the_model_can_read():
    model = llama(max_position_embeddings=10)
    assert longest_text(model) == 10 and longest_text(t5()) is None
    with pytest.raises(
        CalibrationError, match="batch 0 has texts of 12 tokens, the model has 10 positions: give"
    ):
        ms.prune(model, tokens(), 0.5)
    with pytest.raises(CalibrationError, match='input_ids are a list: give a tensor .return_tensors="pt"'):
        ms.prune(model, [{"input_ids": [[1, 2, 3]], "x": torch.zeros(1)}], 0.5)


def test_windows_are_as_long_as_the_model_can_read():
    for positions, length in {64: 64, 4096: 2048}.items():
        config = transformers.LlamaConfig(max_position_embeddings=positions, vocab_size=5)
        source = SimpleNamespace(config=config, processor=lambda text, verbose: {"input_ids": [1] * 5000})
        assert text_windows(source, "", 2, None, None).shape == (2, length)
