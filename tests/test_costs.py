"""What large models would take on paper: measured figures as they were measured, and others by rule from them."""

import json

import pytest

import moonshot as ms
from benchmarks import costs
from benchmarks.gpu.models import llama
from moonshot.files.plan import Layer

MEASURED = costs.Rates(1.0, None, costs.MEASURED_LAYERS)
BLOCK = [Layer(4096, 4096, "a"), Layer(14336, 4096, "b"), Layer(14336, 4096, "b"), Layer(4096, 14336, "c")]


@pytest.mark.parametrize("solver", ["SparseGPT", "ADMM"])
def test_measured_layers_take_what_they_took(solver):
    for (m, d), seconds in costs.MEASURED_LAYERS[solver].items():
        for n, took in seconds.items():
            assert MEASURED.solve(solver, m, d, n) == pytest.approx(took)


def test_columns_count_for_more_than_rows():
    rates = costs.Rates(1.0, None, {"SparseGPT": {(8, 4): {0: 1.0}, (64, 8): {0: 5.0}}})
    assert rates.solve("SparseGPT", 64, 4, 0) == pytest.approx(costs.sweep(64, 4, 0) / costs.sweep(8, 4, 0))


def test_between_measured_factors_time_is_linear_and_beyond_it_grows_with_the_work():
    layers = {"SparseGPT": {(8, 4): {0: 1.0, 16: 3.0}}, "ADMM": {(8, 4): {16: 3.0}}}
    rates = costs.Rates(1.0, None, layers)
    assert rates.solve("SparseGPT", 8, 4, 4) == pytest.approx(1.5)
    assert rates.solve("SparseGPT", 8, 4, 32) == pytest.approx(
        3 * costs.sweep(8, 4, 32) / costs.sweep(8, 4, 16)
    )
    assert rates.solve("ADMM", 8, 4, 4) == pytest.approx(3 * costs.admm(8, 4, 4) / costs.admm(8, 4, 16))


# seconds by one early version on one H100, 16 factors, and what it took for 4096 x 4096
@pytest.mark.parametrize(
    "solver, shape, took, square",
    [
        ("SparseGPT", (14336, 4096), 0.35, 0.107),
        ("SparseGPT", (4096, 14336), 0.87, 0.107),
        ("SparseGPT", (8192, 8192), 0.59, 0.107),
        ("ADMM", (14336, 4096), 3.05, 0.887),
        ("ADMM", (4096, 14336), 5.10, 0.887),
        ("ADMM", (8192, 8192), 4.16, 0.887),
    ],
)
def test_larger_layers_took_no_longer_than_the_rule_says(solver, shape, took, square):
    rates = costs.Rates(1.0, None, {solver: {(4096, 4096): {16: square}}})
    assert 0.35 < took / rates.solve(solver, *shape, 16) < 1.1


def test_the_layers_of_a_model_took_no_longer_than_the_rule_says():
    """Eight blocks of 1B's widths by ADMM: 9.46 s on one H100, by the version that timed ADMM's layers."""
    counts = costs.counted(llama("1B's widths", 8, "meta"), 32, 1024, 16)
    seconds = sum(costs.solving(MEASURED, ms.ADMM(), block, counts.rank, 1) for block in counts.blocks)
    assert 9.46 < seconds < 2 * 9.46


def test_gpus_share_layers_and_rows():
    card = costs.assumed(50)
    alone = costs.solving(card, ms.ADMM(), BLOCK, 16, 1)
    assert alone == pytest.approx(sum(card.solve("ADMM", m, d, 16) for m, d, _ in BLOCK))
    whole = card.solve("ADMM", 4096, 14336, 16)
    together = costs.solving(card, ms.ADMM(), BLOCK, 16, 8)
    assert alone / 8 < together < whole  # the largest layer is solved by all of them


def test_the_measured_model_takes_what_it_took():
    ((widths, blocks, samples, length), took), *_ = costs.MEASURED_MODELS.items()
    card = costs.rates(costs.MEASURED_MODELS, costs.MEASURED_LAYERS)
    model = llama(widths, blocks, "meta")
    counts = costs.counted(model, samples, length, 16)
    assert counts.multiplications / card.passes == pytest.approx(took[costs.WHOLE])
    assert took[costs.WHOLE] + card.moving * costs.size(model) == pytest.approx(took[costs.BY_PARTS])


def test_a_record_gives_its_rates():
    layers = [
        {"group": "4096 x 4096", "name": name, "seconds": seconds, "gibibytes": 1.0, "note": ""}
        for name, seconds in {"SparseGPT": 0.5, "SparseGPT, n = 16": 1.0, "ADMM, n = 16": 2.0}.items()
    ]
    late = {
        "group": "8192 x 8192",
        "name": "ADMM, n = 16",
        "seconds": None,
        "gibibytes": None,
        "note": "no time",
    }
    small, wide = (costs.model_group(*model) for model in costs.MODELS)
    models = [
        {"group": small, "name": costs.WHOLE, "seconds": 4.046},
        {"group": small, "name": costs.BY_PARTS, "seconds": 6.417},
        {"group": wide, "name": costs.WHOLE, "seconds": 8.0},
    ]
    card = costs.from_record({"layers": [*layers, late], "models": models})
    assert card.layers == {"SparseGPT": {(4096, 4096): {0: 0.5, 16: 1.0}}, "ADMM": {(4096, 4096): {16: 2.0}}}
    assert card.moving == costs.rates(costs.MEASURED_MODELS, {}).moving
    widths, blocks, samples, length = costs.MODELS[1]
    counts = costs.counted(llama(widths, blocks, "meta"), samples, length, 16)
    assert card.passes == pytest.approx(counts.multiplications / 8)


def test_a_record_with_too_few_figures_is_refused(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"card": "a card", "layers": []}))
    with pytest.raises(SystemExit):
        costs.main(["--measured", str(path)])
    assert "no figure of a model" in capsys.readouterr().err


def test_an_assumed_rate_is_that_of_everything():
    card = costs.assumed(50)
    assert card.passes == 25e12
    assert card.solve("ADMM", 512, 2048, 4) == pytest.approx(costs.admm(512, 2048, 4) / 25e12)
