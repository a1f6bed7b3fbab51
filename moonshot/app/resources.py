"""Time, memory and disk that `moonshot prune` will take, and whether there is as much."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from moonshot.app.arguments import PruneArguments
from moonshot.app.launch import processes_here
from moonshot.app.terminal import say
from moonshot.files import plan as planning
from moonshot.files.folder import Opened
from moonshot.files.load import Source
from moonshot.files.plan import Plan, ResourceError
from moonshot.layer.patterns import Pattern
from moonshot.models.batch_sizes import tokens_at_once
from moonshot.models.calibration import as_batches
from moonshot.models.ranks import Ranks, current
from moonshot.models.targets import listed
from moonshot.pruning.auto import CANDIDATES


@dataclass(frozen=True)
class Resources:
    """What the run of a command takes."""

    asked: PruneArguments

    def fits_on_gpu(self, source: Source) -> bool:
        """Whether the model can be on the GPU as a whole: it may take half, unless a GPU was asked for by name.

        Otherwise it stays on the CPU, and moves there part by part.
        """
        device = self.asked.used_device
        if self.asked.device != "auto" or device.type == "cpu":
            return False
        return 2 * _weights(source) < planning.free_memory(device, self.asked.memory)

    def scratch(self, work: Opened, calibration: Any, ranks: Ranks, console: Console) -> Path | None:
        """Say what pruning will take; the folder to offload to where it does not fit into memory, None where it does.

        Raises ResourceError where there is not enough memory or disk.
        """
        plan = self._plan(work.model, calibration)
        if plan is not None:
            say(console, str(plan))
        offloaded = self._on_disk(plan)
        weights = sum(parameter.nbytes for parameter in work.model.parameters())
        self._check_disk(work.draft, work.unwritten, weights, offloaded, ranks.is_first)
        return work.draft if offloaded else None

    def say_what_it_would_do(
        self,
        source: Source,
        skeleton: nn.Module,
        layers: Mapping[str, Pattern],
        calibration: Any,
        console: Console,
    ) -> None:
        """The plan, from shapes alone. Raises ResourceError where there is not enough memory or disk."""
        asked = self.asked
        if layers:
            say(console, f"{len(layers)} layers in blocks would be pruned to {asked.pattern}: {listed(layers)}")
        if not layers or source.is_image_classifier:
            say(console, "which layers outside of blocks would be pruned is found out when it runs")
        plan = self._plan(skeleton, calibration)
        say(console, str(plan or "what it will take can only be said of a language model"))
        weights = _weights(source)
        self._check_disk(asked.save.parent, weights, weights, self._on_disk(plan))
        say(console, f"it would be saved to {asked.save}; nothing was done: leave out --dry-run to prune")

    def _plan(self, model: nn.Module, calibration: Any) -> Plan | None:
        """What pruning will take, where that can be said."""
        asked = self.asked
        return planning.plan(
            model,
            as_batches(calibration, tokens_at_once(model)),
            objective=asked.terms,
            solver=asked.solver,
            pattern=asked.pattern,
            targets=asked.targets,
            ignore=asked.ignore,
            factors=asked.factors,
            trials=len(CANDIDATES) if asked.objective == "auto" else 0,
            refit=asked.refit,
            device=asked.used_device,
            ranks=current().count,
        )

    def _check_disk(
        self, folder: Path, unwritten: int, weights: int, offloaded: int, is_first: bool = True
    ) -> None:
        """Raises ResourceError where the run would fill a disk: with weights, what is offloaded, and a checkpoint.

        folder: where the model is saved. unwritten: bytes of its weights that are not there yet.
        """
        asked = self.asked
        # a compact model is written while the plain one is there, and is never larger
        needed = {folder: unwritten + asked.compact * weights + offloaded * processes_here()}
        if asked.checkpoint is not None and is_first:
            needed[asked.checkpoint] = weights * (1 + (asked.refit is not None))
        planning.check_disk(needed)

    def _on_disk(self, plan: Plan | None) -> int:
        """Bytes that each process offloads to disk."""
        return plan.offloaded if plan is not None and self._needs_disk(plan) else 0

    def _needs_disk(self, plan: Plan) -> bool:
        """Whether what can be offloaded goes to disk, for lack of memory. Raises ResourceError as the plan does."""
        device, on_host, most = self.asked.used_device, torch.device("cpu"), self.asked.memory
        try:
            if device.type == "cpu":
                return plan.needs_offload(planning.free_memory(on_host, most) // processes_here())
            plan.needs_offload(planning.free_memory(device, most))
        except ResourceError as error:
            if most is not None:
                error.add_note(f"(--memory {most:g} counts what this process has taken already)")
            raise
        return plan.offloaded > planning.free_memory(on_host) // processes_here()


def _weights(source: Source) -> int:
    """Bytes of the model's files."""
    return sum((source.folder / name).stat().st_size for name in source.check_files())
