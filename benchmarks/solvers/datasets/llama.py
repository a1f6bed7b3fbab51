"""Two layers of the shipped Llama with their real statistics."""

from functools import cache

import moonshot as ms
import numpy as np
import torch
from benchmark_utils.grading import Layer
from benchopt import BaseDataset
from moonshot.app.demo import DEMO
from moonshot.files.load import load
from moonshot.layer.patterns import Pattern
from moonshot.models.calibration import windows

LAYERS = ("self_attn.q_proj", "mlp.down_proj")


class Recorder:
    """A solver that copies the problems it is given, and prunes by magnitude."""

    name = "recorder"

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def unsupported(self, problem: ms.Problem, pattern: Pattern) -> None:
        return None

    def init(self, problem: ms.Problem):
        hessian = problem.hessian
        factors = np.array(hessian.factors).transpose(1, 2, 0)
        self.layers.append(Layer(np.array(problem.centre), np.array(hessian.A), factors))
        return ms.Magnitude().init(problem)

    def compute(self, state, pattern: Pattern) -> ms.Answer:
        return ms.Magnitude().compute(state, pattern)


@cache
def captured() -> dict[str, Layer]:
    """{layer: what the default objective makes of it} in the second block, 32 calibration windows of 256 tokens."""
    model, tokenizer = load(str(DEMO / "model"))
    text = (DEMO / "calibration.txt").read_text("utf-8")
    names = [f"model.layers.1.{layer}" for layer in LAYERS]
    recorder = Recorder()
    report = ms.prune(
        model.to(torch.float32),
        windows(tokenizer, text, 32, 256, 0),
        dict.fromkeys(names, 0.5),
        solver=recorder,
    )
    return dict(zip(report.layers, recorder.layers, strict=True))


class Dataset(BaseDataset):
    """q_proj is 256 x 256, down_proj 256 x 640; 16 factors."""

    name = "llama"
    parameters = {"layer": list(LAYERS), "pattern": ["2:4", "70%", "90%"]}

    def get_data(self) -> dict:
        layer = captured()[f"model.layers.1.{self.layer}"]
        return {"layers": (layer,), "pattern": ms.as_pattern(self.pattern)}
