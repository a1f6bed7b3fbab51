"""One pass of a model to learn how it runs: which modules, in which order, and how many rows each layer reads."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from moonshot.models.calibration import Batch
from moonshot.models.in_turn import placed_in_turn
from moonshot.models.layer_view import LayerView
from moonshot.models.losses import Loss, check_loss, loss_of
from moonshot.models.modules import hooked
from moonshot.models.recording import counting, watching


@dataclass(frozen=True)
class TrialRun:
    """What one pass of the model showed, or several.

    order: the modules in the order of their first calls; once: those that ran once in every pass.
    rows: {layer name: rows it read in each of its calls}; tokens: the same, all dimensions together.
    sums: {layer name: for each of its calls the sum of the absolute values of each row, which tells rows apart}.
    loss: of the first batch.
    uncalled: names of the layers whose weight the model read in a pass without calling them.
    elsewhere: names of the layers by whose weight a module multiplied that is not the layer itself.
    around: {module: those that were running in all of its calls, itself included}.
    """

    order: list[nn.Module]
    once: set[nn.Module]
    rows: dict[str, list[int]]
    tokens: dict[str, list[int]]
    sums: dict[str, list[Tensor]]
    loss: float
    uncalled: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    around: dict[nn.Module, set[nn.Module]] = field(default_factory=dict)

    def and_then(self, other: "TrialRun") -> "TrialRun":
        """What this run and another showed together: a module runs once if it did so in both."""
        rows = {
            name: self.rows.get(name, []) + other.rows.get(name, []) for name in {**self.rows, **other.rows}
        }
        once, uncalled = self.once & other.once, self.uncalled | other.uncalled
        elsewhere = self.elsewhere | other.elsewhere
        around = {**self.around, **other.around}
        around |= {module: self.around[module] & around[module] for module in self.around}
        return TrialRun(self.order, once, rows, self.tokens, self.sums, self.loss, uncalled, elsewhere, around)

    def encloses(self, part: nn.Module, views: Iterable[LayerView]) -> bool:
        """Whether these layers of a part ran in no other place than inside of it."""
        return all(part in self.around.get(module, (part,)) for view in views for module in view.modules)

    def reached(self, views: dict[str, LayerView]) -> set[str]:
        """The layers that ran. An expert counts as one where any of its parameter did."""
        ran = {(views[name].module, views[name].parameter) for name in self.rows}
        return {name for name, view in views.items() if (view.module, view.parameter) in ran}


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]  # what changes a weight's dtype


_MULTIPLIES = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "einsum", "t", "transpose"}
_TRANSPOSED = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]


class _Reads(TorchFunctionMode):
    """The names of the layers from whose weights something is computed, and where `elsewhere` than in their calls.

    running: the modules that run at the moment.
    """

    def __init__(self, views: dict[str, LayerView], running: list[nn.Module]):
        super().__init__()
        self.names: set[str] = set()
        self.elsewhere: set[str] = set()
        self._running = running
        self._layers = {
            id(getattr(view.module, view.parameter)): (name, view.modules) for name, view in views.items()
        }

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple) and function != _DATA:
            found = [self._layers[i] for i in map(id, tree_leaves((args, kwargs))) if i in self._layers]
            self.names.update(name for name, _ in found)
            multiplies = function in _TRANSPOSED or getattr(function, "__name__", "") in _MULTIPLIES
            if multiplies and self._running:  # not by the loss, as a penalty on weights does
                self.elsewhere.update(
                    name for name, modules in found if not set(modules).intersection(self._running)
                )
        return result


@contextmanager
def _nesting(model: nn.Module) -> Iterator[tuple[list[nn.Module], dict[nn.Module, set[nn.Module]]]]:
    """The modules that are running at the moment, and TrialRun.around of the calls inside."""
    running: list[nn.Module] = []
    around: dict[nn.Module, set[nn.Module]] = {}

    def enter(module: nn.Module, _arguments: tuple) -> None:
        running.append(module)
        around[module] = around.get(module, set(running)) & set(running)

    def leave(module: nn.Module, _arguments: tuple, _output: Any) -> None:
        while running.pop() is not module:  # what ended by an error that the model caught
            pass

    with (
        hooked(module.register_forward_pre_hook(enter) for module in model.modules()),
        hooked(module.register_forward_hook(leave) for module in model.modules()),
    ):
        yield running, around


@torch.no_grad()
def trial_run(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    views: dict[str, LayerView],
    batch: Batch,
    loss: Loss,
) -> TrialRun:
    """Run the model on a batch, of its blocks one `placed` at a time, and what is outside of them already.

    Raises ModelError for a loss that is not a finite scalar.
    """
    rows: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    sums: dict[str, list[Tensor]] = {}

    def record(name: str, x: Tensor, output: Tensor) -> Tensor:
        rows.setdefault(name, []).append(len(x))
        tokens.setdefault(name, []).append(x.shape[:-1].numel())
        sums.setdefault(name, []).append(x.abs().reshape(len(x), -1).sum(1, dtype=torch.float64))
        return output

    parts = [block for _, block in blocks]
    with (
        counting(model.modules()) as calls,
        _nesting(model) as (running, around),
        watching(views, record),
        placed_in_turn(parts),
        _Reads(views, running) as reads,
    ):
        value = loss_of(loss, model, batch)
    check_loss(value)
    return TrialRun(
        list(calls),
        {module for module, count in calls.items() if count == 1},
        rows,
        tokens,
        sums,
        float(value),
        {name for name in reads.names if calls.keys().isdisjoint(views[name].modules)},
        reads.elsewhere,
        around,
    )
