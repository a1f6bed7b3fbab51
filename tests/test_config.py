"""Options from a file, dry and quiet runs, and what is said of options that nobody knows."""

import subprocess
import sys
import warnings

import pytest
import torch
import yaml

from moonshot.app import cli
from moonshot.files import folder as folders
from tests.models import DEMO, model_folder
from tests.test_cli import image_arguments, run

OPTIONS = {
    "pattern": "2:4",
    "data": str(DEMO / "heldout.txt"),
    "nsamples": 8,
    "seqlen": 16,
    "solver": "magnitude",
    "objective": "reconstruction",
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "dense").mkdir()
    return model_folder(tmp_path / "dense", num_hidden_layers=1)


def config(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return ["--config", tmp_path / "run.yaml"]


def test_a_run_is_repeated_from_the_file_beside_its_model(monkeypatch, tmp_path, model):
    lines = dict(OPTIONS, model=str(model), solver="sparsegpt", objective="0.5 reconstruction + 0.5 fisher")
    lines |= {
        "solver-option": ["block=8"],
        "ignore": "q_proj",
        "refit": True,
        "dampening_frac": 0.02,
        "seed": 5,
    }
    text = yaml.safe_dump(lines)
    assert run(monkeypatch, "prune", *config(tmp_path, text), "--save", tmp_path / "one") == 0
    again = (
        "--config",
        tmp_path / "one" / "run.yaml",
        "--save",
        tmp_path / "two",
        "--html",
        tmp_path / "two.html",
    )
    assert run(monkeypatch, "prune", *again) == 0
    assert run(monkeypatch, "prune", *again[:2], "--save", tmp_path / "other", "--seed", 6) == 0
    one, two, other = (tmp_path / name / "model.safetensors" for name in ("one", "two", "other"))
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    assert (tmp_path / "one" / "run.yaml").read_text() == (tmp_path / "two" / "run.yaml").read_text()
    saved = yaml.safe_load((tmp_path / "one" / "run.yaml").read_text())
    assert saved["solver_option"] == ["block=8"] and saved["seed"] == 5 and "save" not in saved


def test_patterns_need_no_quotes_and_the_command_line_comes_first(monkeypatch, tmp_path, model, capsys):
    text = "pattern: 1:4\ndata: nowhere.txt\nseqlen:\nrefit: no\ntargets: [q_proj, k_proj]\n"
    options = [part for name in ("data", "nsamples", "solver") for part in (f"--{name}", OPTIONS[name])]
    arguments = [model, *config(tmp_path, text), *options, "--save", tmp_path / "out", "--seqlen", 16]
    assert run(monkeypatch, "prune", *arguments) == 0
    said = capsys.readouterr().out
    assert "2 layers, 75.00 %" in said and "refit" not in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patern: 2:4", "line 1: prune has no option 'patern'; did you mean pattern?"),
        (
            "pattern: 2:4\nsolver_options: a=1",
            "line 2: prune has no option 'solver_options'; did you mean solver-option?",
        ),
        ("config: run.yaml", "prune has no option 'config'"),
        ("pattern: [2:4, 1:4]", "line 1: pattern is one value, not a list"),
        ("targets: [[a]]", "has more inside"),
        ("targets: {a: b}", "has more inside"),
        ("nsamples: many", "line 1: nsamples: input should be a valid integer, got 'many'"),
        ("refit: perhaps", "line 1: refit:"),
        ("unfit: leave", "line 1: unfit:"),
        ("seed: 1\nseed: 2", "line 2: seed is there twice"),
        ("- pattern", "is no list of options"),
        ("pattern: [", "cannot be read as YAML"),
        ("[" * 5000, "cannot be read as YAML"),
        ("? [a]\n: b", "the name of an option is a word"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(monkeypatch, tmp_path, capsys, text, words):
    assert run(monkeypatch, "prune", "model", *config(tmp_path, text), "--save", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moonshot: ") and "run.yaml" in line and words in line


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_says_nothing(monkeypatch, tmp_path, capsys, text):
    assert run(monkeypatch, "prune", "model", *config(tmp_path, text), "--save", tmp_path / "out") == 2
    assert "missing option '--data'" in capsys.readouterr().err


def test_a_file_that_is_not_there(monkeypatch, tmp_path, capsys):
    (tmp_path / "run.yaml").touch()
    assert run(monkeypatch, "eval", "--config", tmp_path / "rum.yml") == 1
    assert f"No such file or directory; did you mean {tmp_path / 'run.yaml'}?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "resnet"])
def test_a_dry_run_says_what_it_would_do_and_loads_no_weights(
    dataset_cache, monkeypatch, tmp_path, capsys, model, name
):
    def refused(*arguments, **options):
        raise AssertionError("a model was opened")

    monkeypatch.setattr(folders.Opened, "__init__", refused)
    monkeypatch.setattr(torch.nn.Module, "__call__", refused)
    arguments = [model, *(part for pair in OPTIONS.items() for part in (f"--{pair[0]}", pair[1]))]
    if name == "resnet":
        arguments = [DEMO / "resnet", *image_arguments(tmp_path)]
    (tmp_path / "answers").mkdir()
    more = ["--save", tmp_path / "pruned", "--dry-run", "--checkpoint", tmp_path / "answers"]
    assert run(monkeypatch, "prune", *arguments, *more) == 0
    said = capsys.readouterr().out
    assert "layers in blocks would be pruned to" in said and "nothing was done" in said
    assert ("of memory" in said) == (name == "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "dense"]
    assert run(monkeypatch, "prune", *arguments, *more, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert run(monkeypatch, "prune", *arguments, *more, "--memory", 1e-6) == (name == "model")


def test_quiet_says_only_what_is_wrong(monkeypatch, tmp_path, capfd, model):
    arguments = [model, *(part for pair in OPTIONS.items() for part in (f"--{pair[0]}", pair[1])), "--quiet"]
    capfd.readouterr()  # what making the model said
    assert run(monkeypatch, "prune", *arguments, "--save", tmp_path / "out") == 0
    assert capfd.readouterr() == ("", "")
    assert run(monkeypatch, "prune", *arguments, "--save", tmp_path / "out") == 1
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "exists" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--nsamples", 0], "at least one"),
        (["--seqlen", 1], "2 tokens or more"),
        (["--nsamples", 1, "--refit"], "--refit sets samples aside and needs at least 2"),
        (["--nsamples", 7, "--objective", "auto"], "needs at least 8"),
        (["--html", "report.txt"], "ends with .html"),
        (["--html", "nowhere/report.html"], "there is no folder nowhere"),
        (["--pattern", "2/4"], "did you mean 2:4?"),
        (["--pattern", "0,5"], "did you mean 0.5?"),
        (["--solver", "admm", "--solver-option", "growht=2"], "did you mean growth?"),
        (["--html", "out.html", "--save", "out.html"], "ends with .html"),
    ],
)
def test_what_the_arguments_show_is_said_before_the_model_is_looked_for(
    monkeypatch, tmp_path, capsys, more, words
):
    arguments = [part for pair in OPTIONS.items() for part in (f"--{pair[0]}", pair[1])]
    assert run(monkeypatch, "prune", "no/model/here", *arguments, "--save", tmp_path / "out", *more) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prun"], "no such command 'prun'. Did you mean 'prune'?"),
        (["prune", "m", "--patern", "x"], "no such option: --patern, did you mean --pattern?"),
        (["prune"], "missing argument 'model'"),
        (["prune", "m", "--nsamples"], "--nsamples"),
        (["prune", "m", "--nsamples", "x"], "--nsamples: input should be a valid integer, got 'x'"),
        (["prune", "m", "--unfit", "x"], "--unfit: 'x' is not one of 'error', 'skip'"),
        (["eval", "m", "x"], "unexpected extra argument"),
    ],
)
def test_words_that_cannot_be_read_are_said_in_one_line(monkeypatch, capsys, arguments, words):
    assert run(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moonshot: ") and words in line


def test_without_a_command_there_is_help(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    assert "compare" in capsys.readouterr().out


def test_a_shell_completes_solvers():
    line = {
        "_MOONSHOT_COMPLETE": "complete_bash",
        "COMP_WORDS": "moonshot prune m --solver ma",
        "COMP_CWORD": "4",
    }
    code = "import os, sys; sys.argv = ['moonshot']; os.environ.update(%r); from moonshot.app.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code % line], capture_output=True, text=True)
    assert done.stdout.split() == ["magnitude"], done.stderr


def test_every_option_has_its_place_in_the_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("prune", "compare"):
        assert run(monkeypatch, command, "--help") == 0
        said = capsys.readouterr().out
        place = said.split("─ Options ─")[1].split("╰")[0]
        assert place.count("--") == 1 and "--help" in place and "Examples:" in said


def test_progress_between_layers_is_told(monkeypatch, tmp_path, capsys, model):
    arguments = [model, *(part for pair in OPTIONS.items() for part in (f"--{pair[0]}", pair[1]))]
    more = ["--save", tmp_path / "out", "--objective", "fisher", "--refit"]
    assert run(monkeypatch, "prune", *arguments, *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("gradients") == 1 and lines.count("refit of model.layers.0") == 2  # once a stage
    assert cli.console.is_terminal is False


def test_only_our_own_warnings_are_shown(monkeypatch, capsys):
    def warning(**_):
        for module in ("torch.nn", "moonshot.pruning.checkpoint"):
            warnings.warn_explicit(f"a file of {module} is\ndamaged", UserWarning, "file.py", 1, module)

    monkeypatch.setattr(cli, "app", warning)
    assert run(monkeypatch, "prune") == 0
    assert capsys.readouterr().err == "moonshot: a file of moonshot.pruning.checkpoint is damaged\n"


def test_a_target_that_is_nearly_a_layer(monkeypatch, tmp_path, capsys, model):
    arguments = [model, *(part for pair in OPTIONS.items() for part in (f"--{pair[0]}", pair[1]))]
    assert run(monkeypatch, "prune", *arguments, "--save", tmp_path / "out", "--targets", "q_prj") == 1
    assert "did you mean q_proj?" in capsys.readouterr().err
