"""Hypothesis's profiles; `backend` runs a test on every kind of array there is.

Hypothesis runs the same examples every time. `make test-slow` runs the tests marked "fresh" on new ones, and prints
what reproduces a failure.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # processes are parallel already; threads of each only get in the way
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import hypothesis
import numpy as np
import pytest

from moonshot.linalg.backend import native, on_host

hypothesis.settings.register_profile(
    "moonshot", derandomize=True, deadline=None, max_examples=40, print_blob=False
)
hypothesis.settings.register_profile("fresh", deadline=None, max_examples=200, print_blob=True)
hypothesis.settings.load_profile("moonshot")


class Backend:
    """One kind of array: how to make it, read it back and recognise it."""

    def __init__(self, name):
        self.name = name
        self.device = "cpu"
        if name == "numpy":
            self.module = np
        elif name == "cupy":
            self.module = pytest.importorskip("cupy")
            self.device = "cuda"
            if not self.module.cuda.is_available():
                pytest.skip("CuPy is installed but there is no CUDA device")
        else:
            self.module = pytest.importorskip("torch")
            self.device = name.removeprefix("torch-")
            if self.device == "cuda" and not self.module.cuda.is_available():
                pytest.skip("torch sees no CUDA device")

    def array(self, values, dtype="float64"):
        if self.name.startswith("torch"):
            return self.module.tensor(np.asarray(values), dtype=getattr(self.module, dtype), device=self.device)
        return self.module.asarray(values, dtype=dtype)

    def has(self, dtype):
        return hasattr(self.module, dtype)

    def widened(self, array):
        """`array` in float64, of the same kind."""
        return array.double() if self.name.startswith("torch") else array.astype("float64")

    def computed(self, array):
        """`array`, of the kind that arrays of this one are computed on, as NumPy; fails for another kind."""
        assert type(array) is type(native(self.array([0.0])))
        return on_host(array)

    def numpy(self, array):
        """`array` as NumPy; fails unless it is of this kind and on this device."""
        if self.name.startswith("torch"):
            assert isinstance(array, self.module.Tensor) and array.device.type == self.device
            return array.cpu().numpy()
        assert isinstance(array, self.module.ndarray)
        return array.get() if self.name == "cupy" else array


@pytest.fixture(
    params=[
        "numpy",
        "torch-cpu",
        pytest.param("torch-cuda", marks=pytest.mark.gpu),
        pytest.param("cupy", marks=pytest.mark.gpu),
    ]
)
def backend(request):
    return Backend(request.param)


@pytest.fixture
def dataset_cache(tmp_path_factory, monkeypatch):
    """What datasets keeps of those it loads goes to a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
