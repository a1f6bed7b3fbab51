"""The command line, end to end on the shipped model, and its errors in one line."""

import json
import os
import re
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification

import moonshot
from moonshot.app import cli, demo
from moonshot.errors import MoonshotError
from moonshot.files import plan as planning
from moonshot.models.offload import Offload
from moonshot.pruning import auto
from moonshot.pruning import run as pruning_run

DEMO = Path(moonshot.__file__).parent / "demo"


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["moonshot", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def prune_arguments(tmp_path, **changes):
    options = {
        "--pattern": "2:4",
        "--data": DEMO / "calibration.txt",
        "--save": tmp_path / "pruned",
        "--solver": "sparsegpt",
        "--nsamples": 4,
        "--seqlen": 64,
    } | {f"--{name}": value for name, value in changes.items()}
    return [part for option in options.items() if option[1] is not None for part in option]


def test_prune_then_eval(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path)) == 0
    folder = tmp_path / "pruned"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    report = json.loads((folder / "report.json").read_text())
    assert len(report["layers"]) == 28 and report["sparsity"] == 0.5
    for name in report["layers"]:
        assert (model.get_submodule(name).weight.reshape(-1, 4).count_nonzero(1) <= 2).all()
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert weights == (DEMO / "model" / "model.safetensors").stat().st_size
    assert json.loads((folder / "recipe.json").read_text())["pattern"] == "2:4"
    assert (
        run(monkeypatch, "eval", folder, "--data", DEMO / "heldout.txt", "--seqlen", 64, "--nsamples", 4) == 0
    )
    assert "context 64, 4 windows" in capsys.readouterr().out


def test_prune_says_how_far_from_the_optimum_it_is(monkeypatch, tmp_path, capsys):
    layer = "model.layers.0.self_attn.k_proj"
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path, targets=layer), "--bound") == 0
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    assert list(report["layers"]) == [layer] and 0 < report["layers"][layer]["gap"] < 1
    assert "gap <= %" in capsys.readouterr().out


def test_prune_refits_and_saves_what_that_gives(monkeypatch, tmp_path, capsys):
    arguments = prune_arguments(tmp_path, targets="*.layers.3.mlp.*", nsamples=8)
    assert run(monkeypatch, "prune", DEMO / "model", *arguments, "--refit") == 0
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    ((name, part),) = report["parts"].items()
    assert name == "model.layers.3" and part["aside_after"] < part["aside_before"]
    assert "Refit(" in report["recipe"]["refit"] and "\nrefit " in capsys.readouterr().out
    dense = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="auto").state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto").state_dict()
    changed = {key.removeprefix("model.layers.3.") for key in dense if not torch.equal(dense[key], saved[key])}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert changed == norms | {f"mlp.{key}_proj.weight" for key in ("gate", "up", "down")}
    assert (saved["model.layers.3.mlp.up_proj.weight"].reshape(-1, 4).count_nonzero(1) <= 2).all()


def test_prune_shares_the_zeros_among_layers(monkeypatch, tmp_path, capsys):
    arguments = prune_arguments(tmp_path, pattern=None, sparsity=0.5, targets="*.layers.3.*", nsamples=8)
    assert run(monkeypatch, "prune", DEMO / "model", *arguments, "--allocate") == 0
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert report["recipe"]["pattern"] == "50%" and report["recipe"]["budget"]
    assert report["trials"][0]["name"] == "even"
    assert "tried even" in capsys.readouterr().out


def test_prune_mixes_patterns(monkeypatch, tmp_path):
    choices = ["--choice", "1:4", "--choice", "2:4", "--choice", "0"]
    arguments = prune_arguments(tmp_path, pattern="50%", targets="*.layers.3.*", nsamples=8)
    assert run(monkeypatch, "prune", DEMO / "model", *arguments, "--allocate", *choices) == 0
    layers = json.loads((tmp_path / "pruned" / "report.json").read_text())["layers"]
    assert {layer["pattern"] for layer in layers.values()} <= {"1:4", "2:4", "0%"}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(choice="2:4"), "add --allocate"),
        (dict(sparsity=0.7), "contradict"),
        (dict(pattern=None), "--sparsity 0.5"),
        (dict(pattern="2;4"), "cannot read the pattern"),
        (dict(pattern="3:7"), "divisible by 7"),
        (dict(objective="0.5 fischer"), "did you mean fisher?"),
        (dict(solver="spargegpt"), "did you mean sparsegpt?"),
        (dict(nsamples=10**7), "give more text"),
        (dict(seqlen=1025), "the model has 1024 positions"),
        (dict(targets="nothing"), "matches no layer"),
        (dict(ignore="nothing"), "matches no layer"),
        (dict(save=DEMO), "exists"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys, changes, words):
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path, **changes)) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("moonshot:")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_a_traceback(monkeypatch):
    def broken(**_):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(TypeError, match="unsupported operand"):
        run(monkeypatch, "prune")


@pytest.mark.parametrize("place", [0, 1])
def test_debug_is_a_traceback_for_a_mistake_too(monkeypatch, place):
    arguments = ["prune", DEMO / "model", "--data", "nowhere.txt", "--save", "pruned"]
    arguments.insert(place, "--debug")
    with pytest.raises(MoonshotError, match="say how much to prune"):
        run(monkeypatch, *arguments)


def test_data_that_is_not_text(monkeypatch, tmp_path, capsys):
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe\xff")
    assert run(monkeypatch, "eval", DEMO / "model", "--data", tmp_path / "data.txt") == 1
    assert "not UTF-8" in capsys.readouterr().err
    (tmp_path / "data.txt").write_text("  ")
    assert run(monkeypatch, "eval", DEMO / "model", "--data", tmp_path / "data.txt") == 1
    assert "holds no text" in capsys.readouterr().err


def dataset(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(path / "validation.parquet")
    return f"{path}::validation"


def test_data_by_a_datasets_name(monkeypatch, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    text = (DEMO / "calibration.txt").read_text()
    data = dataset(tmp_path / "set", id=["a", "b", "c"], text=[text[:20000], None, text[20000:40000]])
    (tmp_path / "same.txt").write_text(text[:20000] + "\n\n" + text[20000:40000])
    said = []
    for source in (data, tmp_path / "same.txt"):
        assert run(monkeypatch, "eval", DEMO / "model", "--data", source, "--nsamples", 4) == 0
        said.append(re.search(r"perplexity.*", capsys.readouterr().out).group())
    assert said[0] == said[1]
    arguments = prune_arguments(tmp_path, data=data)
    assert run(monkeypatch, "prune", DEMO / "model", *arguments) == 0
    assert json.loads((tmp_path / "pruned" / "recipe.json").read_text())["pattern"] == "2:4"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"id": [1, 2]}, "has no column of text, its columns are id"),
        ({"text": [None, "", " "]}, "holds no text"),
        ({"title": ["too", "short"]}, "the text has"),
    ],
)
def test_a_dataset_without_enough_text(monkeypatch, tmp_path, capsys, columns, words):
    (tmp_path / "set").mkdir()
    data = dataset(tmp_path / "set", **columns)
    assert run(monkeypatch, "eval", DEMO / "model", "--data", data) == 1
    assert words in capsys.readouterr().err


def image_folder(path):
    for name in ("A", "7"):
        (path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "white").save(path / name / "0.png")
    return path


def empty_folder(path):
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_eval_of_an_image_classifier(dataset_cache, monkeypatch, tmp_path, capsys, name):
    assert run(monkeypatch, "eval", DEMO / name, "--data", f"{DEMO / 'images'}::test", "--nsamples", 200) == 0
    found = re.search(r"accuracy ([0-9.]+) % \(200 images\)", capsys.readouterr().out)
    assert float(found[1]) > 96
    folder = image_folder(tmp_path / "images")
    (folder / "A" / "1.png").write_bytes(b"no image")
    assert run(monkeypatch, "eval", DEMO / name, "--data", folder) == 0
    output = capsys.readouterr().out.replace("\n", "")
    assert (
        "(2 images)" in output and "1 broken images skipped" in output and str(folder / "A" / "1.png") in output
    )


def image_arguments(tmp_path, **changes):
    options = {
        "pattern": "50%",
        "data": f"{DEMO / 'images'}::train",
        "save": tmp_path / "pruned",
        "solver": "magnitude",
        "objective": "reconstruction",
        "nsamples": 64,
        "seqlen": None,
    }
    return prune_arguments(tmp_path, **options | changes)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_prune_then_eval_of_an_image_classifier(dataset_cache, monkeypatch, tmp_path, capsys, name):
    assert run(monkeypatch, "prune", DEMO / name, *image_arguments(tmp_path)) == 0
    folder = tmp_path / "pruned"
    model = AutoModelForImageClassification.from_pretrained(folder, dtype="auto")
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(DEMO / name).to_dict()
    recipe, report = (json.loads((folder / f"{file}.json").read_text()) for file in ("recipe", "report"))
    assert recipe == report["recipe"]
    for layer, about in report["layers"].items():
        assert (model.get_submodule(layer).weight == 0).float().mean() == pytest.approx(about["sparsity"])
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert recipe["samples"] == 64 and recipe["broken_images"] == 0
    estimated = name == "resnet"
    assert ("batch_norm" in recipe) is estimated
    assert ("batch norm: estimated again" in capsys.readouterr().out) is estimated
    data = f"{DEMO / 'images'}::test"
    assert run(monkeypatch, "eval", folder, "--data", data, "--nsamples", 200) == 0
    found = re.search(r"accuracy ([0-9.]+) % \(200 images\)", capsys.readouterr().out)
    assert float(found[1]) > 80


def test_prune_on_a_folder_with_a_broken_image(monkeypatch, tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    (folder / "A" / "1.png").write_bytes(b"no image")
    assert run(monkeypatch, "prune", DEMO / "resnet", *image_arguments(tmp_path, data=folder, nsamples=2)) == 0
    assert f"1 broken images skipped: {folder / 'A' / '1.png'}" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "pruned" / "recipe.json").read_text())
    assert (recipe["samples"], recipe["broken_images"]) == (2, 1)


def test_the_seed_chooses_the_images_that_prune_reads(dataset_cache, monkeypatch, tmp_path):
    found = []
    for seed in (0, 0, 1):
        save = tmp_path / str(len(found))
        arguments = image_arguments(
            tmp_path, save=save, seed=seed, nsamples=4, targets="re:.*embedder.convolution"
        )
        assert run(monkeypatch, "prune", DEMO / "resnet", *arguments) == 0
        found.append(
            load_file(save / "model.safetensors")["resnet.embedder.embedder.normalization.running_mean"]
        )
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(seqlen=64), "--seqlen is tokens of text"),
        (dict(nsamples=0), "at least one image"),
        (dict(nsamples=513), "has 512 images; 513 needed: give more, or lower nsamples"),
        (dict(data=DEMO / "heldout.txt"), "is a file: give a folder"),
        (dict(data=DEMO / "vit"), "has no sub-folders"),
        (dict(pattern="2:4", targets="re:.*embedder.convolution"), "needs a number of inputs divisible by 4"),
        (dict(targets="nothing"), "matches no layer"),
        (dict(save=DEMO), "exists"),
    ],
)
def test_a_mistake_with_images_is_one_line_and_leaves_nothing(
    dataset_cache, monkeypatch, tmp_path, capsys, changes, words
):
    assert run(monkeypatch, "prune", DEMO / "resnet", *image_arguments(tmp_path, **changes)) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("moonshot:")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_eval_of_an_image_classifier_has_no_seqlen(monkeypatch, capsys):
    assert run(monkeypatch, "eval", DEMO / "vit", "--data", DEMO / "images", "--seqlen", 64) == 1
    assert "--seqlen is tokens of text" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_model_that_is_not_there(monkeypatch, tmp_path, capsys, command):
    data = image_folder(tmp_path / "images")
    options = ["--pattern", "2:4", "--save", tmp_path / "pruned"] if command == "prune" else []
    assert run(monkeypatch, command, tmp_path / "missing", "--data", data, *options) == 1
    assert f"no such folder: {tmp_path / 'missing'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda path: image_folder(path / "images" / "inside").parent, "the model has no class inside"),
        (lambda path: image_folder(path / "images") / "A", "has no sub-folders"),
        (lambda path: DEMO / "heldout.txt", "is a file"),
        (lambda path: empty_folder(path / "images"), "has no sub-folders"),
        (lambda path: empty_folder(path / "images" / "A").parent, "0 images; 1 needed: give more"),
        (lambda path: path / "missing", "is no file, folder or loadable dataset"),
    ],
)
def test_data_that_is_no_images(monkeypatch, tmp_path, capsys, data, words):
    assert run(monkeypatch, "eval", DEMO / "resnet", "--data", data(tmp_path)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moonshot:")]
    assert len(lines) == 1 and words in lines[0]


def test_compare_counts_every_method(monkeypatch, tmp_path):
    from moonshot.app.demo import METHODS, compare

    result = compare(("70%",), samples=8, context=64, held_out=8)
    values = {method: result.cell(method, "70%").mean for method in METHODS}
    assert result.methods == list(METHODS)
    assert result.dense < values["ADMM"] < values["SparseGPT"] < values["magnitude"]
    result.plot(tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_says_how_far_it_is(monkeypatch, tmp_path, capsys):
    setting, compare = demo.setting, demo.Setting.compare
    one = {"magnitude": demo.METHODS["magnitude"]}
    monkeypatch.setattr(demo, "setting", lambda samples: setting(samples, 32, 2))
    monkeypatch.setattr(demo.Setting, "compare", lambda self, **more: compare(self, ["2:4"], one, **more))
    assert run(monkeypatch, "demo", "--save", tmp_path) == 0
    assert "1 of 1: magnitude, 2:4" in capsys.readouterr().out and (tmp_path / "demo.png").exists()


def test_prune_says_what_it_takes_and_keeps_on_disk_what_does_not_fit(monkeypatch, tmp_path, capsys):
    plans, folders = [], []

    def just_too_little(device, most):
        return plans[-1].memory + plans[-1].offloaded - 1

    def remembered(*arguments, **more):
        plans.append(plan(*arguments, **more))
        return plans[-1]

    def recorded(self, folder=None, **more):
        folders.append(folder)
        made(self, folder, **more)

    plan, made = planning.plan, Offload.__init__
    monkeypatch.setattr(planning, "plan", remembered)
    monkeypatch.setattr(planning, "free_memory", just_too_little)
    monkeypatch.setattr(Offload, "__init__", recorded)
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path)) == 0
    assert str(plans[0]) in capsys.readouterr().out
    assert folders and all(folder.name.startswith(".pruned-") for folder in folders)
    monkeypatch.setattr(planning, "free_memory", lambda device, most: 2**60)
    folders.clear()
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path, save=tmp_path / "other")) == 0
    assert folders and not any(folders)
    files = [tmp_path / name / "model.safetensors" for name in ("pruned", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "pruned"]


def test_what_auto_takes_is_said_with_its_trials(monkeypatch, tmp_path):
    trials, plan = [], planning.plan
    monkeypatch.setattr(planning, "plan", lambda *a, **k: (trials.append(k["trials"]), plan(*a, **k))[1])
    for number, objective in enumerate(("auto", "reconstruction")):
        more = dict(objective=objective, targets="*.0.mlp.*", nsamples=8, save=tmp_path / str(number))
        assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path, **more)) == 0
    assert trials == [len(auto.CANDIDATES), 0]
    assert len(json.loads((tmp_path / "0" / "report.json").read_text())["trials"]) == len(auto.CANDIDATES)


@pytest.mark.parametrize(("given", "policy"), [(None, "passive"), ("active", "active")])
def test_torchs_threads_sleep_unless_they_are_told_otherwise(monkeypatch, given, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")  # put back afterwards
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen = []
    monkeypatch.setattr(cli, "app", lambda **_: seen.append(os.environ["OMP_WAIT_POLICY"]))
    assert run(monkeypatch) == 0
    assert seen == [policy]


def test_a_run_that_was_cut_short_goes_on(monkeypatch, tmp_path, capsys):
    options = prune_arguments(tmp_path, targets="*.0.*", checkpoint=tmp_path / "answers")
    calls = []
    solve = pruning_run.solve

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return solve(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pruning_run, "solve", interrupted)
        assert run(patch, "prune", DEMO / "model", *options) == 130
    said = f"nothing was saved, but {tmp_path / 'answers'} has the answers of 2 layers, from which the same command"
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]
    assert len(list((tmp_path / "answers").glob("*.safetensors"))) == 2
    assert run(monkeypatch, "prune", DEMO / "model", *options) == 0
    assert "7 layers (2 from the checkpoint)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    whole = tmp_path / "whole"
    assert (
        run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path, targets="*.0.*", save=whole)) == 0
    )
    assert (whole / "model.safetensors").read_bytes() == (
        tmp_path / "pruned" / "model.safetensors"
    ).read_bytes()


def test_a_checkpoint_that_does_not_fit_on_the_disk(monkeypatch, tmp_path, capsys):
    used = namedtuple("usage", "total used free")(2**30, 2**30, 1000)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda folder: used)
    options = prune_arguments(tmp_path, checkpoint=tmp_path / "answers")
    assert run(monkeypatch, "prune", DEMO / "model", *options) == 1
    assert "choose a folder on another disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_what_the_run_will_write(monkeypatch, tmp_path, capsys):
    """For a model's weights there is space, for a second time, in a checkpoint or beside compact ones, there is not."""
    weights = (DEMO / "model" / "model.safetensors").stat().st_size
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * weights // 2))
    options = prune_arguments(tmp_path)
    for flags in (["--compact"], ["--checkpoint", tmp_path / "answers"]):
        assert run(monkeypatch, "prune", DEMO / "model", *options, *flags, "--dry-run") == 1
        assert "choose a folder on another disk" in capsys.readouterr().err
    assert run(monkeypatch, "prune", DEMO / "model", *options, "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []


def test_prune_refuses_what_does_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(planning, "free_memory", lambda device, most: 1000)
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path)) == 1
    assert "take fewer factors" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path, memory=0.01)) == 1
    err = capsys.readouterr().err
    assert "0 MiB are free" in err and "(--memory 0.01 counts what this process has taken already)" in err
    monkeypatch.setattr(planning, "free_memory", lambda device, most: 2**60)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert run(monkeypatch, "prune", DEMO / "model", *prune_arguments(tmp_path)) == 1
    assert "on another disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
