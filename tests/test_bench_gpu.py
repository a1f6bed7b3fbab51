"""The GPU's benchmark, on the CPU as far as it goes there: every row has a figure, and a hole says why."""

import json

import pytest
import torch
from torch.nn import Linear

import moonshot as ms
from benchmarks import costs, profile_prune
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import models, phases, sparse
from benchmarks.gpu.layers import time_layer
from benchmarks.gpu.models import plain_sparsegpt, time_model, time_reference, time_refit
from benchmarks.gpu.rows import Rows


def test_every_row_of_a_layer_has_a_figure(monkeypatch):
    rows = Rows("cpu", 600.0, say=lambda row: None)
    time_layer(rows, 8, 16)
    assert [row.name for row in rows.all if row.seconds is None] == []
    assert {
        "torch SparseGPT",
        "SparseGPT, n = 16",
        "ADMM",
        "IHT, n = 16",
        "OBS",
        "OBS, n = 16",
        "lower_bound",
    } <= {row.name for row in rows.all}
    monkeypatch.setattr(costs, "LAYERS", ((8, 16),))
    assert all(set(of_solver[8, 16]) == {0, 16} for of_solver in costs.layer_seconds(rows.all).values())


def test_every_row_of_a_model_has_a_figure(monkeypatch):
    pruned = []

    def spied(model, calibration):
        plain_sparsegpt(model, calibration)
        layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
        pruned.extend(float((layer.weight == 0).float().mean()) for layer in layers)

    monkeypatch.setattr(models, "plain_sparsegpt", spied)
    rows = Rows("cpu", 600.0, say=lambda row: None)
    time_model(rows, "tiny", 2, 2, 16)
    time_refit(rows, "tiny", 2, 2, 16)
    time_reference(rows, "tiny", 2, 2, 16)
    assert [row.note for row in rows.all if row.seconds is None] == []
    assert len(rows.all) == 7
    assert pruned == [0.5] * 14 + [0.0]  # all but the head
    monkeypatch.setattr(costs, "MODELS", (("tiny", 2, 2, 16),))
    assert {costs.WHOLE, costs.BY_PARTS} <= set(costs.model_seconds(rows.all)["tiny", 2, 2, 16])


def test_both_kinds_of_blocks_run_for_every_length(monkeypatch):
    monkeypatch.setattr(sparse, "TOKENS", (2, 512))
    monkeypatch.setattr(sparse, "to_semi_structured", lambda model: (["all"], {}))
    rows = Rows("cpu", 600.0, say=lambda row: None)
    sparse.time_sparse(rows, "tiny", 1)
    assert [(row.name, row.note) for row in rows.all] == [("dense", ""), ("2:4", "")] * 2


def test_halved_layers_are_2_to_4():
    layer = Linear(8, 6)
    sparse._halve(layer)
    ms.NM(2, 4).check(layer.weight.detach().numpy() != 0)


def test_what_fails_or_comes_too_late_is_a_row_that_says_so():
    rows = Rows("cpu", 600.0, say=lambda row: None)
    rows.time("layer", "broken", lambda: 1 / 0, 1)
    late = Rows("cpu", -1.0, say=lambda row: None)
    late.time("layer", "late", lambda: pytest.fail("begun"), 1)
    assert "ZeroDivisionError" in rows.all[0].note and "no time left" in late.all[0].note


def test_failed_tests_are_named(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="fine"/>'
        '<testcase classname="a" name="wrong"><failure/></testcase>'
        '<testcase classname="a" name="elsewhere"><skipped/></testcase></testsuite></testsuites>'
    )
    assert command.summary(report) == {"passed": 1, "failed": ["a::wrong"], "skipped": 1}
    assert "no report" in command.summary(tmp_path / "none.xml")["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="No GPU"):
        command.main(["--output", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_what_was_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "card", lambda: "a card, 80 GiB")
    monkeypatch.setattr(command, "free", lambda: None)
    monkeypatch.setattr(command, "LAYERS", ((4, 8),))
    monkeypatch.setattr(command, "Rows", lambda device, limit, say: Rows("cpu", limit, say))
    command.main(["--parts", "layers", "--output", str(tmp_path / "new" / "gpu.json")])
    written = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert written["card"] == "a card, 80 GiB" and written["versions"]["torch"] and "tests" not in written
    assert {row["group"] for row in written["layers"]} == {"4 x 8"}


def test_a_phase_is_timed_without_those_inside_of_it(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    waits = []
    clock = phases.Clock(lambda: waits.append(None))

    class Owner:
        def inside(self):
            return "answer"

    clock.watch(Owner, "inside")
    with clock.phase("outside"):
        assert Owner().inside() == "answer"
    assert dict(clock.seconds) == {"Owner.inside": 3.0, "outside": 7.0} and len(waits) == 4


def test_everything_that_is_timed_is_called(monkeypatch):
    monkeypatch.setattr(phases, "setattr", monkeypatch.setattr, raising=False)  # undone at the end
    clock, watched = phases.Clock(), []
    for functions in (phases.PHASES, *profile_prune.PARTS.values()):
        watched += phases.watch_all(clock, functions)
    for solver in (ms.SparseGPT(), ms.ADMM()):
        watched += phases.watch_all(clock, {}, solver)
        ms.prune(models.llama("tiny", 2, "cpu"), models.tokens("tiny", 4, 8), "2:4", solver=solver, refit=True)
    assert [name for name in watched if not clock.times[name]] == []
