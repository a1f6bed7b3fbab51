"""What the documentation claims of the methods on the shipped Llama, over seeds of the calibration data."""

from statistics import mean

import pytest

import moonshot as ms
from moonshot.app.demo import compare
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE

METHODS = [
    ("SparseGPT", ms.SparseGPT(), ms.Reconstruction()),
    ("single", ms.ADMM(), ms.Reconstruction()),
    ("joint", ms.ADMM(), DEFAULT_OBJECTIVE),
]


def test_joint_beats_single():
    """By a tenth, on calibration data that takes seconds."""
    found = compare(("80%",), METHODS[1:], samples=32, context=128, held_out=16)
    single, joint = (row.perplexities["80%"] for row in found.rows)
    assert found.dense.value < joint < single


@pytest.mark.slow
def test_admm_beats_the_sweep_and_joint_beats_single():
    runs = [compare(("70%", "80%"), METHODS, held_out=32, seed=seed) for seed in range(3)]
    for pattern in ("70%", "80%"):
        sweep, single, joint = (
            mean(run.rows[k].perplexities[pattern] for run in runs) for k in range(len(METHODS))
        )
        assert runs[0].dense.value < joint < single < sweep
