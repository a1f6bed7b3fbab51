"""Disks that are full at any moment: one line, nothing half written, and with more space the same command goes on."""

import shutil
import subprocess
from pathlib import Path

import pytest

from moonshot.files import plan as planning
from tests.faults.runs import Run, generator, names
from tests.models import DEMO, model_folder


@pytest.fixture
def disk(tmp_path):
    """A function that gives a file system so many KiB, with what is in it."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(kib):
        how = ["remount,", []] if place.is_mount() else ["", ["-t", "tmpfs", "tmpfs"]]
        command = ["mount", "-o", f"{how[0]}size={kib}k", *how[1], place]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small tmpfs cannot be mounted here")
        return place

    yield sized
    subprocess.run(["umount", place], capture_output=True)


@pytest.mark.parametrize("looked", [True, False], ids=["looked at before", "found out"])
def test_a_disk_of_any_size(tmp_path, disk, monkeypatch, looked):
    if not looked:
        monkeypatch.setattr(planning, "check_disk", lambda needed: None)
        monkeypatch.setattr("moonshot.files.folder.check_disk", lambda needed: None)
    dense = model_folder(tmp_path / "dense")
    size = (dense / "model.safetensors").stat().st_size // 1024
    said, place = tmp_path / "said", disk(10 * size)
    command = ["prune", dense, "--data", DEMO / "heldout.txt", "--pattern", "2:4", "--solver", "sparsegpt"]
    command += ["--nsamples", 8, "--seqlen", 16, "--checkpoint", place / "answers", "--save", place / "out"]
    assert Run(command, said).end() == 0, said.read_text()
    expected = (place / "out" / "model.safetensors").read_bytes()
    sizes = generator("disk", looked)
    refused = 0
    for _ in range(12):
        for left in place.iterdir():
            shutil.rmtree(left)
        disk(max(int(size * sizes.uniform(0.05, 2)), 16))
        code = Run(command, said).end()
        lines = [line for line in said.read_text().splitlines() if line.startswith("moonshot:")]
        if code:
            refused += 1
            assert code == 1 and len(lines) == 1 and "Traceback" not in said.read_text(), said.read_text()
            assert set(names(place)) <= {"answers"}
            disk(10 * size)
            assert Run(command, said).end() == 0, said.read_text()
        assert names(place) == ["out"]
        assert (place / "out" / "model.safetensors").read_bytes() == expected
    assert refused
    print(
        f"12 disks, {refused} too small: one line each, nothing left but answers, and all ended with more space"
    )


def test_a_file_of_limited_size(tmp_path):
    """Where no file system can be mounted: writing fails in the middle of a file."""
    import resource

    dense = model_folder(tmp_path / "dense")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    work = Path(tmp_path / "work")
    work.mkdir()
    command = ["prune", dense, "--data", DEMO / "heldout.txt", "--pattern", "2:4", "--solver", "magnitude"]
    command += ["--nsamples", 4, "--seqlen", 16, "--save", work / "out"]
    size = (dense / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        code = Run(command, tmp_path / "said").end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "could not save to" in (tmp_path / "said").read_text()
    assert names(work) == []
