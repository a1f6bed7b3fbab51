"""`moonshot targets`: what a saved model gains where it may run, and how to get it there."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from moonshot.app.measure import dense_source
from moonshot.app.terminal import say
from moonshot.files.compact import compact_size, load_any, weights_size
from moonshot.files.load import Source
from moonshot.files.source import CONTENTS, FolderError, check_folder
from moonshot.models.precision import home
from moonshot.models.semi_structured import semi_structured_layers, to_semi_structured

_RUNS, _WARM = 15, 3
_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """Where a model may run, what it gains there in size and in time, and how to get it there."""

    name: str
    size: str
    speed: str
    how: str

    def __str__(self) -> str:
        return f"{self.name}\n    size: {self.size}\n    speed: {self.speed}\n    how: {self.how}"


class SavedModel:
    """A folder that moonshot prune saved. Raises FolderError for any other."""

    def __init__(self, folder: Path):
        check_folder(folder)
        self.folder = folder
        try:
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            self.recipe = dict(report["recipe"])
            self.patterns = {str(layer["pattern"]) for layer in report["layers"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(
                f"{folder} is no folder that moonshot prune saved: it has no report.json"
            ) from error
        self.compact = (folder / CONTENTS).is_file()
        self.shrunk = self.recipe.get("shrink")

    def targets(self) -> list[Target]:
        """What can be said without running the model."""
        plain, compact = weights_size(self.folder), compact_size(self.folder)
        share = f"{100 * compact / plain:.0f} % of the plain weights"
        unpack = f"moonshot unpack {self.folder} --save FOLDER, then " if self.compact else ""
        return [
            Target(
                "transformers, and engines that read its folders",
                f"smaller: {self.shrunk}" if self.shrunk else "as dense",
                "faster: --measure says how much" if self.shrunk else "as dense: zeros are multiplied too",
                f"{unpack}from_pretrained",
            ),
            Target(
                "disk and transfer, by compact files",
                f"{share}, as it is" if self.compact else share,
                "as the plain folder once it is loaded",
                "moonshot.load_compact" if self.compact else "moonshot prune ... --compact",
            ),
            self._semi_structured(),
            Target(
                "OpenVINO on a CPU",
                "as the plain folder",
                "no gain from zeros seen on a CPU without AMX; with it " + _NOT_MEASURED,
                f"{unpack}optimum-cli export openvino --model {'FOLDER' if self.compact else self.folder} OUT",
            ),
        ]

    def _semi_structured(self) -> Target:
        name = "torch, sparse tensor cores of a GPU (8.0 or more)"
        if "2:4" not in self.patterns or self.shrunk:
            return Target(name, "no gain", "no gain", "needs --pattern 2:4, without --shrink")
        return Target(
            name,
            "2:4 layers of 16 bits: 9 of 16 bits a weight, in memory",
            _NOT_MEASURED,
            "moonshot.models.semi_structured.to_semi_structured(model.cuda())",
        )

    def measured(self, dense: str | None) -> list[str]:
        """Times of a forward pass over the dense model's, in turns, where this machine can.

        dense: the dense model's folder or hub name; the one that was pruned unless given.
        """
        source = Source(str(self.folder))
        other = Source(dense) if dense else self._dense(source)
        model, first = load_any(source).eval(), other.load().eval()
        device = home(first)
        inputs = _inputs(source, device)
        where = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"threads: {torch.get_num_threads()}"
        )
        lines = [f"transformers: {_ratio(model.to(device), first, inputs)} ({where})"]
        if not semi_structured_layers(model):
            return lines
        if device.type != "cuda":
            return [*lines, f"sparse tensor cores: {_NOT_MEASURED}, there is no GPU here"]
        half = first.half()
        to_semi_structured(model.half())
        return [*lines, f"sparse tensor cores: {_ratio(model, half, inputs)} in float16 ({where})"]

    def _dense(self, source: Source) -> Source:
        """The model that was pruned. Raises FolderError where it is not on this machine."""
        try:
            found = dense_source(source)
        except FolderError as error:
            error.add_note("(--dense names the dense model)")
            raise
        if found is None:
            raise FolderError(f"{self.folder} does not say what it was pruned from: name that by --dense")
        return found


def say_targets(folder: Path, measure: bool, dense: str | None, console: Console) -> None:
    """Print what each target gains, and below it what was measured, if that was asked for."""
    saved = SavedModel(folder)
    for target in saved.targets():
        say(console, str(target))
    for line in saved.measured(dense) if measure else ():
        say(console, line)


def _inputs(source: Source, device: torch.device) -> dict[str, torch.Tensor]:
    """Eight samples of what the model reads."""
    config: Any = source.config
    if source.is_image_classifier:
        side = getattr(config, "image_size", 224)
        sides = side if isinstance(side, list | tuple) else (side, side)
        return {"pixel_values": torch.zeros(8, getattr(config, "num_channels", 3), *sides, device=device)}
    length = min(128, getattr(config, "max_position_embeddings", None) or 128)
    return {"input_ids": torch.randint(1, config.vocab_size, (8, length), device=device)}


@torch.no_grad()
def _ratio(model: nn.Module, dense: nn.Module, inputs: dict[str, torch.Tensor]) -> str:
    """The median ratio of the times of a forward pass, one after the other, and the middle half of them."""
    dtypes = [next(each.parameters()).dtype for each in (model, dense)]
    each_inputs = [
        {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()} for dtype in dtypes
    ]
    ratios = []
    for run in range(_WARM + _RUNS):
        one, other = (
            _seconds(lambda m=each, x=x: m(**x))  # type: ignore[misc]
            for each, x in zip((model, dense), each_inputs, strict=True)
        )
        if run >= _WARM:
            ratios.append(one / other)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} of the dense model's time, half of the runs from {low:.2f} to {high:.2f}"


def _seconds(forward: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    forward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
