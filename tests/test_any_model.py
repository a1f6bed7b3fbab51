"""`prune` on models of every family: how they are cut open, what their layers see, what comes out."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import moonshot as ms
from moonshot.layer.patterns import PatternError
from moonshot.models.batchnorm import reestimate
from moonshot.models.calibration import CalibrationError, as_batches
from moonshot.models.chain import ChainAdapter, ChainReplay
from moonshot.models.graph import GraphAdapter, GraphReplay
from moonshot.models.layers import layer_view, layers_of
from moonshot.models.losses import model_loss
from moonshot.models.modules import ModelError
from moonshot.models.offload import Offload
from moonshot.models.partition import Partition, partition_model
from moonshot.models.statistics import LayerStatistics
from moonshot.models.targets import TargetError
from moonshot.pruning import auto
from moonshot.pruning import run as pruning_run

JOINT = 0.5 * ms.Reconstruction() + 0.3 * ms.Fisher() + 0.2 * ms.TokenFisher()
TEXT = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tokens(samples=6, length=12):
    return torch.randint(3, 61, (samples, length), generator=torch.Generator().manual_seed(1))


def images(samples=6):
    pixels = torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": pixels, "labels": torch.arange(samples) % 3}]


def labelled(**inputs):
    return [{**inputs, "labels": torch.arange(6) % 3}]


def seq2seq(**inputs):
    return [{**inputs, "labels": tokens(6, 7)}]


def language(config, **changes):
    return lambda: transformers.AutoModelForCausalLM.from_config(config(**(TEXT | changes)))


def vision(name, **config):
    model, config_class = (getattr(transformers, name + end) for end in ("ForImageClassification", "Config"))
    return lambda: model(config_class(num_labels=3, **config))


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=61,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def t5():
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
    return transformers.T5ForConditionalGeneration(config)


GPT2 = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
VIT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=4,
)
SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
MOBILE = dict(image_size=32, depth_multiplier=0.25, min_depth=8)
# model, calibration, chained, layers pruned by default, names left alone
MODELS = {
    "Llama": (language(transformers.LlamaConfig, num_key_value_heads=2), tokens, True, 14, "lm_head"),
    "Qwen2": (language(transformers.Qwen2Config, num_key_value_heads=2), tokens, True, 14, "lm_head"),
    "Qwen3": (
        language(transformers.Qwen3Config, num_key_value_heads=2, head_dim=8),
        tokens,
        True,
        14,
        "lm_head",
    ),
    "Gemma": (
        language(transformers.GemmaConfig, num_key_value_heads=1, head_dim=8),
        tokens,
        True,
        14,
        "lm_head",
    ),
    "Phi": (language(transformers.PhiConfig), tokens, True, 12, "lm_head"),
    "GPT-2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        tokens,
        True,
        8,
        "lm_head",
    ),
    "OPT": (language(transformers.OPTConfig, ffn_dim=48, word_embed_proj_dim=32), tokens, True, 12, "lm_head"),
    "Phi-3": (language(transformers.Phi3Config, num_key_value_heads=2), tokens, True, 8, "lm_head"),
    "GPT-NeoX": (language(transformers.GPTNeoXConfig), tokens, True, 8, "embed_out"),
    "Mixtral": (
        language(transformers.MixtralConfig, num_key_value_heads=2, num_local_experts=4),
        tokens,
        True,
        24,
        "lm_head",
    ),
    "Qwen3-MoE": (
        language(
            transformers.Qwen3MoeConfig,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
        ),
        tokens,
        True,
        24,
        "lm_head",
    ),
    "BERT": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3)),
        lambda: labelled(input_ids=tokens()),
        True,
        12,
        "classifier",
    ),
    "T5": (t5, lambda: seq2seq(input_ids=tokens()), False, 16, "lm_head"),
    "Whisper": (whisper, lambda: seq2seq(input_features=torch.randn(6, 8, 40)), False, 18, "proj_out"),
    "ViT": (vision("ViT", **VIT), images, True, 12, "classifier"),
    "Swin": (vision("Swin", **SWIN), images, False, 14, "classifier"),
    "ConvNeXt": (
        vision("ConvNext", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=32),
        images,
        False,
        16,
        "classifier",
    ),
    "ResNet": (
        vision("ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck"),
        images,
        False,
        12,
        "classifier.1",
    ),
    "MobileNetV1": (vision("MobileNetV1", **MOBILE), images, False, 27, "classifier"),
    "MobileNetV2": (vision("MobileNetV2", **MOBILE), images, False, 52, "classifier"),
    "RegNet": (
        vision("RegNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8),
        images,
        False,
        13,
        "classifier.1",
    ),
}


def built(name):
    torch.manual_seed(0)
    make, calibration, *rest = MODELS[name]
    return make(), calibration(), *rest


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_cut_and_pruned_to_its_budget(name):
    model, calibration, chained, count, head = built(name)
    before = copy.deepcopy(model.state_dict())
    cut = partition_model(model, as_batches(calibration), model_loss)
    assert isinstance(cut.adapter, ChainAdapter) is chained
    report = ms.prune(model, calibration, 0.5, objective=JOINT, solver=ms.SparseGPT())
    assert len(report.layers) == count and report.sparsity == pytest.approx(0.5, abs=2e-3)
    assert head not in report.layers
    views = dict(layers_of("", model))
    for layer in report.layers:
        weight = views[layer].weight
        assert abs(int((weight == 0).sum()) - weight.numel() / 2) <= 0.5, layer
    pruned = {
        layer.rpartition(".")[0] if ".experts." in layer else f"{layer}.weight" for layer in report.layers
    }
    for key, value in model.state_dict().items():
        if "running_" in key:  # estimated again
            continue
        assert key in pruned or torch.equal(value, before[key]), key
    assert all(0 <= layer.relative < 1 for layer in report.layers.values())


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "Qwen3-MoE", "BERT", "T5", "Whisper", "ViT", "Swin"])
def test_outputs_move_less_than_by_magnitude(name):
    model, calibration, *_ = built(name)
    model.eval()
    (batch,) = as_batches(calibration)

    def outputs(solver):
        pruned = copy.deepcopy(model)
        ms.prune(pruned, calibration, 0.5, objective=ms.Reconstruction(), solver=solver)
        with torch.no_grad():
            return pruned(**batch, **({} if "labels" in batch else {"labels": batch["input_ids"]})).logits

    with torch.no_grad():
        dense = model(**batch).logits
    moved = [float((outputs(solver) - dense).norm()) for solver in (ms.ADMM(), ms.Magnitude())]
    assert moved[0] < moved[1]


def test_a_chain_and_a_graph_see_the_same():
    torch.manual_seed(0)
    model = language(transformers.LlamaConfig, num_key_value_heads=2)().eval()
    batches, signs = as_batches(tokens()), torch.tensor([1.0, -1, 1, 1, -1, -1])
    cut = partition_model(model, batches, model_loss)
    assert isinstance(cut.adapter, ChainAdapter)
    found = []
    for kind in (ChainReplay, GraphReplay):
        replay, seen = kind(model, cut.parts, batches, model_loss, True, Offload()), {}
        for index in range(2):
            layers = {name: view for name, view in cut.layers().items() if f"layers.{index}." in name}
            statistics = LayerStatistics(layers, JOINT, 16, signs)
            replay.observe(index, statistics)
            seen |= {name: statistics.of(name) for name in layers}
            replay.advance(index)
        found.append(seen)
    for name, ((shared, factors, weighted),) in found[0].items():
        ((other_shared, other_factors, other_weighted),) = found[1][name]
        torch.testing.assert_close(shared, other_shared, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factors, other_factors, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(weighted, other_weighted, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_whose_weight_a_model_reads_without_calling_it_is_named(dtype):
    torch.manual_seed(0)
    model = language(transformers.MambaConfig, state_size=4)().to(dtype)
    report = ms.prune(model, tokens(), 0.5, objective=JOINT, solver=ms.SparseGPT())
    assert {name.split(".")[-1] for name in report.skipped} == {"conv1d", "dt_proj", "mixer"}
    assert "MambaMixer holds A_log" in report.skipped["backbone.layers.0.mixer"]
    assert "reads its weight without calling it" in report.skipped["backbone.layers.0.mixer.dt_proj"]
    assert len(report.layers) == 6 and report.sparsity == pytest.approx(0.5, abs=2e-3)
    model.backbone.layers[0].spare = nn.Linear(8, 8, dtype=dtype)  # nothing reads it
    with pytest.raises(ModelError, match="no calibration sample reached backbone.layers.0.spare: leave"):
        ms.prune(model, tokens(), 0.5)


def test_attention_of_torch_is_named_whose_projection_is_never_called():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    batches = [torch.randn(6, 5, 16)]
    before = copy.deepcopy(encoder.state_dict())
    report = ms.prune(encoder, batches, 0.5, loss=lambda model, x: model(x).square().mean())
    assert set(report.layers) == {f"layers.{k}.linear{j}" for k in (0, 1) for j in (1, 2)}
    assert set(report.skipped) == {f"layers.{k}.self_attn{end}" for k in (0, 1) for end in ("", ".out_proj")}
    for name, value in encoder.state_dict().items():
        assert name.removesuffix(".weight") in report.layers or value.equal(before[name]), name


def test_what_is_left_alone_is_named_and_can_be_asked_for():
    model, calibration, *_ = built("BERT")
    report = ms.prune(model, calibration, 0.5, objective=ms.Reconstruction(), solver=ms.Magnitude())
    assert report.left_alone == {
        "bert.pooler.dense": "outside the blocks",
        "classifier": "on top of the base model",
    }
    assert "left alone, outside the blocks: bert.pooler.dense" in str(report).splitlines()
    with pytest.raises(TargetError, match="'pooler.dense' matches no layer") as caught:
        ms.prune(model, calibration, 0.5, targets="pooler.dense")
    assert "adapter=GraphAdapter()" in caught.value.__notes__[0]
    targets = ["pooler.dense", "classifier"]
    report = ms.prune(model, calibration, 0.5, targets=targets, adapter=GraphAdapter(), solver=ms.SparseGPT())
    assert set(report.layers) == {"bert.pooler.dense", "classifier"} and not report.left_alone


class Twice(nn.Module):
    """A layer used twice, one that never runs, an in-place activation, and arguments that differ by call."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.unused = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = nn.functional.relu_(self.first(x))
        h = nn.functional.relu_(self.shared(h))
        return self.last(self.shared(h))


def pairs(samples=20):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(samples, 6, generator=generator), torch.arange(samples) % 3)]


def pair_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


class Elsewhere(nn.Module):
    """A layer inside a module of five that is used outside of that module too."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *(nn.Linear(8, 8) for _ in range(4)))
        self.last = nn.Linear(8, 3)

    @property
    def shared(self):
        return self.body[0]

    def forward(self, x):
        return self.last(self.body(x) + self.shared(x**2))


@pytest.mark.parametrize("make, name", [(Twice, "shared"), (Elsewhere, "body.0")])
def test_both_uses_of_a_layer_count(make, name):
    torch.manual_seed(0)
    model = make().eval()
    ((x, y),) = pairs()
    reads, gradients = [], []
    handle = model.shared.register_forward_hook(lambda _m, args, _out: reads.append(args[0].detach()))
    model(x)
    handle.remove()
    for k in range(len(x)):
        model.zero_grad()
        pair_loss(model, (x[k : k + 1], y[k : k + 1])).backward()
        gradients.append(model.shared.weight.grad.clone())
    objective = 0.5 * ms.Reconstruction() + 0.5 * ms.Fisher()
    problem = objective.problem(
        model.shared.weight.detach(), inputs=torch.cat(reads), gradients=torch.stack(gradients)
    )
    expected = ms.solve(problem, 0.5, ms.SparseGPT())
    report = ms.prune(
        model, pairs(), {name: 0.5}, objective=objective, solver=ms.SparseGPT(), factors=20, loss=pair_loss
    )
    assert report.layers[name].relative == pytest.approx(expected.relative, rel=1e-4)
    torch.testing.assert_close(model.shared.weight.detach(), expected.weight, rtol=1e-3, atol=1e-5)


def test_a_term_that_an_empty_layer_does_not_raise_is_named():
    """A norm of each channel undoes the scale of a row, so that the gradient has no part along the row."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    batch = (torch.randn(20, 3, 5, 5), torch.arange(20) % 3)
    report = ms.prune(model, [batch], 0.5, loss=pair_loss, solver=ms.SparseGPT())
    assert report.layers["0"].note.startswith("Fisher is almost zero for an empty layer, as before a norm")
    assert not report.layers["4"].note


def test_a_part_that_does_not_hold_all_calls_of_its_layers_is_refused():
    class Body(GraphAdapter):
        def parts(self, model, run):
            return [("body", model.body), ("last", model.last)]

    with pytest.raises(ModelError, match="body.0 also runs outside of 'body'"):
        ms.prune(Elsewhere(), pairs(), 0.5, loss=pair_loss, adapter=Body())


def test_a_layer_that_never_runs_is_named():
    model = Twice()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"no calibration sample reached unused: .* with ignore, "):
        ms.prune(model, pairs(), 0.5, loss=pair_loss)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = ms.prune(model, pairs(), 0.5, loss=pair_loss, ignore="unused")
    assert list(report.layers) == ["first", "shared", "last"]


def test_a_plain_network_is_cut_into_segments_that_read_the_pruned_ones_before():
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(6, 6), nn.ReLU(inplace=True))))

    def loss(model, batch):
        return model(batch).square().mean()

    calibration = pairs()[0][0]
    cut = partition_model(model, as_batches(calibration), loss)
    assert [name for name, _ in cut.parts] == ["0", "2", "4", "6", "8", "10"] and isinstance(
        cut.adapter, GraphAdapter
    )
    report = ms.prune(model, calibration, 0.5, objective=ms.Reconstruction(), solver=ms.SparseGPT(), loss=loss)
    with torch.no_grad():
        x = model[:10](calibration)
    problem = ms.Reconstruction().problem(model[10].weight.detach(), inputs=x)
    assert report.recipe["samples"] == 20 and "Reconstruction" in report.layers["10"].terms
    assert float(x.abs().max()) > 0 and problem.value(model[10].weight.detach()) >= 0


class InPlace(nn.Module):
    """Adds in place to what its parts return and, inside one, to what it reads."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(Plus(), nn.Linear(6, 6)) for _ in range(6))

    def forward(self, x):
        for part in self.parts:
            h = part(x.clone())
            h += x
            x = h
        return x


class Plus(nn.Module):
    def forward(self, x):
        return x.add_(1)


def test_a_network_that_changes_in_place_what_its_parts_read_and_return():
    torch.manual_seed(0)
    model, (calibration, _) = InPlace(), pairs(40)[0]
    last, seen = model.parts[5][1], []
    weight = last.weight.detach().clone()
    report = ms.prune(
        model,
        calibration,
        0.5,
        objective=ms.Reconstruction(),
        solver=ms.SparseGPT(),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    last.register_forward_pre_hook(lambda _layer, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(calibration)
    expected = ms.solve(ms.Reconstruction().problem(weight, inputs=seen[0]), 0.5, ms.SparseGPT())
    assert report.layers["parts.5.1"].relative == pytest.approx(expected.relative, rel=1e-4)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4, padding=1)
        self.pointwise = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.pointwise(torch.relu(self.depthwise(x))).mean((2, 3))


def test_a_grouped_convolution_is_one_problem_with_one_budget():
    torch.manual_seed(0)
    model = Grouped().eval()
    x = torch.randn(5, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([0.1, 1, 3, 10])[:, None, None]  # groups that matter little and much
    view = layer_view(model.depthwise)
    grams = [
        sum(chunk.inputs.flatten(0, 1).T @ chunk.inputs.flatten(0, 1) for chunk in view.chunks(x, None, g))
        for g in range(4)
    ]
    dense = view.matrices()

    def value(matrices):
        moved = (matrices - dense).double()
        return sum(float(torch.einsum("ij,jk,ik->", moved[g], grams[g].double(), moved[g])) for g in range(4))

    report = ms.prune(
        model,
        [(x, torch.zeros(5, dtype=torch.long))],
        {"depthwise": 0.5},
        objective=ms.Reconstruction(),
        solver=ms.ADMM(),
        dampening_frac=1e-6,
        loss=pair_loss,
    )
    layer = report.layers["depthwise"]
    assert layer.shape == (8, 9) and layer.sparsity == 0.5
    assert layer.terms["Reconstruction"] == pytest.approx(value(view.matrices()) / value(0 * dense), rel=1e-3)
    kept = (view.matrices() != 0).sum(dim=(1, 2))
    assert int(kept.sum()) == 36 and kept[0] < kept[3]


def test_two_to_four_runs_along_the_channels_of_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    batch = (torch.randn(6, 8, 9, 9), torch.arange(6) % 3)
    ms.prune(model, [batch], "2:4", loss=pair_loss)
    for conv in (model[0], model[2]):
        along = conv.weight.detach().movedim(1, -1).reshape(-1, 4)
        assert ((along != 0).sum(1) == 2).all()
    odd = nn.Sequential(nn.Conv2d(3, 4, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    images = (torch.randn(6, 3, 9, 9), torch.arange(6) % 3)
    odd(images[0])
    with pytest.raises(PatternError, match="input channels divisible by 4, the layer has 3: leave it out"):
        ms.prune(odd, [images], "2:4", loss=pair_loss)


def misfits():
    """A convolution of three channels, one that 2:4 fits, a depthwise one, and a classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()
    )
    return nn.Sequential(*model, nn.Linear(8 * 3 * 3, 3)), (torch.randn(12, 3, 9, 9), torch.arange(12) % 3)


def test_what_the_pattern_does_not_fit_is_named_together_or_skipped():
    model, batch = misfits()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(PatternError, match=r"0: 2:4 needs .*; 3: 2:4 needs .*; or leave .*unfit=.skip"):
        ms.prune(model, [batch], "2:4", loss=pair_loss)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    report = ms.prune(model, [batch], "2:4", loss=pair_loss, unfit="skip")
    assert set(report.layers) == {"2", "5"} and set(report.skipped) == {"0", "3"}
    assert all("2:4 needs" in reason for reason in report.skipped.values())
    assert all(torch.equal(before[f"{name}.weight"], model[int(name)].weight) for name in report.skipped)
    nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    assert report.model_sparsity == pytest.approx(1 - nonzero / sum(p.numel() for p in model.parameters()))
    assert report.sparsity == 0.5 > report.model_sparsity


def test_an_allocation_names_what_none_of_its_patterns_fits():
    model, batch = misfits()
    arguments = dict(patterns=["1:4", "2:4"], loss=pair_loss, rounds=0)
    with pytest.raises(PatternError, match="0: none of the patterns fits.*; 3: none"):
        ms.allocate(model, [batch], 0.5, **arguments)
    allocation = ms.allocate(model, [batch], 0.5, unfit="skip", **arguments)
    assert set(allocation) == {"2", "5"} and set(allocation.skipped) == {"0", "3"}
    report = ms.prune(model, [batch], allocation, loss=pair_loss)
    assert report.skipped == allocation.skipped


def test_where_every_layer_is_unfit_that_is_an_error():
    model, batch = misfits()
    with pytest.raises(PatternError, match="0: 2:4 needs"):
        ms.prune(model, [batch], "2:4", loss=pair_loss, unfit="skip", targets=["0", "3"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_norm_is_estimated_again_and_said_so(dtype):
    model, calibration, *_ = built("ResNet")
    model = model.to(dtype)
    norm = model.resnet.embedder.embedder.normalization
    plain = copy.deepcopy(model)
    options = dict(objective=ms.Reconstruction(), solver=ms.SparseGPT())
    report = ms.prune(model, calibration, 0.5, **options)
    left = ms.prune(plain, calibration, 0.5, **options, batch_norm=False)
    assert report.recipe["batch_norm"] == "estimated again" and "batch_norm" not in left.recipe
    seen = []
    handle = norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
    with torch.no_grad():
        model.float()(**calibration[0])
    handle.remove()
    torch.testing.assert_close(norm.running_mean.double(), seen[0].mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
    untouched = plain.resnet.embedder.embedder.normalization
    assert untouched.running_mean.dtype is dtype and not untouched.running_mean.any()
    assert torch.equal(untouched.running_var, torch.ones_like(untouched.running_var))


def test_batch_norm_is_as_it_was_after_a_failure(monkeypatch):
    model, calibration, *_ = built("ResNet")
    before = copy.deepcopy(model.state_dict())

    def fail(*arguments, **others):
        reestimate(*arguments, **others)
        raise RuntimeError("enough")

    monkeypatch.setattr(pruning_run, "reestimate", fail)
    with pytest.raises(RuntimeError, match="enough"):
        ms.prune(model, calibration, 0.5, objective=ms.Reconstruction(), solver=ms.Magnitude())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_best_objective_for_a_network_with_batch_norm(dtype):
    model, calibration, *_ = built("ResNet")
    model = model.to(dtype)
    samples = [{name: torch.cat([tensor] * 2) for name, tensor in calibration[0].items()}]
    report = ms.prune(model, samples, 0.5, objective="auto", solver=ms.SparseGPT())
    assert len(report.trials) == len(auto.CANDIDATES) and report.sparsity == pytest.approx(0.5, abs=2e-3)


# calls that are wrong


def test_batches_that_give_no_loss():
    torch.manual_seed(0)
    model = vision("ViT", **VIT)()
    unlabelled = [{"pixel_values": images()[0]["pixel_values"]}]
    with pytest.raises(CalibrationError, match="ViTForImageClassification returns no loss .* add labels"):
        ms.prune(model, unlabelled, 0.5)
    with pytest.raises(CalibrationError, match="a batch is a tuple: pass loss="):
        ms.prune(Twice(), pairs(), 0.5)
    with pytest.raises(ModelError, match="ran no layer"):
        ms.prune(Twice(), pairs(), 0.5, loss=lambda model, batch: batch[0].mean())
    with pytest.raises(ModelError, match="ran more than once"):
        ms.prune(
            Twice(), pairs(), 0.5, loss=lambda model, batch: pair_loss(model, batch) + pair_loss(model, batch)
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, *, scale=1.0, shift=None):
        h = torch.relu(self.inner(x)) * scale
        return x + self.outer(h if shift is None else h + shift)


class Different(nn.Module):
    """Blocks of one list, called with different keyword arguments, one after the other or side by side."""

    def __init__(self, chained):
        super().__init__()
        self.blocks, self.chained = nn.ModuleList(Block() for _ in range(3)), chained

    def forward(self, x):
        first, second, third = self.blocks
        if not self.chained:
            return (first(x, scale=2.0) + second(x, shift=x.mean()) + third(x))[:, :3]
        return third(second(first(x, scale=2.0), shift=x.mean()))[:, :3]


@pytest.mark.parametrize("chained", [True, False])
def test_blocks_that_take_different_arguments(chained):
    torch.manual_seed(0)
    model = Different(chained)
    ((x, _),) = batches = pairs()
    assert isinstance(partition_model(model, batches, pair_loss).adapter, ChainAdapter) is chained
    reads, second = [], copy.deepcopy(model.blocks[1].outer)
    handle = model.blocks[1].outer.register_forward_hook(lambda _m, args, _out: reads.append(args[0].detach()))
    model(x)
    handle.remove()
    report = ms.prune(
        model,
        batches,
        {"blocks.1.outer": 0.5},
        objective=ms.Reconstruction(),
        solver=ms.SparseGPT(),
        loss=pair_loss,
    )
    expected = ms.solve(
        ms.Reconstruction().problem(second.weight.detach(), inputs=reads[0]), 0.5, ms.SparseGPT()
    )
    assert list(report.layers) == ["blocks.1.outer"]
    torch.testing.assert_close(model.blocks[1].outer.weight.detach(), expected.weight, rtol=1e-3, atol=1e-5)


def test_blocks_side_by_side_are_no_chain_whatever_the_loss():
    model = Different(chained=False)
    side_by_side = partition_model(model, pairs(), lambda model, batch: 1 + 0 * model(batch[0]).sum())
    assert isinstance(side_by_side.adapter, GraphAdapter)


class Gated(nn.Module):
    """Returns what is passed on, and its gate, as attention does that returns its weights."""

    def __init__(self):
        super().__init__()
        self.both, self.outer = nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x):
        h, gate = self.both(x).chunk(2, -1)
        gate = torch.sigmoid(3 * gate)
        return x + self.outer(torch.tanh(h) * gate), gate


class Gates(nn.Module):
    """Blocks that return tuples; gates go into the output if they are `wanted`."""

    def __init__(self, wanted=True):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.wanted = nn.ModuleList(Gated() for _ in range(3)), wanted

    def forward(self, x):
        gates = 0
        for block in self.blocks:
            outputs = block(x)
            x = outputs[0]
            if self.wanted:
                gates = gates + outputs[1]
        return (x + 0.1 * gates[..., :6] if self.wanted else x).mean(1)[:, :3]


def gate_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def gate_pairs():
    return torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


@pytest.mark.parametrize("wanted", [True, False])
def test_a_result_that_a_part_computes_another_from_counts_once(wanted):
    model, (x, y) = Gates(wanted), gate_pairs()
    name = "blocks.0.both"
    weight, gradients = model.get_parameter(f"{name}.weight"), []
    for k in range(6):
        (gradient,) = torch.autograd.grad(gate_loss(model, (x[k : k + 1], y[k : k + 1])), weight)
        gradients.append(gradient)
    problem = ms.Fisher().problem(weight.detach().clone(), gradients=torch.stack(gradients))
    expected = ms.solve(problem, 0.5, ms.SparseGPT())
    ms.prune(
        model,
        [(x, y)],
        {name: 0.5},
        objective=ms.Fisher(),
        solver=ms.SparseGPT(),
        loss=gate_loss,
        adapter=GraphAdapter(),
    )
    torch.testing.assert_close(weight.detach(), expected.weight, rtol=1e-3, atol=1e-5)


def test_blocks_that_return_tuples_are_a_chain():
    found = partition_model(Gates(wanted=False), [gate_pairs()], gate_loss)
    assert isinstance(found.adapter, ChainAdapter)
    assert isinstance(partition_model(Gates(), [gate_pairs()], gate_loss).adapter, GraphAdapter)


def test_a_layer_of_a_chain_that_never_runs_is_named():
    model = Different(chained=True)
    for block in model.blocks:
        block.unused = nn.Linear(6, 6)
    unused = [f"blocks.{k}.unused" for k in range(3)]
    assert set(partition_model(model, pairs(), pair_loss).unreached) == set(unused)
    report = ms.prune(model, pairs(), 0.5, solver=ms.SparseGPT(), loss=pair_loss, unreached="skip")
    assert list(report.skipped) == unused and len(report.layers) == 6


def test_padding_is_left_out_where_tokens_are_folded_into_the_samples():
    layer, mask = layer_view(nn.Linear(4, 3)), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    x, deltas = torch.randn(2, 3, 4), torch.randn(2, 3, 3)
    found = []
    for shape in ((2, 3), (6,)):
        statistics = LayerStatistics({"layer": layer}, JOINT, 16, torch.ones(2))
        rows, at = x.view(*shape, 4), deltas.view(*shape, 3)
        statistics.observe(2, {"layer": [rows]}, {"layer": [at]}, {"layer": [rows]}, mask)
        assert statistics.tokens == {"layer": 3}
        found.append([torch.as_tensor(statistic) for statistic in statistics.of("layer")[0]])
    for apart, folded in zip(*found, strict=True):
        torch.testing.assert_close(apart, folded)
    torch.testing.assert_close(found[0][0], x[mask].T @ x[mask])


def test_a_batch_with_nan_is_refused_and_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    ((x, y),) = pairs()
    for objective, words in ((ms.Reconstruction(), "inputs holds NaN"), (JOINT, "finite scalar, got nan")):
        with pytest.raises(ValueError, match=words):
            ms.prune(model, [(x, y), (x * torch.nan, y)], 0.5, objective=objective, loss=pair_loss)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Fork(nn.Module):
    """Other layers for other batches."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, 3) for _ in range(6))

    def forward(self, x):
        return sum(part(x) for part in (self.parts[:4] if len(x) == 8 else self.parts))


@pytest.mark.parametrize("objective", [ms.Reconstruction(), ms.Fisher()])
def test_batches_that_call_other_parts(objective):
    model = Fork()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="every batch must call the same"):
        ms.prune(model, [*pairs(), *pairs(8)], 0.5, loss=pair_loss, objective=objective)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_names_of_layers_outside_the_segments_are_not_targets():
    model, calibration, *_ = built("BERT")
    with pytest.raises(TargetError, match="classifier"):
        ms.prune(model, calibration, 0.5, targets="classifier")
    model, calibration, *_ = built("ResNet")
    report = ms.prune(model, calibration, 0.5, targets="classifier.1", solver=ms.SparseGPT())
    assert list(report.layers) == ["classifier.1"]


def test_a_cut_knows_its_layers():
    model = Twice()
    cut = partition_model(model, as_batches(pairs()), pair_loss)
    assert isinstance(cut, Partition) and set(cut.unreached) == {"unused"} and cut.heads == frozenset()
    assert [name for name, _ in cut.parts] == [""]
