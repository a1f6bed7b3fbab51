"""The plug-ins of docs/extending.md: checked, used from Python, and by name on the command line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moonshot as ms
from every_solver import SOLVERS
from moonshot.app import cli
from moonshot.checks import check_objective, check_pattern, check_solver
from moonshot.files import plan as planning
from moonshot.models.adapter import Adapter
from strategies import random_layer
from tests.examples.blocks import Blocks
from tests.examples.diagonal_saliency import DiagonalSaliency
from tests.examples.half_blocks import HalfBlocks
from tests.examples.own_layers import Projection, ProjectionAdapter
from tests.examples.salient_inputs import SalientInputs
from tests.models import decoder, tokens

DEMO = Path(ms.__file__).parent / "demo"


def test_they_keep_the_promises_of_their_kind():
    check_solver(DiagonalSaliency(), ["2:4", 0.5])
    check_objective(SalientInputs(0.5))
    check_pattern(Blocks(0.5))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_blocks_or_says_what_is_missing(name):
    problem, pattern = random_layer(0, 8, 12, 2, 1e2).problem, Blocks(0.5)
    if name in ("SparseGPT", "OBS", "Swaps", "Exact"):
        with pytest.raises(
            ms.solvers.NotSupportedError, match="has no `groups.shape. -> .size, zeros.`; ADMM, IHT"
        ):
            ms.solve(problem, pattern, SOLVERS[name])
        return
    result = ms.solve(problem, pattern, SOLVERS[name])
    assert result.sparsity == 0.5
    if name in ("ADMM", "IHT"):
        assert result.value <= ms.solve(problem, pattern, ms.Magnitude()).value


class Recorded(ms.Unstructured):
    """Notes the scores that it is asked for."""

    def keep(self, scores):
        self.seen.append(np.asarray(scores))
        return super().keep(scores)


@pytest.mark.parametrize("name", ["Magnitude", "Wanda", "ADMM", "IHT"])
def test_scores_are_squares(name):
    """Twice the weights are four times the cost, so that the costs of a block's weights add up."""
    layer = random_layer(0, 4, 8, 0, 1e2)
    seen = []
    for factor in (1.0, 3.0):
        weight = layer.weight.copy()
        weight[0, 0] *= factor
        pattern = Recorded(0.5)
        object.__setattr__(pattern, "seen", [])
        ms.solve(ms.Problem(weight, ms.RowHessian(layer.A)), pattern, SOLVERS[name])
        scores = pattern.seen[0]
        seen.append(scores[0, 0] / scores[1, 1])
    assert seen[1] / seen[0] == pytest.approx(9)


def test_a_term_with_inputs_and_gradients_is_the_same_in_a_model_as_by_hand():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, bias=False)
    model = nn.Sequential(layer, nn.Tanh())
    x, target = torch.randn(4, 6), torch.randn(4, 3)

    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    weight = layer.weight.detach().clone()
    gradients = []
    for s in range(4):
        (gradient,) = torch.autograd.grad(loss(model, (x[s : s + 1], target[s : s + 1])), layer.weight)
        gradients.append(gradient)
    term = SalientInputs(0.5)
    expected = ms.solve(term.problem(weight, inputs=x, gradients=torch.stack(gradients)), 0.5, ms.SparseGPT())
    batches = [(x[:1], target[:1]), (x[1:], target[1:])]
    report = ms.prune(model, batches, 0.5, objective=term, solver=ms.SparseGPT(), loss=loss)
    torch.testing.assert_close(layer.weight.detach(), expected.weight)
    assert report.recipe["objective"] == "SalientInputs(power=0.5)"
    assert list(report.layers["0"].terms) == ["SalientInputs(power=0.5)"]


def test_two_terms_of_one_class_are_two_terms():
    model = decoder()
    report = ms.prune(model, tokens(), "2:4", objective=SalientInputs(0.25) + SalientInputs(1.0))
    (layer, *_) = report.layers.values()
    assert list(layer.terms) == ["SalientInputs(power=0.25)", "SalientInputs(power=1.0)"]


def test_layers_of_a_kind_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(Projection(8, 12), nn.ReLU(), Projection(12, 4))
    x = torch.randn(64, 8)

    def loss(model, batch):
        return model(batch).square().mean()

    with pytest.raises(ValueError, match="has no .* layer to prune"):
        ms.prune(model, x, "2:4", loss=loss)
    dense = model(x).detach()
    report = ms.prune(model, x, "2:4", loss=loss, adapter=ProjectionAdapter())
    assert list(report.layers) == ["0", "2"]
    kernel = model[0].kernel.detach()
    assert ((kernel.T.reshape(12, 2, 4) != 0).sum(2) == 2).all()
    assert (model(x) - dense).norm() < 0.5 * dense.norm()


def test_parts_of_ones_own_see_what_was_pruned_before_them():
    models = [decoder(), decoder()]
    reports = [
        ms.prune(model, tokens(), "2:4", objective=ms.Reconstruction(), solver=ms.SparseGPT(), adapter=adapter)
        for model, adapter in zip(models, (None, HalfBlocks()), strict=True)
    ]
    assert list(reports[0].layers) == list(reports[1].layers)
    first = "model.layers.0."
    for name, module in models[0].named_modules():
        if name not in reports[0].layers or not name.startswith(first):
            continue
        same = torch.equal(module.weight, models[1].get_submodule(name).weight)
        assert same is ("self_attn" in name), name  # the MLP has seen other inputs


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (lambda model: [], "finds no parts in LlamaForCausalLM"),
        (
            lambda model: [("model.layers.0", model.model.layers[1])],
            "is not what the model has under that name",
        ),
        (lambda model: [("model", model.model), ("model.norm", model.model.norm)], "overlap: model.norm"),
        (
            lambda model: [(f"model.layers.{k}", model.model.layers[k]) for k in (1, 0)],
            "part 'model.layers.0' runs before 'model.layers.1'",
        ),
    ],
)
def test_an_adapters_mistakes_are_named(parts, words):
    class Wrong(ms.GraphAdapter):
        def parts(self, model, run):
            return parts(model)

    model = decoder()
    with pytest.raises(ValueError, match=words):
        ms.prune(model, tokens(), "2:4", adapter=Wrong())
    with pytest.raises(TypeError, match="adapter must be an instance"):
        ms.prune(model, tokens(), "2:4", adapter=Wrong)
    with pytest.raises(TypeError, match="abstract"):
        Adapter()


def test_layers_in_no_part_of_an_adapter_are_skipped_with_a_word():
    class Second(ms.GraphAdapter):
        def parts(self, model, run):
            return [("model.layers.1", model.model.layers[1])]

    report = ms.prune(decoder(), tokens(), "2:4", objective=ms.Reconstruction(), adapter=Second())
    assert all(name.startswith("model.layers.1.") for name in report.layers)
    first = {name for name in report.skipped if name.startswith("model.layers.0.")}
    assert len(first) == len(report.layers)
    assert set(report.skipped.values()) == {"it is in none of the adapter's parts"}
    assert first == set(report.skipped), "the head is left alone anyway"


def test_all_of_them_by_name_on_the_command_line(monkeypatch, tmp_path, capsys):
    pattern = "tests.examples.blocks:Blocks(sparsity=0.25, height=4)"
    arguments = [
        "--data",
        DEMO / "calibration.txt",
        "--nsamples",
        4,
        "--seqlen",
        64,
        "--save",
        tmp_path / "out",
    ]
    arguments += [
        "--pattern",
        pattern,
        "--targets",
        "*.0.*",
        "--adapter",
        "tests.examples.half_blocks:HalfBlocks",
    ]
    arguments += [
        "--objective",
        "0.5 reconstruction + 0.5 tests.examples.salient_inputs:SalientInputs(power=0.25)",
    ]
    arguments += [
        "--solver",
        "tests.examples.diagonal_saliency:DiagonalSaliency",
        "--solver-option",
        "power=0.5",
    ]
    monkeypatch.setattr(sys, "argv", ["moonshot", "prune", *map(str, [DEMO / "model", *arguments])])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["solver"] == "DiagonalSaliency(power=0.5)"
    assert report["recipe"]["objective"] == "0.5 Reconstruction + 0.5 SalientInputs(power=0.25)"
    assert report["recipe"]["pattern"] == "25% of 4 x 2 blocks" and report["sparsity"] == 0.25


PLUG_INS = """
class Nameless:
    def unsupported(self, problem, pattern): return None
    def init(self, problem): return problem
    def compute(self, problem, pattern): return problem.weight

class Returning(Nameless):
    name = "returning"

class Raising(Returning):
    def __init__(self, kind="OSError"): self.kind = kind
    def compute(self, problem, pattern): raise __builtins__[self.kind]("mine")
"""


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ("plugged:Nameless", "plugged:Nameless is no solver: it is missing name; docs/extending.md says"),
        ("plugged:Returning", "returning returned Tensor: compute must return a moonshot.Answer"),
        ("lacking:Any", "cannot import lacking: No module named 'not_installed'\n"),
        ("nowhere.at.all:Any", "the file nowhere/at/all.py must be in"),
        (
            "{}/plugged.py:Any",
            "is no module's name: write it as Python imports it, plugged:Any, with its folder",
        ),
    ],
)
def test_what_is_wrong_with_one_of_ones_own_is_said(monkeypatch, tmp_path, capsys, solver, words):
    with pytest.raises(SystemExit, match="1"):
        run_plugged(monkeypatch, tmp_path, solver)
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [OSError, ImportError, MemoryError, TypeError, ValueError, ZeroDivisionError])
def test_what_a_plug_in_raises_is_a_traceback(monkeypatch, tmp_path, kind):
    with pytest.raises(kind, match="mine"):
        run_plugged(monkeypatch, tmp_path, "plugged:Raising", "--solver-option", f"kind={kind.__name__}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") in ([], ["__pycache__"])


def run_plugged(monkeypatch, tmp_path, solver, *more):
    (tmp_path / "plugged.py").write_text(PLUG_INS)
    (tmp_path / "lacking.py").write_text("import not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugged", raising=False)
    arguments = ["--solver", solver.replace("{}", str(tmp_path)), "--pattern", "2:4", "--targets", "*.0.mlp.*"]
    arguments += [
        "--data",
        DEMO / "calibration.txt",
        "--nsamples",
        2,
        "--seqlen",
        16,
        "--save",
        tmp_path / "out",
    ]
    arguments += ["--objective", "reconstruction", *more]
    monkeypatch.setattr(planning, "_solver_seconds", lambda *_: 1.0)
    monkeypatch.setattr(sys, "argv", ["moonshot", "prune", *map(str, [DEMO / "model", *arguments])])
    cli.main()
