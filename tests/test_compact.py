"""Compact folders: smaller, without loss, and refused where they are not whole."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moonshot as ms
from moonshot.app import cli
from moonshot.files.compact import compact_folder, load_compact, unpack_folder
from moonshot.files.folder import save
from moonshot.files.load import load
from moonshot.files.mapped import DTYPES
from moonshot.files.source import FolderError, weight_files
from tests.models import decoder, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{pattern: saved folder} of a model whose layers are most of it."""
    folders = {}
    for pattern in ("2:4", "50%"):
        model = decoder(
            dtype=torch.bfloat16, vocab_size=61, intermediate_size=512, hidden_size=128, head_dim=32
        )
        report = ms.prune(model, tokens(), pattern, solver=ms.Magnitude(), objective=ms.Reconstruction())
        folders[pattern] = save(model, None, report, tmp_path_factory.mktemp("plain") / "model")
    return folders


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def size(folder, suffix):
    return sum(path.stat().st_size for path in folder.rglob(f"*{suffix}"))


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_there_and_back_is_the_same_bit_for_bit(saved, tmp_path, pattern):
    plain = saved[pattern]
    compact = compact_folder(plain, tmp_path / "compact")
    assert not list(compact.rglob("*.safetensors")) and (compact / "config.json").is_file()
    again = unpack_folder(compact, tmp_path / "again")
    assert {path.name for path in again.iterdir()} == {path.name for path in plain.iterdir()}
    for name in weight_files(plain):
        one, other = load_file(plain / name), load_file(again / name)
        assert list(one) == list(other) and (plain / name).read_bytes() == (again / name).read_bytes()
        for key, tensor in one.items():
            assert torch.equal(tensor.view(torch.int16), other[key].view(torch.int16)), key
    model = load_compact(compact)
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_sizes(saved, tmp_path):
    """Of the pruned layers at most 0.57; norms and embeddings are as they were."""
    compact = compact_folder(saved["2:4"], tmp_path / "compact")
    report = json.loads((compact / "report.json").read_text())
    with safe_open(compact / "model.compact", "pt") as file:
        names = set(file.keys())
        for layer, about in report["layers"].items():
            parts = {f"{layer}.weight.values", f"{layer}.weight.bits"}
            assert parts <= names
            dense = 2 * about["shape"][0] * about["shape"][1]
            assert sum(file.get_tensor(part).nbytes for part in parts) <= 0.57 * dense


def test_minus_zero_scalars_and_other_kinds_of_numbers(saved, tmp_path):
    from safetensors.torch import save_file

    plain = tmp_path / "plain"
    shutil.copytree(saved["2:4"], plain)
    odd = {
        "minus": torch.tensor([0.0, -0.0] * 40, dtype=torch.bfloat16),
        "scalar": torch.tensor(0.0),
        "empty": torch.zeros(0, 3),
        "integers": torch.tensor([0, 0, 7] * 30),
        "booleans": torch.tensor([True, False] * 30),
        "double": torch.eye(5, dtype=torch.float64),
        "dense": torch.randn(5, 3).half(),
    }
    odd |= {name: torch.tensor([0, 0, 1] * 30).to(dtype) for name, dtype in DTYPES.items()}
    save_file(odd, plain / "model.safetensors")
    compact = compact_folder(plain, tmp_path / "compact")
    again = unpack_folder(compact, tmp_path / "again")
    found = load_file(again / "model.safetensors")
    for name, tensor in odd.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        as_bytes = [each.reshape(-1).view(torch.uint8) for each in (found[name], tensor)]
        assert torch.equal(*as_bytes), name


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_of_the_hubs_cache_is_copied_with_all_its_files(saved, tmp_path, there):
    """There every file is a link; one that leads elsewhere is named."""
    snapshot = tmp_path / "models--org--pruned" / "snapshots" / "0123"
    blobs = shutil.copytree(saved["2:4"], snapshot.parent.parent / "blobs" if there else tmp_path / "elsewhere")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    if there:
        compact = compact_folder(snapshot, tmp_path / "compact")
        shutil.copytree(compact, blobs, dirs_exist_ok=True)
        for path in snapshot.iterdir():
            path.unlink()
        for path in compact.iterdir():
            (snapshot / path.name).symlink_to(blobs / path.name)
        again = unpack_folder(snapshot, tmp_path / "again")
        assert names(again) == names(saved["2:4"]) and not any(path.is_symlink() for path in again.iterdir())
        assert AutoModelForCausalLM.from_pretrained(again)
    else:
        with pytest.raises(FolderError, match="is a link out of its folder"):
            compact_folder(snapshot, tmp_path / "compact")
        assert names(tmp_path) == ["elsewhere", "models--org--pruned"]


def test_shards_stay_shards(tmp_path):
    model = decoder(dtype=torch.bfloat16)
    ms.prune(model, tokens(), "50%", solver=ms.Magnitude(), objective=ms.Reconstruction())
    plain = tmp_path / "plain"
    model.save_pretrained(plain, max_shard_size="20KB")
    (plain / "report.json").write_text("{}")
    assert len(weight_files(plain)) == 2
    compact = compact_folder(plain, tmp_path / "compact")
    assert size(compact, ".compact") < size(plain, ".safetensors")
    again = unpack_folder(compact, tmp_path / "again")
    assert weight_files(again) == weight_files(plain)
    for name in weight_files(plain):
        one, other = load_file(plain / name), load_file(again / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "contents", "outside", "version"])
def test_what_is_not_whole_is_refused(saved, tmp_path, damage):
    compact = compact_folder(saved["2:4"], tmp_path / "compact")
    file, contents = compact / "model.compact", compact / "compact.json"
    words = "was cut short or altered"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "altered":
        content = bytearray(file.read_bytes())
        content[-7] ^= 1
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    elif damage == "contents":
        contents.write_text("[]")
        words = "is no compact folder"
    elif damage == "outside":
        contents.write_text(contents.read_text().replace('"model.safetensors"', '"../model.safetensors"'))
        words = "lead out of the folder"
    else:
        contents.write_text(contents.read_text().replace('"version": 1', '"version": 2'))
        words = "another version"
    for read in (load_compact, lambda folder: unpack_folder(folder, tmp_path / "again")):
        with pytest.raises(FolderError, match=words):
            read(compact)
    assert not (tmp_path / "again").exists()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FolderError, match="no folder that moonshot prune saved"):
        compact_folder(tmp_path, tmp_path / "compact")
    with pytest.raises(FolderError, match="is no compact folder"):
        load_compact(tmp_path)


def test_a_compact_folder_says_how_it_is_read_and_is_not_written_into(saved, tmp_path):
    compact = compact_folder(saved["2:4"], tmp_path / "compact")
    with pytest.raises(FolderError, match="is a compact folder: make an ordinary one .* moonshot.load_compact"):
        load(str(compact))
    before = sorted(compact.rglob("*"))
    for destination in (compact, compact / "inside"):
        with pytest.raises(FolderError, match="must be folders apart"):
            unpack_folder(compact, destination, overwrite=True)
    assert sorted(compact.rglob("*")) == before


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["moonshot", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_from_the_command_line(monkeypatch, tmp_path, capsys):
    demo = cli.Path(ms.__file__).parent / "demo"
    common = ["--data", demo / "calibration.txt", "--nsamples", 2, "--seqlen", 32, "--pattern", "2:4"]
    common += ["--solver", "magnitude", "--objective", "reconstruction", "--targets", "*.mlp.*"]
    assert run(monkeypatch, "prune", demo / "model", *common, "--save", tmp_path / "plain") == 0
    assert run(monkeypatch, "prune", demo / "model", *common, "--compact", "--save", tmp_path / "compact") == 0
    assert "moonshot unpack" in capsys.readouterr().out
    assert run(monkeypatch, "unpack", tmp_path / "compact", "--save", tmp_path / "again") == 0
    said = []
    for name in ("plain", "compact"):
        arguments = ["--data", demo / "heldout.txt", "--seqlen", 64, "--nsamples", 4]
        assert run(monkeypatch, "eval", tmp_path / name, *arguments) == 0
        said.append(capsys.readouterr().out)
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    plain, again = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert size(tmp_path / "compact", ".compact") < 0.85 * size(tmp_path / "plain", ".safetensors")
    assert run(monkeypatch, "unpack", tmp_path / "plain", "--save", tmp_path / "other") == 1
    assert "is no compact folder" in capsys.readouterr().err
