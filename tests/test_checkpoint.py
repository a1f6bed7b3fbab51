"""Runs that are cut short and taken up again."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

import moonshot as ms
from moonshot.models.losses import model_loss
from moonshot.pruning import run
from moonshot.pruning.checkpoint import Checkpoint, CheckpointError, remove
from moonshot.pruning.fingerprint import data_digest, digest, exact
from moonshot.pruning.lock import LockedError
from moonshot.pruning.report import LayerReport, PartReport, Trial
from tests.models import JOINT, decoder, network, tokens, weights

REPORT = LayerReport("a.b", (2, 4), "2:4", 0.5, 0.1, {"reconstruction": 0.1}, 0.0, "converged", 1.5, 0.2)
DENSE = digest([torch.ones(1, 2, 4)])


class Interrupted(Exception):
    pass


def cut_after(layers):
    """An on_layer that stops the run after so many."""
    seen = []

    def on_layer(report, total):
        seen.append(report.name)
        if len(seen) == layers:
            raise Interrupted

    return on_layer


def same(model, other):
    return all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def decoded(dtype):
    return decoder(dtype=dtype, tie_word_embeddings=True)


@pytest.mark.parametrize("layers", [1, 3, 7, 9, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_was_cut_short_ends_as_if_it_had_not_been(tmp_path, dtype, layers):
    work = dict(objective=JOINT, solver=ms.SparseGPT(), checkpoint=tmp_path / "answers")
    whole = decoded(dtype)
    expected = ms.prune(whole, tokens(), "2:4", **(work | {"checkpoint": None}))
    model = decoded(dtype)
    with pytest.raises(Interrupted):
        ms.prune(model, tokens(), "2:4", on_layer=cut_after(layers), **work)
    assert same(model, decoded(dtype))
    names = []
    report = ms.prune(model, tokens(), "2:4", on_layer=lambda layer, total: names.append(layer.name), **work)
    assert same(model, whole)
    assert report.resumed == layers and f"({layers} from the checkpoint)" in str(report)
    assert names == list(report.layers) == list(expected.layers)
    for name, layer in report.layers.items():
        assert (layer.shape, layer.relative, layer.terms) == (
            expected.layers[name].shape,
            expected.layers[name].relative,
            expected.layers[name].terms,
        )


def test_what_is_done_is_not_solved_again(tmp_path, monkeypatch):
    model = decoder()
    with pytest.raises(Interrupted):
        ms.prune(model, tokens(), 0.5, checkpoint=tmp_path, on_layer=cut_after(10))
    solved = []
    solve = run.solve
    monkeypatch.setattr(run, "solve", lambda *args, **kwargs: solved.append(1) or solve(*args, **kwargs))
    ms.prune(model, tokens(), 0.5, checkpoint=tmp_path)
    assert len(solved) == 4


def test_a_network_of_convolutions_and_batch_norm(tmp_path):
    torch.manual_seed(1)
    images, labels = torch.randn(12, 3, 8, 8), torch.randint(0, 5, (12,))
    batches = [{"x": images[:6], "labels": labels[:6]}, {"x": images[6:], "labels": labels[6:]}]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    whole, model = network(), network()
    ms.prune(whole, batches, 0.5, loss=loss)
    with pytest.raises(Interrupted):
        ms.prune(model, batches, 0.5, loss=loss, checkpoint=tmp_path, on_layer=cut_after(1))
    report = ms.prune(model, batches, 0.5, loss=loss, checkpoint=tmp_path)
    assert report.resumed == 1 and same(model, whole)


def test_trials_are_kept(tmp_path, monkeypatch):
    work = dict(objective="auto", solver=ms.SparseGPT(), targets="*.0.mlp.*", checkpoint=tmp_path)
    whole, model = decoder(), decoder()
    expected = ms.prune(whole, tokens(12), 0.5, **(work | {"checkpoint": None}))
    with pytest.raises(Interrupted):
        ms.prune(model, tokens(12), 0.5, on_layer=cut_after(6 * 3 + 1), **work)

    def never(*_):
        raise AssertionError("tried again")

    monkeypatch.setattr(sys.modules["moonshot.pruning.prune"], "best_objective", never)
    report = ms.prune(model, tokens(12), 0.5, **work)
    assert report.resumed == 1 and same(model, whole)
    assert report.trials == expected.trials and report.recipe == expected.recipe


def twice(model, batch):
    return 2 * model_loss(model, batch)


def test_answers_of_a_model_with_another_embedding_are_refused(tmp_path):
    with pytest.raises(Interrupted):
        ms.prune(decoder(), tokens(), "2:4", checkpoint=tmp_path, on_layer=cut_after(2))
    other = decoder()
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="answers of other work, model differ"):
        ms.prune(other, tokens(), "2:4", checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"pattern": "1:4"}, "pattern, patterns"),
        ({"solver": ms.Wanda()}, "solver"),
        ({"seed": 1}, "seed"),
        ({"objective": ms.Reconstruction()}, "objective"),
        ({"calibration": tokens() + 0 * tokens().flip(0).roll(1) + (tokens() == 5)}, "calibration"),
        ({"targets": "*.1.*"}, "patterns, model"),
        ({"bound": True}, "bound"),
        ({"factors": 3}, "factors"),
        ({"batch_norm": False}, "batch_norm"),
        ({"loss": twice}, "loss"),
        ({"solver": ms.SparseGPT(block=64)}, "solver"),
        ({"pattern": ms.Unstructured(0.5000001, "row")}, "pattern, patterns"),
    ],
)
def test_answers_to_other_work_are_refused(tmp_path, change, what):
    model = decoder()
    work = dict(calibration=tokens(), pattern="2:4", solver=ms.SparseGPT(), checkpoint=tmp_path)
    with pytest.raises(Interrupted):
        ms.prune(model, on_layer=cut_after(2), **work)
    before = weights(model)
    with pytest.raises(ValueError, match=f"answers of other work, {what} differ: choose another"):
        ms.prune(model, **(work | change))
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())


def test_answers_for_another_model_are_refused(tmp_path):
    with pytest.raises(Interrupted):
        ms.prune(decoder(), tokens(), "2:4", checkpoint=tmp_path, on_layer=cut_after(2))
    other = decoder()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    before = weights(other)
    with pytest.raises(
        ValueError, match=r"answers of another model, with other weights in .*q_proj or in what is pruned"
    ):
        ms.prune(other, tokens(), "2:4", checkpoint=tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in weights(other).items())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no checkpoint: choose an empty folder"):
        ms.prune(decoder(), tokens(), "2:4", checkpoint=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_path_without_a_name_is_no_folder_for_answers(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="give the name of a folder of their own"):
        Checkpoint(name, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot store answers in .*file.answers.*choose another folder"):
        Checkpoint(tmp_path / "file" / "answers", {})


def test_what_is_kept_is_found_again(tmp_path):
    dense, weight = digest([torch.randn(1, 2, 4)]), torch.randn(2, 4).bfloat16()
    with Checkpoint(tmp_path / "new" / "folder", {"seed": 1}) as first:
        assert first.done == frozenset() and first.trials() is None
        first.store("a/b.c", dense, weight, REPORT)
        first.store_trials("best", [Trial("best", 1.0, 0.5, 0.1)])
    with Checkpoint(tmp_path / "new" / "folder", {"seed": 1}) as again:
        assert again.done == {"a/b.c"} and again.trials() == ("best", [Trial("best", 1.0, 0.5, 0.1)])
        found, report = again.answer("a/b.c", dense, (2, 4))
    assert torch.equal(found, weight) and found.dtype == weight.dtype and report == REPORT
    names = sorted(file.name for file in again.folder.iterdir())
    assert names == ["a%2Fb.c.safetensors", "trials.json", "work.json"]
    assert torch.equal(load_file(again.folder / names[0])["weight"], weight)
    assert json.loads((again.folder / "work.json").read_text()) == {"seed": 1}


def cut_off(file, about):
    return file[:-3]


def flipped(file, about):
    return file[:-1] + bytes([file[-1] ^ 1])


def made_of(weight, report=REPORT):
    """A file that is sound but for what it holds."""

    def made(file, about):
        parts = {"report": json.dumps(asdict(report)), "before": about["before"]}
        return save({"weight": weight}, parts | {"digest": digest([*parts.values(), weight])})

    return made


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        flipped,
        lambda file, about: b"",
        lambda file, about: save({"weight": torch.ones(2, 4)}),
        made_of(torch.full((2, 4), torch.nan)),
        made_of(torch.ones(4, 2)),
    ],
    ids=["cut off", "a bit flipped", "empty", "no metadata", "NaN", "another shape"],
)
def test_a_damaged_answer_is_said_and_not_used(tmp_path, damage):
    with Checkpoint(tmp_path, {}) as checkpoint:
        for name in ("layer", "other"):
            checkpoint.store(name, DENSE, torch.ones(2, 4), REPORT)
    file = tmp_path / "layer.safetensors"
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    file.write_bytes(damage(file.read_bytes(), about))
    with (
        pytest.warns(UserWarning, match=r"layer.safetensors is damaged: the layer is solved again"),
        Checkpoint(tmp_path, {}) as again,
    ):
        assert again.done == {"other"}


def test_nothing_is_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    with Checkpoint(tmp_path / "answers", {}) as checkpoint:
        for name in ("layer.safetensors", "layer.partial", "trials.partial"):
            (tmp_path / "answers" / name).symlink_to(precious)
        checkpoint.store("layer", DENSE, torch.ones(2, 4), REPORT)
        checkpoint.store_trials("best", [])
    with Checkpoint(tmp_path / "answers", {}) as again:
        assert again.done == {"layer"}
    assert precious.read_text() == "mine"


def test_a_pipe_is_not_waited_for(tmp_path):
    with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.store("layer", DENSE, torch.ones(2, 4), REPORT)
    (tmp_path / "layer.safetensors").unlink()
    for name in ("layer.safetensors", "trials.json", "part.refit"):
        os.mkfifo(tmp_path / name)
    with pytest.warns(UserWarning, match="layer.safetensors is damaged"), Checkpoint(tmp_path, {}) as again:
        assert again.done == frozenset()
        with pytest.warns(UserWarning, match="trials.json is damaged"):
            assert again.trials() is None
        with pytest.warns(UserWarning, match="part.refit is damaged"):
            assert again.part("part", DENSE, [torch.Size((2,))]) is None
    (tmp_path / "work.json").unlink()
    os.mkfifo(tmp_path / "work.json")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        Checkpoint(tmp_path, {})


def test_a_refit_of_other_shapes_is_not_used(tmp_path):
    """Rows would be copied to the places of several."""
    shapes, report = [torch.Size((2, 4))], PartReport("part", 1.0, 0.5, 1.0, 0.5, 3, 0.1)
    with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.store_part("part", DENSE, [torch.ones(1, 4)], report)
        with pytest.warns(UserWarning, match="part.refit is damaged: the part is refitted again"):
            assert checkpoint.part("part", DENSE, shapes) is None
        checkpoint.store_part("part", DENSE, [torch.zeros(2, 4)], report)
        (found,), _ = checkpoint.part("part", DENSE, shapes)
        assert torch.equal(found, torch.zeros(2, 4))


def test_a_run_solves_a_damaged_layer_again(tmp_path):
    whole, model = decoder(), decoder()
    work = dict(solver=ms.SparseGPT(), targets="*.0.mlp.*")
    ms.prune(whole, tokens(), "2:4", **work)
    with pytest.raises(Interrupted):
        ms.prune(model, tokens(), "2:4", checkpoint=tmp_path, on_layer=cut_after(2), **work)
    file = next(tmp_path.glob("*up_proj.safetensors"))
    file.write_bytes(flipped(file.read_bytes(), None))
    with pytest.warns(UserWarning, match="up_proj.safetensors is damaged"):
        report = ms.prune(model, tokens(), "2:4", checkpoint=tmp_path, **work)
    assert report.resumed == 1 and same(model, whole)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "", '{"found": 1}', '{"found": ["a", []], "digest": ""}', "[" * 10**5],
)
def test_damaged_trials_are_made_again(tmp_path, text):
    with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.store_trials("best", [Trial("best", 1.0, 0.5, 0.1)])
        (tmp_path / "trials.json").write_text(text)
        with pytest.warns(UserWarning, match="trials.json is damaged: objectives are tried again"):
            assert checkpoint.trials() is None


@pytest.mark.parametrize("text", ["[]", "null", "", "{"])
def test_a_damaged_description_of_the_work_is_no_checkpoint(tmp_path, text):
    (tmp_path / "work.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no checkpoint: choose an empty folder"):
        Checkpoint(tmp_path, {})


def test_what_a_kill_left_of_the_first_file_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "work.partial").write_text("{")
    with Checkpoint(tmp_path, {"seed": 1}) as checkpoint:
        assert checkpoint.done == frozenset()
    assert json.loads((tmp_path / "work.json").read_text()) == {"seed": 1}


def test_a_second_process_is_told_at_its_start(tmp_path):
    with (
        Checkpoint(tmp_path, {}),
        pytest.raises(LockedError, match=f"by process {os.getpid()} on"),
    ):
        Checkpoint(tmp_path, {})
    with Checkpoint(tmp_path, {}):
        pass  # free again


def test_a_folder_may_be_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)  # not there yet
    for done in (frozenset(), {"layer"}):
        with Checkpoint(tmp_path / "link", {}) as checkpoint:
            assert checkpoint.done == done
            checkpoint.store("layer", DENSE, torch.ones(2, 4), REPORT)
    assert (tmp_path / "elsewhere" / "layer.safetensors").exists()


def scaled_by(factor):
    return lambda model, batch: factor * model(**batch).loss


@dataclass
class Scaled:
    factor: float

    def __call__(self, model, batch):
        return self.factor * model(**batch).loss


def test_fingerprints_tell_apart_what_differs():
    start = torch.ones(2, 4)
    things = [
        0.3 * ms.Fisher() + 0.7 * ms.Reconstruction(),
        0.3000001 * ms.Fisher() + 0.6999999 * ms.Reconstruction(),
        ms.Unstructured(0.5),
        ms.Unstructured(0.5 + 1e-12),
        ms.Unstructured(0.5, "row"),
        ms.IHT(),
        ms.IHT(start=start),
        ms.IHT(start=start + 1e-7),
        scaled_by(1.0),
        scaled_by(2.0),
        lambda model, batch: model(**batch).loss,
        lambda model, batch: 2 * model(**batch).loss,
        Scaled(1.0),
        Scaled(1.0 + 1e-15),
        partial(scaled_by, 1.0),
    ]
    found = [json.dumps(exact(thing, "thing")) for thing in things]
    assert len(set(found)) == len(things)
    assert found[8] == json.dumps(exact(scaled_by(1.0), "thing"))


def test_what_cannot_be_compared_is_refused(tmp_path):
    handle = object()

    def loss(model, batch):
        return model_loss(model, batch) if handle else None

    with pytest.raises(TypeError, match="the loss holds a object, which a checkpoint cannot compare"):
        ms.prune(decoder(), tokens(), "2:4", loss=loss, checkpoint=tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


def test_data_digests():
    batches = [{"ids": torch.arange(6).reshape(2, 3), "mask": None}, (torch.ones(2, dtype=torch.bfloat16),)]
    changed = [{"ids": torch.arange(6).reshape(3, 2), "mask": None}, batches[1]]
    retyped = [batches[0], (torch.ones(2, dtype=torch.float16),)]
    digests = [data_digest(data) for data in (batches, changed, retyped, batches[::-1], [])]
    assert len(set(digests)) == len(digests)
    assert data_digest([dict(batches[0]), batches[1]]) == digests[0]


def test_only_a_checkpoints_own_files_are_removed(tmp_path):
    work = {"patterns": {"model.layers.0.k_proj": "2:4", "a/b": "2:4"}}
    folder = tmp_path / "answers"
    checkpoint = Checkpoint(folder, work)
    for name in work["patterns"]:
        checkpoint.store(name, DENSE, torch.ones(2, 4), REPORT)
    checkpoint.store_trials("best", [])
    ours = ["model.layers.0.refit", "model.layers.0.partial", "work.partial"]
    theirs = ["model.safetensors.index.json", "other.safetensors", "notes.txt", "x.partial"]
    for name in ours + theirs:
        (folder / name).write_text("")
    (folder / "out").mkdir()
    (tmp_path / "link").symlink_to(folder)
    remove(tmp_path / "link")
    remove(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*theirs, "out"])
    Checkpoint(tmp_path / "other", work)
    remove(tmp_path / "other")
    assert not (tmp_path / "other").exists()
