"""Methods side by side: values are those of pruning by hand, no run is repeated, one that fails spoils no other."""

import csv
import io
import json
import signal
import statistics
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from rich.console import Console

import moonshot as ms
from moonshot.app.compare import _part, show
from moonshot.app.data import pictures
from moonshot.app.variadic import spread
from moonshot.models.evaluation import perplexity
from moonshot.pruning.compare import ComparisonError
from moonshot.pruning.comparison import Comparison, Run
from moonshot.pruning.lock import LockedError, locked
from moonshot.pruning.run_store import RunStoreError
from tests.models import DEMO, decoder, model_folder, network, tokens, weights
from tests.test_cli import run

comparing = import_module("moonshot.pruning.compare")  # the name is that of its function, too
HELD_OUT = torch.randint(1, 61, (4, 16), generator=torch.Generator().manual_seed(9))


def draw(seed):
    return torch.randint(1, 61, (6, 16), generator=torch.Generator().manual_seed(seed))


def measured(model):
    return perplexity(model, HELD_OUT).value


class Picky(ms.Magnitude):
    """A solver that takes one pattern."""

    name = "picky"

    def compute(self, state, pattern):
        if str(pattern) != "2:4":
            raise RuntimeError(f"no {pattern}\nfor me")
        return super().compute(state, pattern)


@pytest.fixture
def pruned(monkeypatch):
    """(seed, pattern) of every call of `prune`."""
    calls, prune = [], comparing.prune

    def counted(model, batches, pattern, **options):
        calls.append((options["seed"], str(pattern)))
        return prune(model, batches, pattern, **options)

    monkeypatch.setattr(comparing, "prune", counted)
    monkeypatch.setattr(comparing, "_check_options", lambda options: None)  # which looks at prune's signature
    return calls


def test_values_are_those_of_pruning_by_hand():
    model = decoder()
    before = weights(model)
    joint = 0.5 * ms.Reconstruction() + 0.5 * ms.Fisher()
    found = ms.compare(
        model,
        draw,
        measured,
        patterns=["2:4", 0.75],
        solvers=[ms.Magnitude(), ms.SparseGPT()],
        objectives={"single": ms.Reconstruction(), "joint": joint},
        seeds=[3, 5],
        factors=4,
        metric="perplexity",
    )
    assert found.methods == ["magnitude", "SparseGPT, single", "SparseGPT, joint"] and found.patterns == [
        "2:4",
        "75%",
    ]
    assert found.dense == measured(model) and all(weights(model)[name].equal(before[name]) for name in before)
    for (name, objective), pattern in product(
        {"single": ms.Reconstruction(), "joint": joint}.items(), ("2:4", "75%")
    ):
        by_hand = []
        for seed in (3, 5):
            copy = decoder()
            options = dict(objective=objective, solver=ms.SparseGPT(), factors=4, seed=seed)
            ms.prune(copy, draw(seed), pattern, **options)
            by_hand.append(measured(copy))
        cell = found.cell(f"SparseGPT, {name}", pattern)
        assert cell.values == by_hand and cell.deviation == pytest.approx(np.std(by_hand, ddof=1))
    best = min(found.methods, key=lambda method: found.cell(method, "2:4").mean)
    assert found.best("2:4") == best and f"**{found.cell(best, '2:4')}**" in str(found)


def test_runs_that_are_done_are_not_repeated(tmp_path, pruned):
    model = decoder()

    def compared(**changes):
        options = dict(patterns=["2:4", "50%"], solvers=ms.SparseGPT(), objectives=ms.Reconstruction(), seeds=2)
        pruned.clear()
        found = ms.compare(model, draw, measured, folder=tmp_path, **options | changes)
        return found, len(pruned)

    def stopped(run, total):
        assert total == 4
        if len(pruned) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(on_run=stopped)
    half = json.loads((tmp_path / "comparison.json").read_text())
    assert len(half["runs"]) == 3
    found, calls = compared()
    assert calls == 1
    assert compared() == (found, 0)
    assert compared(seeds=3)[1] == 2 and compared(patterns="4:8")[1] == 2
    assert compared(dampening_frac=0.02)[1] == 4  # kept apart
    assert compared(objectives=ms.Fisher())[1] == 4
    assert compared() == (found, 0)
    damaged = sorted((tmp_path / "runs").iterdir())[0]
    damaged.write_text(damaged.read_text()[:20])
    (tmp_path / ".comparison.csv-killed").write_text("half")
    assert compared()[0].cell("SparseGPT", "2:4").values == found.cell("SparseGPT", "2:4").values
    assert not (tmp_path / ".comparison.csv-killed").exists()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert compared()[1] == 4


def test_other_calibration_data_and_other_tests_are_kept_apart(tmp_path, pruned):
    held_out = HELD_OUT

    def count(calibration, held_out):
        pruned.clear()
        ms.compare(
            decoder(),
            calibration,
            lambda model: perplexity(model, held_out).value,
            patterns="2:4",
            solvers=ms.Magnitude(),
            folder=tmp_path,
        )
        return len(pruned)

    assert [count(draw(0), held_out), count(draw(0), held_out), count(draw(1), held_out)] == [1, 0, 1]
    assert count(draw(0), held_out[:2]) == 1


def test_a_run_that_fails_says_why_and_is_tried_again(tmp_path, pruned):
    options = dict(patterns=["2:4", "50%"], solvers=[Picky(), ms.Wanda()], folder=tmp_path)
    found = ms.compare(decoder(), draw(0), measured, **options)
    assert str(found.cell("picky", "50%")) == "failed" and len(found.cell("picky", "2:4").values) == 1
    assert len(found.cell("Wanda", "50%").values) == 1
    assert "picky, 50% failed: RuntimeError: no 50% for me" in str(found)
    found.plot(tmp_path / "picture.png")
    pruned.clear()
    ms.compare(decoder(), draw(0), measured, **options)
    assert pruned == [(0, "50%")]
    with pytest.raises(ComparisonError, match="no 50% for me"):
        ms.compare(decoder(), draw(0), measured, patterns="50%", solvers=Picky())


def test_any_torch_module_and_a_measure_of_ones_own(tmp_path):
    model = network()
    batch = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def accuracy(model):
        return float((model(batch[0]).argmax(1) == batch[1]).double().mean())

    found = ms.compare(
        model,
        [batch],
        accuracy,
        patterns=["50%", "2:4"],
        solvers={"size": ms.Magnitude(), "weighed": ms.SparseGPT()},
        objectives=ms.Reconstruction(),
        higher_is_better=True,
        loss=loss,
        folder=tmp_path,
    )
    assert found.methods == ["size", "weighed"] and "divisible by 4, this layer has" in str(found)
    assert found.best("50%") == max(found.methods, key=lambda name: found.cell(name, "50%").mean)
    assert found.best("2:4") is None or found.cell(found.best("2:4"), "2:4").values
    found.plot(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(seeds=0), "1 or more"),
        (dict(seeds=True), "1 or more"),
        (dict(seeds=[]), "1 or more"),
        (dict(factor=3), "did you mean factors"),
        (dict(checkpoint="answers"), "takes no 'checkpoint'"),
        (dict(patterns=["2;4"]), "did you mean 2:4"),
        (dict(solvers=[ms.ADMM(), ms.ADMM()]), "have the same name"),
        (dict(solvers=[]), "there are no methods"),
    ],
)
def test_what_nothing_can_come_of(changes, words):
    options = dict(patterns="2:4", solvers=ms.Magnitude())
    with pytest.raises(ms.MoonshotError, match=words):
        ms.compare(decoder(), tokens(), measured, **options | changes)


def test_a_folder_that_is_somebody_elses(tmp_path):
    def compared(folder):
        return ms.compare(decoder(), tokens(), measured, patterns="2:4", solvers=ms.Magnitude(), folder=folder)

    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunStoreError, match="choose another folder"):
        compared(tmp_path)
    with pytest.raises(RunStoreError, match="is a file"):
        compared(tmp_path / "thesis.tex")
    compared(tmp_path / "new")
    with locked(tmp_path / "new" / "lock", "it"), pytest.raises(LockedError):
        compared(tmp_path / "new")


def comparison(*values, **changes):
    runs = [
        Run("m|e[b]th\x1b[2Jod$", "2:4", seed, value, error="" if value else "why")
        for seed, value in enumerate(values)
    ]
    return Comparison("perplexity", 5.0, runs, **changes)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((6.0,), "6.00"),
        ((6.0, 8.0), f"7.00 ± {statistics.stdev([6, 8]):.2f}"),
        ((6.0, None), "6.00 (1 failed)"),
        ((None, None), "failed"),
        ((1234.5,), "1234"),
        ((3.21e9,), "3.21e+09"),
        ((float("inf"), 6.0), "inf"),
    ],
)
def test_cells_tables_and_files(tmp_path, values, text):
    found = comparison(*values)
    assert str(found.cell(found.methods[0], "2:4")) == text
    found.plot(tmp_path / "picture.png")
    found.save(tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert [row["value"] for row in rows] == ["" if value is None else str(value) for value in values]
    stored = json.loads(
        (tmp_path / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert [each["seed"] for each in stored["runs"]] == list(range(len(values)))
    for ideas in (None, {found.methods[0]: "an idea"}):
        screen = Console(width=40, force_terminal=True, file=io.StringIO())
        show(found, screen, ideas)
        said = screen.file.getvalue()
        assert "\x1b[2J" not in said and "[b]" in said.replace("\n", "")


@pytest.mark.parametrize(
    ("line", "spread_out"),
    [
        ("m --solver a b --data d", "m --solver a --solver b --data d"),
        ("m --solver a --solver b c", "m --solver a --solver b --solver c"),
        ("m --data d e --solver=a", "m --data d e --solver=a"),
        ("--solver", "--solver"),
        ("m --solver a -- b", "m --solver a -- b"),
    ],
)
def test_several_values_after_a_flag(line, spread_out):
    assert list(spread(line.split(), {"--solver"})) == spread_out.split()


def test_the_command_compares_a_language_model(monkeypatch, tmp_path, capsys):
    (tmp_path / "dense").mkdir()
    model = model_folder(tmp_path / "dense", num_hidden_layers=1)
    options = ["--data", DEMO / "heldout.txt", "--nsamples", 4, "--seqlen", 16, "--eval-nsamples", 4]
    methods = [
        "--pattern",
        "2:4",
        "75%",
        "--solver",
        "magnitude",
        "sparsegpt(block=8)",
        "--objective",
        "reconstruction",
    ]
    save = ["--save", tmp_path / "found", "--seeds", 2]
    assert run(monkeypatch, "compare", model, *options, *methods, "fisher", *save) == 0
    said = capsys.readouterr().out
    assert "12 of 12: SparseGPT, fisher, 75%, seed 1" in said and "context 16, 4 windows" in said
    assert "| SparseGPT, reconstruction |" in said and "±" in said
    names = {path.name for path in (tmp_path / "found").iterdir()}
    assert names == {"runs", "comparison.csv", "comparison.json", "comparison.md", "comparison.png"}
    monkeypatch.setattr(comparing, "_run", lambda *_: pytest.fail("a run was repeated"))
    (tmp_path / "run.yaml").write_text(
        "solver: [magnitude, 'sparsegpt(block=8)']\npattern: [2:4, 75%]\nseeds: 2\n"
    )
    config = ["--config", tmp_path / "run.yaml", "--objective", "reconstruction", "fisher"]
    assert run(monkeypatch, "compare", model, *options, *config, "--save", tmp_path / "found", "--quiet") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_command_compares_an_image_classifier(dataset_cache, monkeypatch, tmp_path, capsys, name):
    options = ["--data", f"{DEMO / 'images'}::train", "--nsamples", 8, "--eval-nsamples", 50]
    methods = ["--pattern", "50%", "2:4", "--solver", "magnitude", "--unfit", "skip"]
    assert run(monkeypatch, "compare", DEMO / name, *options, *methods) == 0
    said = capsys.readouterr().out
    assert "accuracy, %, dense " in said and "failed" not in said


def test_an_interrupted_command_says_what_there_is(monkeypatch, tmp_path, capsys):
    (tmp_path / "dense").mkdir()
    model = model_folder(tmp_path / "dense", num_hidden_layers=1)
    calls, prune = [], comparing.prune

    def interrupted(*arguments, on_layer, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return prune(*arguments, on_layer=on_layer, **options)

    monkeypatch.setattr(comparing, "prune", interrupted)
    monkeypatch.setattr(comparing, "_check_options", lambda options: None)
    options = ["--data", DEMO / "heldout.txt", "--nsamples", 4, "--seqlen", 16, "--eval-nsamples", 4]
    methods = ["--pattern", "2:4", "--solver", "magnitude", "wanda", "--save", tmp_path / "found"]
    assert run(monkeypatch, "compare", model, *options, *methods) == 130
    said = capsys.readouterr().err
    assert f"interrupted ({tmp_path / 'found'} has 1 runs: the same command continues from there)" in said


def test_images_to_measure_on_are_no_calibration_images(dataset_cache):
    found = pictures(f"{DEMO / 'images'}::train", None)
    calibration, held_out = (_part(found, held_out=part) for part in (False, True))
    assert len(calibration.names) + len(held_out.names) == len(found.names)
    assert not {*calibration.names} & {*held_out.names}
    assert held_out.read(1).tobytes() == found.read(9).tobytes() and held_out.labels[1] == found.labels[9]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--solver", "spargegpt"], "did you mean sparsegpt?"),
        (["--solver", "admm(growht=2)"], "did you mean growth?"),
        (["--pattern", "2/4"], "did you mean 2:4?"),
        (["--objective", "fischer"], "did you mean fisher?"),
        (["--seeds", "0"], "1 or more"),
        (["--save", DEMO], "choose another folder"),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_looked_for(monkeypatch, capsys, more, words):
    options = ["--data", "nowhere.txt", "--pattern", "2:4"]
    assert run(monkeypatch, "compare", "no/model/here", *options, *more) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
