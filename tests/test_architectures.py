"""`prune` on many architectures: better than magnitude, or with the reason why not, and nothing else changed."""

import copy

import pytest
import transformers

import moonshot as ms
from benchmarks.architectures import ARCHITECTURES, built, changed_beside, outputs, timm_architectures
from moonshot.models.calibration import CalibrationError

transformers.logging.set_verbosity_error()


def check(architecture):
    model, calibration, held_out = built(architecture, 32 // architecture.size, seed=0)
    dense = outputs(architecture, model, held_out)
    moved = []
    for solver in (ms.Magnitude(), ms.ADMM()):
        pruned = copy.deepcopy(model)
        report = ms.prune(
            pruned, calibration, 0.5, solver=solver, objective=ms.Reconstruction(), **architecture.options
        )
        assert not changed_beside(report, pruned, model)
        moved.append(float((outputs(architecture, pruned, held_out) - dense).norm()))
    assert report.layers and report.sparsity == pytest.approx(0.5, abs=5e-3)
    assert {name.rpartition(".")[2] for name in report.skipped} == architecture.skipped
    assert moved[1] < moved[0]


@pytest.mark.filterwarnings(
    "ignore:Version v4.12.0 introduces:FutureWarning"
)  # of transformers' EncoderDecoder
@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if not each.slow])
def test_an_architecture_is_pruned_better_than_by_magnitude(name):
    check(ARCHITECTURES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.slow])
def test_an_architecture_that_takes_longer_is_pruned_better_than_by_magnitude(name):
    check(ARCHITECTURES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", timm_architectures())
def test_an_architecture_of_timm_is_pruned_better_than_by_magnitude(name):
    check(timm_architectures()[name])


def test_images_of_several_texts_in_a_batch_are_refused():
    model, _, _ = built(ARCHITECTURES["Qwen2-VL"], 1, seed=0)
    with pytest.raises(CalibrationError, match="give batches of one sample each"):
        ms.prune(model, [ARCHITECTURES["Qwen2-VL"].data(2)], 0.5)
