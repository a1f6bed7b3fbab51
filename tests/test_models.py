"""`prune` on small random decoders: blocks, statistics, padding, dtypes, saving."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import moonshot as ms
from moonshot.files.folder import save
from moonshot.models.blocks import Chain, find_blocks
from moonshot.models.calibration import CalibrationError, as_batches, windows
from moonshot.models.chain import block_gradients
from moonshot.models.evaluation import perplexity
from moonshot.models.losses import model_loss
from moonshot.models.modules import ModelError
from moonshot.models.offload import Offload
from moonshot.models.precision import zeros
from moonshot.models.targets import TargetError
from tests.examples.diagonal_saliency import DiagonalSaliency
from tests.examples.normalised_reconstruction import NormalisedReconstruction
from tests.models import JOINT, SIZES, block_layers, decoder, tokens, weights


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, MistralConfig, GemmaConfig])
@pytest.mark.parametrize("solver", [ms.SparseGPT(), ms.ADMM()])
def test_decoders_get_exactly_their_pattern(config, solver):
    model = decoder(config)
    before = weights(model)
    report = ms.prune(model, tokens(), "2:4", objective=JOINT, solver=solver)
    assert len(report.layers) == 14
    layers = block_layers(model)
    for name, layer in layers.items():
        assert ((layer.weight.reshape(-1, 4) != 0).sum(1) == 2).all()
        assert 0 < report.layers[name].relative < 1
    untouched = set(before) - {f"{name}.weight" for name in layers}
    assert all(torch.equal(before[name], dict(model.named_parameters())[name]) for name in untouched)


def test_every_layers_gap_is_proven_if_asked():
    plain, bounded = decoder(), decoder()
    without = ms.prune(plain, tokens(), "2:4", solver=ms.SparseGPT())
    report = ms.prune(bounded, tokens(), "2:4", solver=ms.SparseGPT(), bound=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), bounded.parameters(), strict=True))
    assert all(layer.gap is None for layer in without.layers.values()) and "gap" not in str(without)
    assert all(0 < layer.gap < 1 for layer in report.layers.values())
    lines = str(report).splitlines()
    assert "gap <= %" in lines[0] and len({len(line.split()) for line in lines[1:15]}) == 1
    first = next(iter(report.layers.values()))
    assert f"{100 * first.gap:.1f}" in lines[1].split()


def test_block_gradients_are_those_of_one_backward_pass():
    model = decoder()
    blocks = [block for _, block in find_blocks(model)]
    chain = Chain(model, blocks, model_loss)
    batch = as_batches(tokens())[0]
    hidden, calls = chain.enter(batch)
    offload = Offload()
    (kept,) = zip(*block_gradients(chain, [batch], [offload.store(hidden)], [calls], offload), strict=True)
    found = [gradient.read() for gradient in kept]
    outputs = []
    handles = [b.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for b in blocks]
    loss = model_loss(model, batch) * len(batch["input_ids"])
    expected = torch.autograd.grad(loss, outputs)
    for handle in handles:
        handle.remove()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective, expected",
    [
        # on trial, then for what its layers read, and then for what the next block reads
        (ms.Reconstruction(), [3, 3, 2]),
        # before the last two: to the loss, back from it, and for gradients, when the first block's layers read the same
        (ms.Fisher(), [4, 6, 5]),
    ],
)
def test_blocks_run_no_more_often_than_they_must(monkeypatch, objective, expected):
    runs, run = [0, 0, 0], Chain.run

    def counted(chain, index, *arguments):
        runs[index] += 1
        return run(chain, index, *arguments)

    monkeypatch.setattr(Chain, "run", counted)
    ms.prune(decoder(num_hidden_layers=3), tokens(), "2:4", objective=objective, solver=ms.Wanda())
    assert runs == expected


def test_statistics_of_the_first_block_are_those_of_the_dense_model():
    model, ids = decoder(), tokens(4)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    seen = {}
    handle = layer.register_forward_hook(lambda _m, args, _out: seen.update(x=args[0].detach()))
    gradients = []
    for sample in ids:
        model.zero_grad()
        model_loss(model, {"input_ids": sample[None]}).backward()
        gradients.append(layer.weight.grad.clone())
    model(input_ids=ids)
    handle.remove()
    objective = 0.5 * ms.Reconstruction() + 0.5 * ms.Fisher()
    problem = objective.problem(
        layer.weight.detach(), inputs=seen["x"].flatten(0, 1), gradients=torch.stack(gradients)
    )
    expected = ms.solve(problem, "2:4", ms.SparseGPT())
    report = ms.prune(model, ids, {name: "2:4"}, objective=objective, solver=ms.SparseGPT())
    assert report.layers[name].relative == pytest.approx(expected.relative, rel=1e-4)
    torch.testing.assert_close(layer.weight.detach(), expected.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side):
    ids, lengths = tokens(5, 12), [12, 5, 9, 3, 7]
    padded, mask = torch.zeros(5, 16, dtype=torch.long), torch.zeros(5, 16, dtype=torch.long)
    for k, length in enumerate(lengths):
        there = slice(16 - length, 16) if side == "left" else slice(0, length)
        padded[k, there], mask[k, there] = ids[k, :length], 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": position_ids}
    plain, other = decoder(), decoder()
    texts = [ids[k : k + 1, :length] for k, length in enumerate(lengths)]
    a = ms.prune(plain, texts, "2:4", objective=JOINT, solver=ms.SparseGPT())
    b = ms.prune(other, [batch], "2:4", objective=JOINT, solver=ms.SparseGPT())
    for name in a.layers:
        assert a.layers[name].terms == pytest.approx(b.layers[name].terms, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tied_model_round_trips(tmp_path, dtype):
    model = decoder(dtype=dtype, tie_word_embeddings=True)
    report = ms.prune(model, tokens(), "50%", objective=JOINT)
    assert all(p.dtype == dtype for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    folder = save(model, None, report, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    with pytest.raises(FileExistsError, match="another folder"):
        save(model, None, report, folder)


def test_a_failed_save_leaves_nothing(tmp_path):
    model = decoder()
    report = ms.prune(model, tokens(), "50%", solver=ms.Magnitude())

    class FullDisk:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="free some space"):
        save(model, FullDisk(), report, tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_model():
    first, second = decoder(), decoder()
    for model in (first, second):
        ms.prune(model, tokens(), "70%", objective=JOINT, seed=3, factors=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_targets_and_ignore():
    report = ms.prune(
        decoder(), tokens(), "50%", targets=["*.mlp.*", "q_proj"], ignore="re:.*layers\\.1\\..*",
        solver=ms.Wanda(), objective=ms.Reconstruction(),
    )  # fmt: skip
    assert {name.split(".")[-1] for name in report.layers} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".layers.0." in name for name in report.layers)


def test_examples_of_the_documentation():
    objective = 0.5 * NormalisedReconstruction() + 0.5 * ms.Fisher()
    report = ms.prune(decoder(), tokens(), "50%", objective=objective, solver=DiagonalSaliency())
    assert report.sparsity == 0.5
    assert set(next(iter(report.layers.values())).terms) == {"NormalisedReconstruction", "Fisher"}


@pytest.mark.parametrize("sparsity", [0, 1])
def test_extreme_sparsities(sparsity):
    model = decoder()
    before = weights(model)
    ms.prune(model, tokens(), sparsity, objective=JOINT)
    for name, layer in block_layers(model).items():
        expected = before[f"{name}.weight"] * (1 - sparsity)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(calibration=tokens()[:0]), CalibrationError, "empty"),
        (dict(calibration=[]), CalibrationError, "empty"),
        (dict(calibration="text"), TypeError, "tokenize"),
        (dict(calibration=[{"labels": tokens()}]), ValueError, "input_ids"),
        (dict(calibration=[{"input_ids": torch.rand(2, 4)}]), CalibrationError, "integers"),
        (dict(calibration=[{"input_ids": tokens()[:0]}]), CalibrationError, "not empty"),
        (dict(calibration=[{}]), CalibrationError, "no samples"),
        (dict(calibration=torch.rand(2, 4)), CalibrationError, "pass loss="),
        (dict(calibration=[3]), TypeError, "mapping or sequence of tensors"),
        (dict(calibration=tokens() + 100), CalibrationError, "token id 1.., the model's vocabulary has 61"),
        (
            dict(calibration=[{"input_ids": tokens() > 3}]),
            CalibrationError,
            "must be integers .* of torch.bool",
        ),
        (dict(checkpoint=3), TypeError, "checkpoint must be a folder"),
        (dict(scratch=-1), TypeError, "scratch must be a folder"),
        (dict(seed="x"), ValueError, "seed must be an integer from 0"),
        (dict(seed=2**70), ValueError, "seed must be an integer from 0"),
        (dict(dampening_frac="x"), ValueError, "dampening_frac must be a number"),
        (dict(bound="nonsense"), TypeError, "bound must be True or False"),
        (dict(loss="a"), TypeError, "loss must be a callable"),
        (dict(loss=lambda model, batch: 1.0), ModelError, "scalar tensor, got float"),
        (dict(targets="nothing"), TargetError, "matches no layer"),
        (dict(ignore="nothing"), TargetError, "matches no layer"),
        (dict(ignore="layers.0.*"), TargetError, r"matches no layer; did you mean \*.layers.0.\*\?"),
        (dict(pattern={"nothing": 0.5}), TargetError, "no such layer"),
        (dict(pattern={1: 0.5}), TargetError, "no such layer: 1; layers are .*, .*, .*, .*, ...$"),
        (dict(pattern={}), TargetError, "mapping of patterns is empty"),
        (dict(targets=[]), TargetError, "targets is empty"),
        (dict(ignore="*"), TargetError, "ignore leaves out all that targets match"),
        (dict(targets=3), TypeError, 'each target expression is text such as "q_proj", got 3'),
        (dict(ignore=[3]), TypeError, "each ignore expression is text"),
        (dict(pattern="2:5"), ValueError, "q_proj, .*, .*, .*, ...: 2:5 needs .* divisible by 5"),
        (dict(pattern=1.5), ValueError, "fraction of zeros"),
        (dict(objective="auto?"), TypeError, "objective must be"),
        (dict(objective="auto"), CalibrationError, "at least 8"),
        (dict(solver=ms.ADMM), TypeError, "instance"),
        (dict(factors=0), ValueError, "positive"),
        (dict(loss=lambda model, batch: model(**batch).logits.sum() * float("nan")), ModelError, "finite"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(change, error, words):
    model = decoder()
    before = weights(model)
    arguments = dict(calibration=tokens(), pattern="2:4") | change
    with pytest.raises(error, match=words):
        ms.prune(model, **arguments)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_perplexity_and_windows_say_what_they_take():
    for ids in (None, tokens().tolist(), tokens().float()):
        with pytest.raises(TypeError, match="ids must be a tensor"):
            perplexity(decoder(), ids)
    with pytest.raises(CalibrationError, match="vocabulary has 61"):
        perplexity(decoder(), tokens() + 100)
    with pytest.raises(TypeError, match="tokenizer must be one of transformers'"):
        windows(None, "text", 1, 2)


def test_a_failure_halfway_restores_the_model():
    model = decoder()
    before, seen = weights(model), []

    def fail(layer, total):
        seen.append(layer.name)
        if len(seen) == 9:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        ms.prune(model, tokens(), "2:4", objective=ms.Reconstruction(), solver=ms.Magnitude(), on_layer=fail)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_model_with_nan_is_refused_before_anything_is_pruned():
    model = decoder()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = np.nan
    before = weights(model)
    words = (
        r"^model.layers.1.mlp.up_proj.weight hold NaN or infinity \(the loss must be a finite scalar, got nan\)"
    )
    with pytest.raises(ModelError, match=words):
        ms.prune(model, tokens(), "2:4", objective=ms.Reconstruction(), solver=ms.Magnitude())
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name].nan_to_num(9), parameter.nan_to_num(9))


def test_ids_of_any_integer_dtype_give_the_same():
    model, other = decoder(), decoder()
    ms.prune(model, tokens(), "2:4", solver=ms.SparseGPT())
    ms.prune(other, tokens().int(), "2:4", solver=ms.SparseGPT())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_meta_device_and_models_without_blocks_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with pytest.raises(ModelError, match="meta device"):
        ms.prune(model, tokens(), 0.5)
    with pytest.raises(ModelError, match="no Linear or convolutional layer"):
        ms.prune(torch.nn.Embedding(61, 3), tokens(), 0.5)
    lazy = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LazyLinear(3))
    with pytest.raises(ModelError, match="1.weight, 1.bias have no shape yet: run the model once"):
        ms.prune(lazy, [(torch.randn(4, 8),)], 0.5, loss=lambda model, batch: model(batch[0]).mean())
    sparse = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    sparse[1].weight = torch.nn.Parameter(sparse[1].weight.detach().to_sparse())
    with pytest.raises(ModelError, match=r"1.weight is torch.sparse_coo: make it dense first \(to_dense\(\)\)"):
        ms.prune(sparse, [(torch.randn(4, 8),)], 0.5, loss=lambda model, batch: model(batch[0]).mean())


def test_zeros_beyond_the_pattern_are_counted():
    model = decoder()
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight.data[0] = 0
    report = ms.prune(model, tokens(), "2:4", solver=ms.Magnitude(), objective=ms.Reconstruction())
    found = report.layers["model.layers.0.self_attn.k_proj"]
    zeros = layer.weight.numel() - int(layer.weight.count_nonzero())
    assert found.zero_survivors == 16 == zeros - found.sparsity * layer.weight.numel()
    assert "beyond what the patterns ask for, 16 weights of these layers are zero" in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_of_a_model(dtype, monkeypatch):
    monkeypatch.setattr("moonshot.models.precision._AT_ONCE", 7)
    layer = torch.nn.Linear(5, 4, bias=False).to(dtype)
    layer.weight.data[0] = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 1.0])
    assert zeros(torch.nn.Sequential(layer, layer)) == pytest.approx(2 / 20)


def test_the_report_is_saved_as_json(tmp_path):
    model = copy.deepcopy(decoder())
    report = ms.prune(model, tokens(), 0.5, solver=ms.Magnitude(), objective=ms.Reconstruction())
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert '"sparsity": 0.5' in text and "q_proj" in str(report)
