"""Statistics from bfloat16 as it is: those that float32 gives."""

import numpy as np
import pytest
import torch

import moonshot as ms
from moonshot.layer.objectives import Observation
from moonshot.linalg import half_products
from moonshot.linalg.backend import on_host
from tests.models import decoder, tokens

TERMS = [ms.Reconstruction(), ms.TokenFisher()]


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where bfloat16 is multiplied: on a GPU, or on the CPU by a product that does what a GPU's does."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        return "cuda"
    monkeypatch.setattr(half_products, "_is_suited", lambda tensor: tensor.dtype == torch.bfloat16)
    monkeypatch.setattr(half_products, "_mm", lambda a, b: a.float() @ b.float())
    return "cpu"


def observation(device, tokens=200, scale=1.0):
    make = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, 24, generator=make) * torch.logspace(0, -3, 24)
    gradients = torch.randn(tokens, 8, generator=make) * torch.logspace(0, -6, tokens)[:, None] * scale
    return Observation(inputs.bfloat16().to(device), gradients.bfloat16().to(device))


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_the_statistic_has_the_digits_of_float32(device, term):
    seen = observation(device)
    assert half_products.possible(seen.inputs, seen.output_gradients)
    x = seen.inputs.cpu().double().numpy()
    importance = seen.output_gradients.cpu().double().square().mean(1).numpy() if len(term.needs) > 1 else 1
    expected = (x.T * importance) @ x
    found = on_host(term.accumulate(term.accumulate(None, seen), seen))
    assert found.dtype == np.float32
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (
        np.max(abs(found / 2 - expected) / scale) < 3e-6
    )  # tensor cores cut off what they add up, and do not round


def test_gradients_may_be_small(device):
    term = ms.TokenFisher()
    expected, found = (
        on_host(term.accumulate(None, observation(device, scale=scale))) for scale in (1, 2.0**-40)
    )
    np.testing.assert_allclose(found * 2.0**80, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_in_the_sum(device, broken, monkeypatch):
    monkeypatch.setattr("moonshot.layer.objectives.is_numpy", lambda array: False)  # as on a device
    seen = observation(device)
    seen.inputs[3, 5] = broken
    weight = torch.ones(8, 24, device=device)
    for term in TERMS:
        statistic = term.accumulate(None, seen)
        with pytest.raises(ValueError, match="inputs holds NaN or infinity: look at the calibration data"):
            term.assemble(weight, [statistic])


def test_a_model_is_pruned_to_what_statistics_in_float32_make_of_it(device):
    def losses(model):
        report = ms.prune(model.to(device), tokens().to(device), 0.5, solver=ms.SparseGPT(), precision="model")
        return [loss for layer in report.layers.values() for loss in layer.terms.values()]

    found = losses(decoder(dtype=torch.bfloat16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half_products, "possible", lambda *arrays: False)
        expected = losses(decoder(dtype=torch.bfloat16))
    np.testing.assert_allclose(found, expected, rtol=0.02)
