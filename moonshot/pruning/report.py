"""What `prune` did, layer by layer: as a table, as JSON."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from moonshot.models.evaluation import Accuracy, Perplexity
from moonshot.models.targets import listed


@dataclass(frozen=True)
class LayerReport:
    """How one layer was pruned.

    name: in the model. shape: (m, d), as a matrix.
    pattern, sparsity: what was asked for, and the fraction of weights that the mask leaves out.
    relative: the objective, in units of that of an empty layer.
    terms: each term's loss, in units of that of an empty layer.
    damping: the ridge that was needed, as a fraction of the Hessians' mean diagonal.
    status, seconds: how the solver ended, and its time.
    gap: how far the objective is from the optimum at most, (value - bound) / value, if bounds were asked for.
    note: what the answer rests on, where that is little, and what the solver says of how it found it.
    zero_survivors: how many weights are zero although the mask would let them be something else.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    relative: float
    terms: dict[str, float]
    damping: float
    status: str
    seconds: float
    gap: float | None = None
    note: str = ""
    zero_survivors: int = 0

    def following(self, stage: "LayerReport | None") -> "LayerReport":
        """This, and the time of an earlier stage."""
        return self if stage is None else replace(self, seconds=stage.seconds + self.seconds)


@dataclass(frozen=True)
class PartReport:
    """A part that was refitted: the error of its output against the dense one, before and after.

    Errors are squared, relative to the dense output, over the samples that were fitted and over those set aside. Where
    those set aside got no better, the part is as it was before. Of several stages the errors are the last one's, steps
    and seconds those of all.
    """

    name: str
    before: float
    after: float
    aside_before: float
    aside_after: float
    steps: int
    seconds: float

    def following(self, stage: "PartReport | None") -> "PartReport":
        """This, with what an earlier stage took."""
        if stage is None:
            return self
        return replace(self, steps=stage.steps + self.steps, seconds=stage.seconds + self.seconds)


@dataclass(frozen=True)
class Trial:
    """An objective or a budget that was tried.

    name: of the objective or budget. loss: the mean held-out loss after pruning by it.
    gain, error: mean over held-out samples of the first trial's loss minus this one's, and its standard error.
    """

    name: str
    loss: float
    gain: float
    error: float

    def __str__(self) -> str:
        return f"tried {self.name}: held-out loss {self.loss:.4f}, gain {self.gain:+.4f} +- {self.error:.4f}"


@dataclass(frozen=True)
class Evaluation:
    """What a model reached before and after it was pruned. data: what on; metric: "perplexity" or "accuracy"."""

    data: str
    metric: str
    dense: Perplexity | Accuracy
    pruned: Perplexity | Accuracy

    def __str__(self) -> str:
        return f"{self.data}: {self.metric} {self.dense} dense, {self.pruned} pruned"


@dataclass
class Report:
    """A pruned model: its layers by name, the recipe that made it, and what that took.

    recipe: what was asked for. versions: of Python and the packages that did it.
    layers: {name: its report}.
    skipped: the layers that were to be pruned and are as they were, with the reason.
    left_alone: the layers that are pruned only if asked for, with the reason; empty where targets are given.
    unused: the calibration samples that were left out, with the reason.
    resumed: how many layers' answers an earlier run had left in a checkpoint.
    parts: those that were refitted, by name; empty unless that was asked for.
    evaluations: the model before and after on data that it was not calibrated on, where that was measured.
    before, after: what the model was measured at before and after, as text; empty where nobody measured.
    trials: what objective="auto" tried (selection.best_on_held_out), empty otherwise.
    seconds: wall-clock time. peak_memory: the most bytes that were resident at once.
    model_sparsity: the fraction of zeros over all weights of the model, `sparsity` that over the pruned layers.
    """

    recipe: dict[str, str | int | float]
    versions: dict[str, str]
    layers: dict[str, LayerReport] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    parts: dict[str, PartReport] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    before: str = ""
    after: str = ""
    resumed: int = 0
    model_sparsity: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def sparsity(self) -> float:
        sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in self.layers.items()}
        zeros = sum(layer.sparsity * sizes[name] for name, layer in self.layers.items())
        return zeros / max(sum(sizes.values()), 1)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "sparsity": self.sparsity}, indent=2)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def __str__(self) -> str:
        width = max([len(name) for name in (*self.layers, *self.skipped)] + [5])
        wide = max([len(layer.pattern) for layer in self.layers.values()] + [7])
        bounded = any(layer.gap is not None for layer in self.layers.values())
        gaps = "  gap <= %" if bounded else ""
        lines = [
            f"{'layer':{width}}  {'shape':>13}  {'pattern':>{wide}}  zeros %  relative{gaps}  seconds  status"
        ]
        for layer in self.layers.values():
            gap = "" if not bounded else f"  {'' if layer.gap is None else f'{100 * layer.gap:.1f}':>8}"
            lines.append(
                f"{layer.name:{width}}  {layer.shape[0]:>5} x {layer.shape[1]:<5}  {layer.pattern:>{wide}}  "
                f"{100 * layer.sparsity:7.2f}  {layer.relative:8.5f}{gap}  {layer.seconds:7.2f}  {layer.status}"
                + (f", {layer.note}" if layer.note else "")
            )
        lines += [f"{name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        for reason in dict.fromkeys(self.left_alone.values()):
            names = [name for name, why in self.left_alone.items() if why == reason]
            lines.append(f"left alone, {reason}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
        lines += self._refitted()
        lines += unused_samples(self.unused)
        lines += [str(trial) for trial in self.trials]
        if "batch_norm" in self.recipe:
            lines.append(f"batch norm: {self.recipe['batch_norm']}")
        if self.before or self.after:
            lines.append(f"before: {self.before}; after: {self.after}")
        if survivors := sum(layer.zero_survivors for layer in self.layers.values()):
            lines.append(f"beyond what the patterns ask for, {survivors} weights of these layers are zero")
        resumed = f" ({self.resumed} from the checkpoint)" if self.resumed else ""
        lines.append(
            f"{len(self.layers)} layers{resumed}, {100 * self.sparsity:.2f} % of their weights pruned; "
            f"{100 * self.model_sparsity:.2f} % of the whole model is zero; {self.seconds:.1f} s, "
            f"peak memory {self.peak_memory / 2**20:.0f} MiB"
        )
        return "\n".join(lines)

    def _refitted(self) -> list[str]:
        """The refitted parts as a table."""
        if not self.parts:
            return []
        width = max([len(name) for name in self.parts] + [5])
        lines = [f"{'refit':{width}}  {'error':>8}  {'after':>8}  {'aside':>8}  {'after':>8}  steps  seconds"]
        lines += [
            f"{name:{width}}  {part.before:8.5f}  {part.after:8.5f}  {part.aside_before:8.5f}  "
            f"{part.aside_after:8.5f}  {part.steps:>5}  {part.seconds:7.2f}"
            for name, part in self.parts.items()
        ]
        return lines


def unused_samples(unused: dict[str, str]) -> list[str]:
    """A line that names the samples that were left out, with the reason; none where none were."""
    reasons = (f"{name}: {reason}" for name, reason in unused.items())
    return [f"{len(unused)} samples left out: {listed(reasons, '; ')}"] if unused else []
