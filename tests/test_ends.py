"""How a run of the command line ends, whatever the user, the terminal and the system do; in a second where it can."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from moonshot.app import cli
from moonshot.files import folder as folders
from moonshot.pruning import checkpoint
from moonshot.pruning import run as pruning_run
from moonshot.pruning.lock import locked
from tests.models import DEMO, model_folder
from tests.test_cli import run


@pytest.fixture
def arguments(tmp_path):
    """Of a run of a second, everything it reads in a folder of its own."""
    with tempfile.TemporaryDirectory() as dense:
        model_folder(Path(dense), num_hidden_layers=1)
        options = ["--pattern", "2:4", "--solver", "magnitude", "--objective", "reconstruction"]
        options += ["--data", DEMO / "heldout.txt", "--nsamples", 4, "--seqlen", 16]
        yield ["prune", dense, *options, "--save", tmp_path / "out"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def at_layer(patch, number, action):
    """Do something before a layer is solved."""
    calls, solve = [], pruning_run.solve

    def solved(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            action()
        return solve(*arguments, **options)

    patch.setattr(pruning_run, "solve", solved)


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "hung up")],
)
def test_a_signal_cleans_up_and_says_what_there_is(monkeypatch, tmp_path, capsys, arguments, sent, code, word):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    at_layer(monkeypatch, 3, lambda: signal.raise_signal(getattr(signal, sent)))
    answers = tmp_path / "answers"
    assert run(monkeypatch, *arguments, "--checkpoint", answers) == code
    said = (
        f"moonshot: {word} (nothing was saved, but {answers} has the answers of 2 layers, from which the same "
    )
    said += (
        f"command continues: {shlex.join(['moonshot', *map(str, arguments), '--checkpoint', str(answers)])})"
    )
    assert said in capsys.readouterr().err
    assert names(tmp_path) == ["answers"]
    assert {number: signal.getsignal(number) for number in before} == before
    monkeypatch.undo()
    assert run(monkeypatch, *arguments, "--checkpoint", answers) == 0
    assert names(tmp_path) == ["out"] and "(2 from the checkpoint)" in capsys.readouterr().out


def test_an_interrupted_run_without_a_checkpoint_hears_of_it(monkeypatch, tmp_path, capsys, arguments):
    at_layer(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    assert run(monkeypatch, *arguments) == 130
    assert "interrupted (nothing was saved; with --checkpoint FOLDER" in capsys.readouterr().err


def test_a_hang_up_that_is_ignored_stays_so(monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_layer(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGHUP))
        assert run(monkeypatch, *arguments) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert names(tmp_path) == ["out"]


def test_the_same_command_is_done_already(monkeypatch, tmp_path, capsys, arguments):
    command = [*arguments, "--checkpoint", tmp_path / "answers"]

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", killed)
        assert run(patch, *command) == 130
    assert names(tmp_path) == ["answers", "out"]
    before = (tmp_path / "out" / "report.json").read_bytes()
    (tmp_path / "answers" / "notes.txt").write_text("mine")
    for _ in range(2):
        assert run(monkeypatch, *command) == 0
        assert f"done already: {tmp_path / 'out'}" in capsys.readouterr().out.replace("\n", "")
    assert names(tmp_path) == ["answers", "out"] and names(tmp_path / "answers") == ["notes.txt"]
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert run(monkeypatch, *command, "--seed", 1) == 1
    assert "out exists" in capsys.readouterr().err


def test_what_is_done_is_done_for_the_same_files(monkeypatch, tmp_path, capsys, arguments):
    data, elsewhere = tmp_path / "here" / "texts", tmp_path / "elsewhere" / "texts"
    for folder in (data, elsewhere):
        folder.mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text((DEMO / "heldout.txt").read_text()[:20000])
    command = [*arguments, "--data", "texts", "--checkpoint", tmp_path / "answers"]

    def assert_done(whether):
        assert run(monkeypatch, *command) == 1 - whether
        said = capsys.readouterr()
        assert ("done already" in said.out) == whether and ("out exists" in said.err) != whether

    monkeypatch.chdir(data.parent)
    assert run(monkeypatch, *command) == 0
    assert_done(True)
    monkeypatch.chdir(elsewhere.parent)
    assert_done(False)
    monkeypatch.chdir(data.parent)
    assert_done(True)
    (data / "b.txt").rename(data / "b.md")
    assert_done(False)
    (data / "b.md").rename(data / "b.txt")
    assert_done(False)  # it may be another
    shutil.rmtree(tmp_path / "out")
    assert run(monkeypatch, *command) == 0
    assert_done(True)
    config = Path(arguments[1]) / "config.json"
    config.write_text(config.read_text())
    assert_done(False)


def test_a_checkpoint_of_other_work_is_refused_at_once(monkeypatch, tmp_path, capsys, arguments):
    answers = ["--checkpoint", tmp_path / "answers"]
    with monkeypatch.context() as patch:
        at_layer(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert run(patch, *arguments, *answers) == 130
    capsys.readouterr()
    (tmp_path / "other.txt").write_text((DEMO / "heldout.txt").read_text()[::-1])
    assert run(monkeypatch, *arguments, *answers, "--data", tmp_path / "other.txt") == 1
    said = capsys.readouterr().err
    assert "calibration differ: choose another folder" in said and "continues from there" not in said
    monkeypatch.setattr("moonshot.app.prune.opened", lambda *_, **__: pytest.fail("opened"))
    for change, what in {
        ("--pattern", "50%"): "pattern",
        ("--seed", 1): "seed",
        ("--refit",): "refit",
        ("--solver", "wanda"): "solver",
        ("--solver", "admm", "--solver-option", "rho=0.5"): "solver",
        ("--checkpoint", arguments[1]): "is no checkpoint",
    }.items():
        assert run(monkeypatch, *arguments, *answers, *change) == 1
        said = capsys.readouterr().err
        assert (f"other work, {what} differ" if what != "is no checkpoint" else what) in said
        assert "continues from there" not in said


def test_a_closed_output_does_not_end_a_run(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from moonshot.app.cli import main; sys.argv[0] = 'moonshot'; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0 and names(tmp_path) == ["out"]


def test_a_second_run_is_told_at_its_start(monkeypatch, tmp_path, capsys, arguments):
    with locked(tmp_path / ".out.lock", "out"):
        monkeypatch.setattr(folders, "_mapped", lambda *_: pytest.fail("copied"))
        assert run(monkeypatch, *arguments) == 1
    assert f"out is being written to by process {os.getpid()}" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_what_moonshot_wrote_is_replaced_on_demand(monkeypatch, tmp_path, capsys, arguments):
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments) == 1
    assert "add --overwrite" in capsys.readouterr().err
    first = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert run(monkeypatch, *arguments, "--seed", 1, "--overwrite") == 0
    assert names(tmp_path) == ["out"]
    second = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert (first["seed"], second["seed"]) == (0, 1) and second["command"].endswith("--seed 1 --overwrite")
    assert "as large and as fast as the dense model" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--memory", 0], "--memory is GiB that pruning may take, more than 0"),
        (["--memory", -3], "--memory is GiB"),
        (["--memory", "nan"], "--memory is GiB"),
        (["--solver", "admm", "--solver-option", "growth=abc"], "growth must be a number, got 'abc'"),
        (["--solver", "admm", "--solver-option", "growth=nan"], "growth must be above 1"),
        (["--solver", "admm", "--solver-option", "tolerance=None"], "tolerance must be a number, got None"),
        (["--factors", 0], "factors must be a positive integer"),
        (["--dampening-frac", -0.1], "dampening_frac must be a number of 0 or more"),
        (["--dampening-frac", "nan"], "dampening_frac must be a number of 0 or more"),
        (["--seed", -1], "--seed is a number from 0"),
        (["--nsamples", 0], "--nsamples is at least one image or window of text"),
        (["--seqlen", 65], "the model has 64 positions"),
        (["--nsamples", 10**8], "give more text"),
        (
            ["--pattern", "2:5"],
            "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj",
        ),
        (["--targets", "nothing"], "matches no layer"),
        (["--data", ""], "the data has no name: give a text file"),
        (["--save", ""], "cannot save to '.': give the name of a folder to write"),
        (["--checkpoint", ""], "cannot store answers in '.': give the name of a folder of their own"),
        (["--checkpoint", ".."], "cannot store answers in '..': give the name"),
        (
            ["--allocate", "--nsamples", 8],
            "--allocate shares out a fraction of zeros, such as --sparsity 0.5, not 2:4",
        ),
        (["--pattern", "1:3"], "(--unfit skip)"),
        (
            ["--solver", "sparsegpt", "--pattern", "tests.examples.blocks:Blocks(sparsity=0.5)"],
            "SparseGPT cannot prune model.layers.0.self_attn.q_proj to 50% of",
        ),
        (["--allocate", "--nsamples", 8, "--choice", "2;4"], "cannot read the pattern"),
        (["--data", "{}/gone.txt"], "is no file, folder or loadable dataset"),
        (["--checkpoint", "{}"], "--save {}/out and --checkpoint {} must be folders apart"),
        (["--checkpoint", "{}/out/deep/er"], "must be folders apart"),
        (["--checkpoint", "{}/out"], "must be folders apart"),
    ],
)
def test_what_the_arguments_tell_is_said_before_weights_are_read(
    monkeypatch, tmp_path, capsys, arguments, changes, words
):
    monkeypatch.setattr("moonshot.app.prune.opened", lambda *_, **__: pytest.fail("opened"))
    changes = [str(change).replace("{}", str(tmp_path)) for change in changes]
    assert run(monkeypatch, *arguments, *changes) == 1
    assert words.replace("{}", str(tmp_path)) in capsys.readouterr().err
    assert names(tmp_path) == []


def test_nothing_of_others_is_deleted(monkeypatch, tmp_path, capsys, arguments):
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "thesis.tex").write_text("years")
    assert run(monkeypatch, *arguments[:-1], tmp_path / "ck" / "out", "--checkpoint", tmp_path / "ck") == 1
    (tmp_path / "link").symlink_to(tmp_path / "ck")
    assert run(monkeypatch, *arguments[:-1], tmp_path / "link" / "out", "--checkpoint", tmp_path / "ck") == 1
    assert capsys.readouterr().err.count("must be folders apart") == 2
    dense = arguments[1]
    assert run(monkeypatch, *arguments[:-1], dense, "--overwrite") == 1
    assert "must be folders apart" in capsys.readouterr().err
    assert names(tmp_path / "ck") == ["thesis.tex"]


def test_a_file_that_is_no_text_is_named(monkeypatch, tmp_path, capsys, arguments):
    data = tmp_path / "texts"
    data.mkdir()
    (data / "a.txt").write_text("fine")
    (data / "b.txt").write_bytes(b"caf\xe9")
    assert run(monkeypatch, *arguments, "--data", data) == 1
    assert f"{data / 'b.txt'} is not UTF-8 text: byte 3 is 0xe9; convert it" in capsys.readouterr().err


def test_names_cannot_steer_the_terminal(monkeypatch, tmp_path, capsys):
    images = tmp_path / "images"
    for name in ("A", "7"):
        (images / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(images / name / "0.png")
    for name in ("\x1b[31m[red]x\n\u202e.png", "\udcff.png"):
        (images / "A" / name).write_bytes(b"no image")
    assert run(monkeypatch, "eval", DEMO / "resnet", "--data", images) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said and len(said.splitlines()) == 2
    assert r"A/\x1b[31m[red]x \u202e.png" in said and r"A/\udcff.png" in said
    (images / "[bold]\x1b[2J").mkdir()
    Image.new("L", (8, 8)).save(images / "[bold]\x1b[2J" / "0.png")
    assert run(monkeypatch, "eval", DEMO / "resnet", "--data", images) == 1
    assert r"the model has no class [bold]\x1b[2J" in capsys.readouterr().err


def test_what_looks_like_markup_is_printed(monkeypatch, tmp_path, capsys, arguments):
    out = tmp_path / "[" / "b]"  # together [/b], which ends what was never begun
    assert run(monkeypatch, *arguments[:-1], out) == 0
    assert f"saved: {out}" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="no file can be made in Linux's /proc")
def test_a_place_that_cannot_be_written_to(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments[:-1], "/proc/out") == 1
    said = capsys.readouterr().err
    assert "no file can be made in /proc: " in said and "choose another folder" in said


def test_a_full_disk_is_found_before_anything_is_copied(monkeypatch, tmp_path, capsys, arguments):
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: used._replace(free=1000))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: pytest.fail("copied"))
    assert run(monkeypatch, *arguments) == 1
    assert "choose a folder on another disk" in capsys.readouterr().err and names(tmp_path) == []


def test_a_tokenizer_of_another_model(monkeypatch, tmp_path, capsys, arguments):
    dense = Path(arguments[1])
    weights = load_file(dense / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text()) | {"vocab_size": 100}
    (dense / "config.json").write_text(json.dumps(config))
    assert run(monkeypatch, *arguments) == 1
    assert "has more tokens than the model's 100: they do not belong together" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_running_out_of_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", partial("{0:>{1}}".format, "x", 2**62))
    assert run(monkeypatch) == 1
    assert capsys.readouterr().err == "moonshot: out of memory\n"
