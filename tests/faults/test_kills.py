"""kill -9 at random times: the same command goes on, and ends as if nothing had happened."""

import shutil
import time

import pytest

from tests.faults.runs import Run, generator, names
from tests.models import DEMO, model_folder

KILLS = 8
WAYS = {
    "magnitude": [],
    "wanda": [],
    "sparsegpt": [],
    "admm": [],
    "iht": [],
    "obs": [],
    "swaps": [],
    "sparsegpt with refit": ["--refit"],
    "sparsegpt with allocate": ["--allocate"],
    "sparsegpt by auto": ["--objective", "auto"],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.parametrize("way", WAYS)
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, dense, way):
    options = ["--pattern", "50%", "--solver", way.split()[0], *WAYS[way], "--nsamples", 8, "--seqlen", 16]
    command = ["prune", dense, "--data", DEMO / "heldout.txt", *options, "--save"]
    work, said = tmp_path / "work", tmp_path / "said"
    work.mkdir()
    assert Run([*command, tmp_path / "first"], said).end() == 0, said.read_text()
    begin = time.monotonic()
    assert Run([*command, tmp_path / "whole"], said).end() == 0
    seconds = time.monotonic() - begin
    command += [work / "out", "--checkpoint", work / "answers"]
    moment, killed, ended = generator(way), 0, 0
    while killed < KILLS:
        running = Run(command, said)
        if running.kill_after(moment.uniform(0, 1.1 * seconds)):
            killed += 1
            assert "out" not in names(work) or (work / "out" / "model.safetensors").exists()
        else:
            assert running.end() == 0, said.read_text()
            ended += 1
            assert_same(work, tmp_path / "whole")
    assert Run(command, said).end() == 0, said.read_text()
    assert_same(work, tmp_path / "whole")
    print(f"{way}: killed {killed} times, ended {ended + 1} times, as it should each time")


def assert_same(work, whole):
    """That there is nothing but a folder as that of a run that nothing happened to; remove it."""
    assert names(work) == ["out"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (work / "out" / name).read_bytes() == (whole / name).read_bytes(), name
    shutil.rmtree(work / "out")
