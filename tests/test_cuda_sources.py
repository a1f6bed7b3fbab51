"""Every CUDA source compiles, without a warning, for the devices people have; nvcc needs none of them."""

import shutil
import subprocess
from pathlib import Path

import pytest

import moonshot
from moonshot.linalg import conjugate_cuda, cuda, lowrank_cuda, smallest_cuda
from moonshot.solvers import iht_cuda, obs_cuda, sparsegpt_cuda

DEVICES = ("80", "90")  # A100, H100
OPTIONS = {
    conjugate_cuda.SOURCE: [
        conjugate_cuda.options("float32", shared=True),
        conjugate_cuda.options("float64", shared=False),
    ],
    lowrank_cuda.SOURCE: [
        lowrank_cuda.options("float32", "float32", scaled=True),
        lowrank_cuda.options("float32", "float64", scaled=False),
    ],
    smallest_cuda.SOURCE: [smallest_cuda.options("float32", few=4), smallest_cuda.options("float64", few=64)],
    iht_cuda.SOURCE: [
        conjugate_cuda.options("float32", shared=True),
        conjugate_cuda.options("float64", shared=False),
    ],
    obs_cuda.SOURCE: [obs_cuda.options()],
    sparsegpt_cuda.SOURCE: [sparsegpt_cuda.options("float32", 16), sparsegpt_cuda.options("float64", 0)],
}


def test_every_source_is_here():
    package = Path(moonshot.__file__).parent
    assert OPTIONS.keys() == {path.relative_to(package).as_posix() for path in package.rglob("*.cu")}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("path", "options"), [(path, each) for path, sets in OPTIONS.items() for each in sets])
def test_compiles(path, options, tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(cuda.source(path), encoding="utf-8")
    devices = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in DEVICES]
    command = ["nvcc", "-std=c++14", "-Werror=all-warnings", "-fatbin", *devices, *options, str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.fatbin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
