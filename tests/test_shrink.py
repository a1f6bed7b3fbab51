"""Whole columns, and models that are really smaller."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import moonshot as ms
from moonshot.app import cli
from moonshot.checks import check_pattern
from moonshot.models.modules import ModelError
from moonshot.models.shrink import check_shrinks
from strategies import random_layer
from tests.models import SIZES, decoder, tokens

FAMILIES = {
    "Llama": (transformers.LlamaConfig, {}),
    "Qwen3": (transformers.Qwen3Config, {}),
    "Mistral": (transformers.MistralConfig, {}),
    "Llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "one group a head": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
}


@pytest.mark.parametrize("group", [1, 2])
def test_columns_keep_the_promises_of_a_pattern(group):
    check_pattern(ms.Columns(0.5, group))


@pytest.mark.parametrize(
    "solver", [ms.ADMM(), ms.OBS(), ms.IHT(), ms.Magnitude(), ms.Wanda()], ids=lambda solver: solver.name
)
def test_solvers_prune_whole_columns(solver):
    problem = random_layer(0, 6, 16, 2, 1e2).problem
    result = ms.solve(problem, ms.Columns(0.25, 2), solver)
    zero = (np.asarray(result.weight) == 0).all(axis=0)
    assert zero.sum() == 4 and (zero.reshape(-1, 2).sum(1) != 1).all() and result.sparsity == 0.25


@pytest.mark.parametrize("seed", range(5))
def test_the_best_columns_are_found_on_small_layers(seed):
    """ADMM and OBS are no worse than magnitude, and all no better than the best of all choices."""
    problem = random_layer(seed, 3, 6, 1, 1e2).problem
    best = min(_refitted(problem, [a, b]) for a in range(6) for b in range(a))
    found = [
        ms.solve(problem, ms.Columns(1 / 3), solver).value for solver in (ms.ADMM(), ms.OBS(), ms.Magnitude())
    ]
    assert best <= min(found) * (1 + 1e-6) and max(found[:2]) <= found[2] * (1 + 1e-6)


def _refitted(problem, pruned):
    """F of the best weight with these columns zero."""
    total = 0.0
    for i, centre in enumerate(np.asarray(problem.centre, np.float64)):
        inverse = np.linalg.inv(problem.hessian.row(i))
        c = centre[pruned]
        total += c @ np.linalg.solve(inverse[np.ix_(pruned, pruned)], c)
    return total


def small(family):
    config, changes = FAMILIES[family]
    return decoder(config, **changes).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_is_smaller_and_gives_the_same(family, tmp_path):
    model = small(family)
    dense = sum(parameter.numel() for parameter in model.parameters())
    patterns = ms.column_patterns(model, 0.5)
    assert {name.rpartition(".")[2] for name in patterns} == {"down_proj", "o_proj"}
    ms.prune(model, tokens(), patterns)
    shrunk = ms.shrink(model)
    assert type(shrunk) is type(model) and sum(p.numel() for p in shrunk.parameters()) < 0.8 * dense
    assert shrunk.config.intermediate_size == SIZES["intermediate_size"] // 2
    assert shrunk.config.num_attention_heads == SIZES["num_attention_heads"] // 2
    with torch.no_grad():
        torch.testing.assert_close(shrunk(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    shrunk.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, shrunk(tokens()).logits)


def test_a_vits_hidden_units_can_go_and_its_heads_cannot():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    model = transformers.ViTForImageClassification(config).eval()
    batch = {"pixel_values": torch.randn(8, 3, 16, 16), "labels": torch.arange(8) % 2}
    patterns = ms.column_patterns(model, 0.25)
    assert len(patterns) == 2 and all(name.endswith("fc2") for name in patterns)
    ms.prune(model, [batch], patterns)
    shrunk = ms.shrink(model)
    assert shrunk.config.intermediate_size == 48
    with torch.no_grad():
        torch.testing.assert_close(
            shrunk(batch["pixel_values"]).logits, model(batch["pixel_values"]).logits, rtol=1e-4, atol=1e-5
        )


def test_both_sides_of_an_encoder_decoder_become_smaller():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=61,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=16,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    patterns = ms.column_patterns(model, 0.25)
    assert {name.removesuffix(".fc2") for name in patterns} == {
        "model.encoder.layers.0",
        "model.encoder.layers.1",
        "model.decoder.layers.0",
    }
    batch = {"input_ids": tokens()[:, :12], "labels": tokens()[:, :8].contiguous()}
    ms.prune(model, [batch], patterns, solver=ms.Magnitude(), objective=ms.Reconstruction())
    shrunk = ms.shrink(model)
    assert shrunk.config.encoder_ffn_dim == shrunk.config.decoder_ffn_dim == 24
    with torch.no_grad():
        torch.testing.assert_close(shrunk(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_what_a_model_generates_with_stays():
    model = decoder()
    model.generation_config.max_new_tokens = 7
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, :8] = 0
    assert ms.shrink(model).generation_config.max_new_tokens == 7
    model.model.norm.weight.data = torch.ones(3)  # no longer what the configuration says
    with pytest.raises(ModelError, match=r"whose size follows from .* size mismatch for model.norm.weight"):
        ms.shrink(model)


def test_whether_a_model_can_be_shrunk_is_seen_before_it_is_pruned():
    """An attention sink for each head follows from their number too, and is no row of a layer."""
    sizes = dict(num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    with torch.device("meta"):
        llama, gpt_oss = decoder(), decoder(transformers.GptOssConfig, **sizes)
    check_shrinks(llama, ms.column_patterns(llama, 0.5))
    with pytest.raises(ModelError, match=r"size follows from num_attention_heads, .* size mismatch .*sinks"):
        check_shrinks(gpt_oss, ms.column_patterns(gpt_oss, 0.5))


def test_sizes_that_are_lists_are_no_number_of_units():
    model = decoder()
    vars(model.config)["intermediate_size"] = [48, 48]  # as Gemma 3n's, of each block
    assert {name.rpartition(".")[2] for name in ms.column_patterns(model, 0.5)} == {"o_proj"}


def test_tied_weights_stay_tied_and_dtypes_what_they_are():
    model = decoder(dtype=torch.bfloat16, tie_word_embeddings=True).eval()
    model.model.norm.float()
    ms.prune(
        model, tokens(), ms.column_patterns(model, 0.5), solver=ms.Magnitude(), objective=ms.Reconstruction()
    )
    small = ms.shrink(model)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.model.norm.weight.dtype == torch.float32 and small.lm_head.weight.dtype == torch.bfloat16
    small.model.embed_tokens.weight.data.zero_()
    assert model.lm_head.weight.any()  # nothing is shared with the one that it was made of


def test_from_the_command_line_to_a_smaller_model(monkeypatch, tmp_path, capsys):
    demo = Path(ms.__file__).parent / "demo"
    common = ["--data", demo / "calibration.txt", "--nsamples", 4, "--seqlen", 64, "--solver", "magnitude"]
    common += ["--objective", "reconstruction", "--save", tmp_path / "small"]

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["moonshot", "prune", *map(str, [demo / "model", *common, *arguments])]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    for wrong, words in (
        (["--shrink", "--pattern", "2:4"], "add --columns"),
        (["--columns", 0.25, "--pattern", "2:4"], "leave --pattern and --sparsity out"),
        (["--columns", 0.25, "--targets", "*.0.*"], "leave --allocate, --targets and --adapter out"),
        (["--columns", 0.25, "--solver", "sparsegpt"], "has no `groups"),
        (["--columns", 0.25, "--shrink", "--ignore", "*.0.*"], "has 640 units left and model.layers.1"),
        (
            ["--columns", 0.0001, "--shrink"],
            "--columns 0.0001 prunes no whole unit that --shrink could cut out",
        ),
    ):
        code, said = run(*wrong)
        assert code == 1 and words in said.err and "of 8: " not in said.out
    code, said = run("--columns", 0.25, "--shrink")
    assert code == 0 and "cut out" in said.out
    sizes = [
        path.stat().st_size for path in (demo / "model/model.safetensors", tmp_path / "small/model.safetensors")
    ]
    assert sizes[1] < 0.9 * sizes[0]
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert small.config.intermediate_size == 480
    assert small.config.num_key_value_heads == 4  # 6 heads would not divide a hidden size of 256
    assert small.dtype == transformers.AutoModelForCausalLM.from_pretrained(demo / "model", dtype="auto").dtype


def test_a_fraction_of_heads_that_the_configuration_does_not_allow_is_the_next_one():
    """32 is no multiple of three heads; Qwen3 does not ask for that."""
    config = {"num_key_value_heads": 4}
    assert ms.column_patterns(decoder(**config), 0.25)["model.layers.0.self_attn.o_proj"].sparsity == 0
    assert ms.column_patterns(decoder(**config), 0.4)["model.layers.0.self_attn.o_proj"].sparsity == 0.5
    qwen = decoder(transformers.Qwen3Config, **config)
    assert ms.column_patterns(qwen, 0.25)["model.layers.0.self_attn.o_proj"].sparsity == 0.25
    model = decoder(**config)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight[:, :8] = 0
    with pytest.raises(ModelError, match="LlamaConfig does not allow .* not a multiple of the number"):
        ms.shrink(model)


def test_what_cannot_be_shrunk_is_said():
    model = decoder()
    with pytest.raises(ModelError, match="no unit is zero as a whole"):
        ms.shrink(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :3] = 0
    with pytest.raises(
        ModelError, match=r"layers.0.mlp.down_proj has 45 units left and model.layers.1.* 48, but"
    ):
        ms.shrink(model)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
    with pytest.raises(ModelError, match=r"nothing is left of model.layers.0.mlp.down_proj"):
        ms.shrink(model)
    with pytest.raises(
        ModelError, match="has no units that can be cut out: .* configuration has their number$"
    ):
        ms.shrink(torch.nn.Linear(3, 4))


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnets_configuration_has_no_number_of_channels_inside_a_block(layer_type):
    sizes = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type=layer_type)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    for ask in (lambda: ms.column_patterns(model, 0.25), lambda: ms.shrink(model)):
        with pytest.raises(ModelError, match="channels inside a block of convolutions .* save with --compact"):
            ask()
