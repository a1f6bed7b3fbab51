"""What waits in a file: hidden states, gradients, and a model's own weights."""

import errno
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import moonshot as ms
from moonshot.files.folder import opened, save
from moonshot.files.load import load
from moonshot.files.mapped import MappedFile
from moonshot.files.source import FolderError
from moonshot.models.offload import Offload, in_turn, read_all
from tests.models import JOINT, decoder, network, tokens

DEMO = Path(ms.__file__).parent / "demo"


def tied(dtype=torch.bfloat16):
    return decoder(dtype=dtype, tie_word_embeddings=True)


@pytest.mark.filterwarnings("error")
def test_the_file_is_closed_with_the_last_that_is_in_it(tmp_path):
    stored = Offload(tmp_path).store(torch.arange(3))
    file = stored._file
    assert torch.equal(stored.read(), torch.arange(3)) and list(tmp_path.iterdir()) == []
    seek = file.seek
    del stored, file
    with pytest.raises(ValueError, match="closed file"):
        seek(0)


@pytest.fixture(params=["memory", "file"])
def folder(request, tmp_path):
    return tmp_path if request.param == "file" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_what_is_kept_is_read_again(folder, dtype):
    offload = Offload(folder)
    first, second = torch.randn(3, 4).to(dtype), torch.randn(4, 3).T.to(dtype)
    kept = [offload.store(tensor) for tensor in (first, second, torch.zeros(0, 2), first[0, 0])]
    kept[0].replace(second)
    assert [tuple(k.read().shape) for k in kept] == [(3, 4), (3, 4), (0, 2), ()]
    assert torch.equal(kept[0].read(), second) and torch.equal(kept[1].read(), second)
    assert torch.equal(kept[3].read(), first[0, 0])
    tree = offload.store_all({"a": (first, None, 3), "b": [second]})
    assert torch.equal(read_all(tree)["b"][0], second) and read_all(tree)["a"][1:] == (None, 3)


def test_the_next_ones_are_on_their_way_while_one_is_read():
    said = []

    class Stored:
        def __init__(self, name):
            self.name = name

        def begin(self):
            said.append(self.name)

    first, second = [Stored("a"), Stored("b"), Stored("c")], [Stored("x"), Stored("y"), Stored("z")]
    for b in in_turn(first, second, []):
        said.append(b)
    assert said == ["b", "y", 0, "c", "z", 1, 2]
    assert list(in_turn([])) == []


def test_another_dtype_of_the_same_size_may_take_a_place_and_nothing_larger(tmp_path):
    kept = Offload(tmp_path).store(torch.zeros(4, dtype=torch.float16))
    kept.replace(torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(kept.read(), torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="16 bytes cannot take the place of one of 8"):
        kept.replace(torch.ones(4))


def test_nothing_is_left_in_the_folder(tmp_path):
    offload = Offload(tmp_path)
    offload.store(torch.ones(1000))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_and_a_full_disk_is_named(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    with pytest.raises(OSError, match="choose another folder"):
        Offload(tmp_path / "a file" / "nowhere")
    offload = Offload(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()

    class FullDisk:
        def seek(self, offset): ...

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offload, "_file", FullDisk())
    with pytest.raises(OSError, match="No space left on device; choose a folder with more space"):
        offload.store(torch.ones(3))


@pytest.mark.parametrize("make, loss", [(tied, None), (network, "labels")])
def test_a_scratch_folder_changes_nothing(tmp_path, make, loss):
    if loss:
        x, y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 5
        calibration = [(x[:3], y[:3]), (x[3:], y[3:])]
        more = {"loss": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])}
    else:
        calibration, more = tokens(), {}
    models = make(), make()
    for model, scratch in zip(models, (None, tmp_path), strict=True):
        ms.prune(model, calibration, "50%", objective=JOINT, solver=ms.SparseGPT(), scratch=scratch, **more)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_restores_the_weights_from_the_scratch_folder(tmp_path):
    model = tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(layer, total):
        if layer.name.endswith("down_proj"):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ms.prune(model, tokens(), "50%", solver=ms.Magnitude(), scratch=tmp_path, on_layer=fail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_written_to_a_mapped_tensor_is_in_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(4),
        "none": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    mapped = MappedFile(path)
    assert set(mapped.tensors) == set(tensors)
    assert all(torch.equal(mapped.tensors[name], tensors[name]) for name in tensors)
    mapped.tensors["a"][1] = 7
    mapped.release()
    assert (mapped.tensors["a"][1] == 7).all()
    mapped.flush()
    assert (load_file(path)["a"][1] == 7).all() and torch.equal(load_file(path)["b"], tensors["b"])


def with_header(path, header, data=b""):
    """A file in the format of safetensors with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"{...}",
        {"a": entry(0, 8, "F5")},
        {"a": entry(0, 80)},
        {"a": entry(1000, 1008)},
        {"a": entry(8, 16)},
        {"a": entry(-8, 0)},
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(0, 8, shape=(2**62, 2**62))},
        {"a": {"dtype": "F32", "shape": [2]}},
        [],
    ],
)
def test_a_file_with_a_wrong_header_is_never_mapped(tmp_path, header):
    path = with_header(tmp_path / "x.safetensors", header, bytes(16))
    with pytest.raises(FolderError, match=r"x.safetensors is no whole safetensors file .*get it once more"):
        MappedFile(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20, -1])
def test_a_file_that_is_cut_short_is_never_mapped(tmp_path, length):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FolderError, match=r"x.safetensors is no whole safetensors file"):
        MappedFile(path)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": entry(0, 3, "U8", (3,)), "b": entry(3, 11)}, "a tensor of F32 begins at byte"),
        ({"a": entry(0, 2, "F8_E8M0")}, "F8_E8M0"),
    ],
)
def test_a_file_of_tensors_that_cannot_be_mapped_is_named(tmp_path, header, why):
    size = max(value["data_offsets"][1] for value in header.values())
    path = with_header(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=f"x.safetensors is no safetensors file that can be mapped: .*{why}"):
        MappedFile(path)


def prune(model):
    return ms.prune(model, tokens(), "2:4", objective=JOINT, solver=ms.SparseGPT())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_a_mapped_model_is_pruned_and_saved_as_one_in_memory(tmp_path, dtype, shard):
    tied(dtype).save_pretrained(tmp_path / "dense", max_shard_size=shard)
    assert ((tmp_path / "dense" / "model.safetensors.index.json").exists()) == (shard == "10KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
    transformers.AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(tmp_path / "dense")
    dense, _ = load(tmp_path / "dense")
    save(dense, None, prune(dense), tmp_path / "expected")
    with opened(tmp_path / "dense", tmp_path / "pruned") as work:
        assert work.mapped
        report = prune(work.model)
        work.release()
        work.save(report)
    expected, found = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        for name in ("expected", "pruned")
    )
    for (name, a), b in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert a.dtype == dtype and torch.equal(a, b), name
    assert torch.equal(expected(tokens()).logits, found(tokens()).logits)
    assert json.loads((tmp_path / "pruned" / "recipe.json").read_text())["pattern"] == "2:4"
    assert {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir() if p.name in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "expected", "pruned"]
