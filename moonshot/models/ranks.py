"""The processes that prune one model together, by torch.distributed; or this one alone.

Each rank has the whole model and makes the same calls in the same order. What takes time is divided among them: each
runs the model on its share of the samples, what they have seen is added up, and each solves some of the layers and
tells the others its answers. A large layer may be solved by all together.
"""

import heapq
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_map

from moonshot.errors import MoonshotError

Value = TypeVar("Value")

_LONGEST = timedelta(hours=12)  # that a rank may compute while the others wait for it
_LAST_WORD = 30.0  # seconds that a rank which fails waits for the others to hear of it, whose store it may have
_PAUSE = 0.05  # seconds at most between looks at whether an exchange has ended, or a rank failed


class RankError(MoonshotError):
    """Another rank failed, is gone, or was called with other arguments."""


class Ranks:
    """This process alone.

    index: of this rank, from 0 on; count: how many there are; told: whether all of them know that one has failed.
    """

    index, count, told = 0, 1, False

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.index == 0

    def share(self, sizes: Sequence[int]) -> range:
        """Which of some items, of these sizes, are this rank's: consecutive ones, and for the first at least one."""
        return range(len(sizes))

    def owners(
        self, costs: Mapping[str, float], first: Iterable[str] = (), shared: Mapping[str, float] = {}
    ) -> dict[str, int | None]:
        """{name: the rank that works on it, None for all together}, for work of these costs.

        first: names that are the first rank's. shared: what each rank's part costs, of work that all could do together.
        """
        return dict.fromkeys(costs, 0)

    def deal(
        self, owners: Mapping[str, int | None], work: Callable[[str], Value], device: torch.device
    ) -> Iterator[tuple[str, Value]]:
        """(name, what `work` gives for it), in order, each worked out by its owner, or first of all by all together.

        device: where the others get the tensors in it that are on a GPU.
        """
        for name in owners:
            yield name, work(name)

    def total(self, value: float) -> float:
        """The sum of what every rank says, the same on all of them."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """What every rank says, by rank: objects without large tensors."""
        return [value]

    def broadcast(self, value: Value, source: int = 0, device: torch.device | str = "cpu") -> Value:
        """What the rank `source` says, which may have tensors in containers; those on a GPU come to `device`."""
        return value

    def sum_(self, tensors: Iterable[Tensor], wanted_by: int | None = None) -> None:
        """Add up tensors over the ranks, in place, as many of the same shapes on each.

        wanted_by: the only rank that needs the sum, the others' tensors are of no use then; all unless given.
        """

    def agree(self, arguments: Mapping[str, Any]) -> None:
        """Raises RankError unless every rank has the same values under the same names."""


ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def current() -> Ranks:
    """The ranks that `joined` has joined."""
    return _current.get()


@contextmanager
def joined() -> Iterator[None]:
    """All ranks of torch's default process group, if there is one of several, prune together inside.

    Where one of them fails, or its process ends, the others raise RankError, which says what happened, as soon as they
    wait for it.
    """
    if current() is not ALONE or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    groups = [dist.new_group(backend="gloo", timeout=_LONGEST) for _ in range(2)]
    ranks = _Group(*groups)
    token = _current.set(ranks)
    try:
        yield
        ranks.gather(None)  # nobody leaves before all have come this far
    except RankError:
        raise
    except Exception as error:
        ranks.tell(error)
        raise
    finally:
        _current.reset(token)
        for group in groups:
            dist.destroy_process_group(group)


def shares(sizes: Sequence[int], count: int) -> list[range]:
    """Items of these sizes as so many runs of consecutive ones with about the same sum; the first is not empty."""
    total, before = sum(sizes), 0
    runs = [range(0)] * count
    for item, size in enumerate(sizes):
        rank = int(count * (before + size / 2) / total) if item else 0
        runs[rank] = range(runs[rank].start if runs[rank] else item, item + 1)
        before += size
    return runs


def owners(
    costs: Mapping[str, float], count: int, first: Iterable[str] = (), shared: Mapping[str, float] = {}
) -> tuple[dict[str, int | None], float]:
    """{name: rank, or None for all together} of work of these costs, and when the last rank ends.

    The costliest goes first, each to the rank with the least so far. first: names that are the first rank's, and cost
    nothing. shared: what each rank's part costs, of work that all could do together: the costliest, as many as it takes
    for the end to come soonest.
    """
    given = set(first)
    rest = sorted((name for name in costs if name not in given), key=lambda name: -costs[name])
    could = [name for name in rest if name in shared][:count]

    def dealt(together: list[str]) -> tuple[dict[str, int | None], float]:
        """What is found where all do some together."""
        found: dict[str, int | None] = {**dict.fromkeys(given, 0), **dict.fromkeys(together)}
        loads = [(sum(shared[name] for name in together), rank) for rank in range(count)]
        for name in rest:
            if name not in found:
                load, rank = loads[0]
                found[name] = rank
                heapq.heapreplace(loads, (load + costs[name], rank))
        return {name: found[name] for name in costs}, max(loads)[0]

    return min((dealt(could[:k]) for k in range(len(could) + 1)), key=lambda each: each[1])


class _Slot(NamedTuple):
    """The place of a tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype
    on_device: bool


class _Group(Ranks):
    """The ranks of torch's default process group.

    control: a group of the same ranks by which they tell one another objects. They do so before they exchange tensors,
    so that no rank waits on a GPU for those of one that has failed. on_host: another one, for tensors on the CPU. What
    a rank fails of is in the store of the default group, where those that wait for it look.
    """

    def __init__(self, control: Any, on_host: Any):
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self._control, self._on_host = control, on_host
        self._store = dist.distributed_c10d._get_default_store()
        self._failure = f"moonshot/{control.group_name}"

    def share(self, sizes: Sequence[int]) -> range:
        return shares(sizes, self.count)[self.index]

    def owners(
        self, costs: Mapping[str, float], first: Iterable[str] = (), shared: Mapping[str, float] = {}
    ) -> dict[str, int | None]:
        return owners(costs, self.count, first, shared)[0]

    def deal(
        self, owners: Mapping[str, int | None], work: Callable[[str], Value], device: torch.device
    ) -> Iterator[tuple[str, Value]]:
        own = {name: work(name) for name, owner in owners.items() if owner is None}
        own |= {name: work(name) for name, owner in owners.items() if owner == self.index}
        for name, owner in owners.items():
            found = own.pop(name, None)
            yield name, found if owner is None else self.broadcast(found, owner, device)  # type: ignore[misc]

    def total(self, value: float) -> float:
        said = self._all_gather(torch.tensor([value], dtype=torch.float64, device="cpu"))
        return sum(float(each) for each in said)

    def gather(self, value: Value) -> list[Value]:
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = self._all_gather(torch.tensor([len(content)], device="cpu"))
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device="cpu")
        padded[: len(content)] = content
        return [pickle.loads(each.numpy().tobytes()) for each in self._all_gather(padded)]

    def tell(self, error: Exception) -> None:
        """Let the others know of an error that this rank has raised, and give those that wait for it time to hear."""
        kind = "" if isinstance(error, MoonshotError) else f"{type(error).__name__}: "
        what = " ".join([kind + str(error), *getattr(error, "__notes__", ())])
        with suppress(RuntimeError):  # the process that has the store is gone
            self._store.set(self._failure, f"rank {self.index} failed: {what}")
            self.told = True
            heard, end = self._hear(), time.monotonic() + _LAST_WORD
            while heard < self.count and time.monotonic() < end:
                time.sleep(_PAUSE)
                heard = self._store.add(f"{self._failure}/heard", 0)

    def broadcast(self, value: Value, source: int = 0, device: torch.device | str = "cpu") -> Value:
        tensors: list[Tensor] = []

        def taken(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            tensors.append(leaf.detach().contiguous())
            return _Slot(leaf.shape, leaf.dtype, leaf.is_cuda)

        def received(leaf: Any) -> Any:
            if not isinstance(leaf, _Slot):
                return leaf
            place = device if leaf.on_device else "cpu"
            tensors.append(torch.empty(leaf.shape, dtype=leaf.dtype, device=place))
            return tensors[-1]

        is_source = self.index == source
        sent = self.gather(tree_map(taken, value) if is_source else None)[source]
        found = value if is_source else tree_map(received, sent, is_leaf=lambda leaf: isinstance(leaf, _Slot))
        for tensor in tensors:
            self._run(dist.broadcast, tensor.reshape(-1).view(torch.uint8), source)
        return found  # type: ignore[return-value]

    def sum_(self, tensors: Iterable[Tensor], wanted_by: int | None = None) -> None:
        self.gather(None)
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            if wanted_by is None:
                self._run(dist.all_reduce, whole)
            else:
                self._run(dist.reduce, whole, wanted_by)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)

    def agree(self, arguments: Mapping[str, Any]) -> None:
        said = self.gather(dict(arguments))
        for rank, other in enumerate(said):
            if differing := [name for name in said[0] if other.get(name) != said[0][name]]:
                self.told = True
                raise RankError(
                    f"rank {rank} was called with other arguments than rank 0, {', '.join(differing)} differ: every "
                    "process must make the same call on the same model"
                )

    def _run(self, exchange: Callable[..., Any], tensor: Tensor, *arguments: int) -> None:
        """An exchange of tensors, on a GPU in the default group."""
        if tensor.is_cuda:
            exchange(tensor, *arguments)
        else:
            self._wait(exchange(tensor, *arguments, group=self._on_host, async_op=True))

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        self._wait(dist.all_gather(found, tensor, group=self._control, async_op=True))
        return found

    def _wait(self, exchange: Any) -> None:
        """Wait until an exchange has ended. Raises RankError where a rank has failed or is gone."""
        pause = _PAUSE / 2**9
        try:
            while not exchange.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE)
                if pause == _PAUSE:
                    self._check_failures()
            exchange.wait()
        except RuntimeError as error:  # the base class of all that torch raises
            with suppress(RuntimeError):
                self._check_failures()
            raise RankError(
                f"another process that prunes this model has ended, or cannot be reached any more ({error}): its own "
                "output says why"
            ) from error

    def _check_failures(self) -> None:
        if self._store.check([self._failure]):
            self.told = True
            what = self._store.get(self._failure).decode()
            self._hear()
            raise RankError(what)

    def _hear(self) -> int:
        """Say that this rank knows of a failure; how many do."""
        return self._store.add(f"{self._failure}/heard", 1)
