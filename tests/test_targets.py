"""What `moonshot targets` says of each kind of folder; layers for sparse tensor cores."""

import re

import pytest
import torch
import transformers

import moonshot as ms
from moonshot.app.targets import SavedModel
from moonshot.files.compact import compact_folder, compact_size, unpack_folder, weights_size
from moonshot.files.folder import save
from moonshot.models import semi_structured
from moonshot.models.modules import ModelError
from moonshot.models.semi_structured import semi_structured_layers, to_semi_structured
from tests.models import decoder, model_folder, tokens
from tests.test_cli import run
from tests.test_hub import OPTIONS


@pytest.fixture
def saved(tmp_path):
    model = decoder()
    report = ms.prune(model, tokens(), "2:4", solver=ms.Magnitude(), objective=ms.Reconstruction())
    return save(model, None, report, tmp_path / "plain")


def said(folder):
    """{target: (size, speed, how)} by the first word of its name."""
    return {each.name.split()[0].strip(","): each for each in SavedModel(folder).targets()}


def test_the_size_of_a_compact_folder_is_known_before_it_is_written(saved, tmp_path):
    compact = compact_folder(saved, tmp_path / "compact")
    sizes = {(compact_size(folder), weights_size(folder)) for folder in (saved, compact)}
    ((small, plain),) = sizes
    assert 0 < small < plain
    header = (compact / "model.compact").stat().st_size - small
    assert 0 < header < 10000
    of_plain, of_compact = said(saved), said(compact)
    share = f"{100 * small / plain:.0f} % of the plain weights"
    assert (of_plain["disk"].size, of_compact["disk"].size) == (share, f"{share}, as it is")
    assert of_compact["transformers"].how.startswith("moonshot unpack")
    again = unpack_folder(compact, tmp_path / "again")
    assert said(again)["disk"] == of_plain["disk"]


def test_only_a_smaller_model_is_said_to_be_faster(monkeypatch, tmp_path, capsys):
    (tmp_path / "dense").mkdir()
    model = model_folder(tmp_path / "dense", num_hidden_layers=1)
    options = [part for part in OPTIONS if part not in ("--pattern", "2:4")]
    arguments = [*options, "--columns", 0.5, "--shrink", "--save", tmp_path / "small"]
    assert run(monkeypatch, "prune", model, *arguments) == 0
    small = said(tmp_path / "small")
    assert small["transformers"].speed.startswith("faster") and small["torch"].size == "no gain"
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert f"smaller: {there.num_parameters()} of " in small["transformers"].size
    capsys.readouterr()
    assert run(monkeypatch, "targets", tmp_path / "small", "--measure") == 0
    assert re.search(r"transformers: \d+\.\d\d of the dense model's time", capsys.readouterr().out)
    (model / "config.json").unlink()
    for arguments, words in (
        (["small", "--measure"], "(--dense names the dense model)"),
        (["dense"], "is no folder that moonshot prune saved"),
        (["smal"], f"no such folder: {tmp_path / 'smal'}; did you mean {tmp_path / 'small'}?"),
    ):
        assert run(monkeypatch, "targets", tmp_path / arguments[0], *arguments[1:]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_plain_zeros_gain_nothing_where_they_are_multiplied(saved, monkeypatch):
    rows = said(saved)
    assert rows["transformers"].size == "as dense" and rows["transformers"].speed.startswith("as dense")
    assert "not measured" in rows["torch"].speed and "9 of 16 bits" in rows["torch"].size


def test_layers_that_are_2_4_are_converted(monkeypatch):
    model = decoder(tie_word_embeddings=True)
    ms.prune(model, tokens(), "2:4", solver=ms.Magnitude(), objective=ms.Reconstruction())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :3] = 1  # three of four
        model.lm_head.weight.zero_()  # shared with the embeddings
    with pytest.raises(ModelError, match="need a GPU of compute capability 8.0"):
        to_semi_structured(model)
    expected = set(semi_structured_layers(model))
    assert "model.layers.0.mlp.gate_proj" in expected and "model.layers.1.mlp.up_proj" in expected
    assert not {"model.layers.0.mlp.up_proj", "lm_head"} & expected


def test_what_torch_does_not_take_stays_dense(monkeypatch):
    """With a stand-in for torch's conversion, which needs a GPU."""

    def convert(weight):
        if weight.shape[0] % 32:
            raise RuntimeError("Error original_tensor.shape is not supported!\nBoth dimensions must be larger")
        return 2 * weight

    model = decoder()
    ms.prune(model, tokens(), "2:4", solver=ms.Magnitude(), objective=ms.Reconstruction())
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    monkeypatch.setattr(semi_structured, "_check_device", lambda model: None)
    converted, refused = to_semi_structured(model)
    assert "model.layers.0.self_attn.q_proj" in converted and torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, 2 * before
    )
    assert "is not supported! Both" in refused["model.layers.0.self_attn.k_proj"]
    assert {*converted, *refused} == set(semi_structured_layers(model)) | {*converted}
    with pytest.raises(ModelError, match="no linear layer is 2:4"):
        to_semi_structured(decoder())


@pytest.mark.gpu
def test_converted_layers_give_the_same():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    model = decoder(dtype=torch.float16, hidden_size=128, intermediate_size=256, head_dim=32).cuda()
    ms.prune(model, tokens(), "2:4", solver=ms.Magnitude(), objective=ms.Reconstruction())
    ids = tokens(8, 16).cuda()
    with torch.no_grad():
        before = model(ids).logits
        converted, _ = to_semi_structured(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-2, atol=1e-2)
    assert converted
