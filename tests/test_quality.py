"""What the documentation claims of the methods on the shipped Llama, over seeds of the calibration data."""

import pytest

import moonshot as ms
from moonshot.app.demo import compare
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE

METHODS = {
    "SparseGPT": (ms.SparseGPT(), ms.Reconstruction()),
    "single": (ms.ADMM(), ms.Reconstruction()),
    "joint": (ms.ADMM(), DEFAULT_OBJECTIVE),
}


def test_joint_beats_single():
    """By a tenth, on calibration data that takes seconds."""
    methods = {name: METHODS[name] for name in ("single", "joint")}
    found = compare(("80%",), methods, samples=32, context=128, held_out=16)
    single, joint = (found.cell(name, "80%").mean for name in methods)
    assert found.dense < joint < single


@pytest.mark.slow
def test_admm_beats_the_sweep_and_joint_beats_single():
    found = compare(("70%", "80%"), METHODS, held_out=32, seeds=3)
    for pattern in ("70%", "80%"):
        sweep, single, joint = (found.cell(name, pattern).mean for name in METHODS)
        assert found.dense < joint < single < sweep
