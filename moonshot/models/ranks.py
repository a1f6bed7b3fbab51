"""The processes that prune one model together, by torch.distributed; or this one alone.

Each rank has the whole model and makes the same calls in the same order. What takes time is divided among them: each
runs the model on its share of the samples, what they have seen is added up, and each solves some of the layers and
tells the others its answers.
"""

import pickle
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
_LAST_WORD = timedelta(seconds=60)  # that a rank which fails waits for the others to hear why


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

    def owners(self, costs: Mapping[str, float], first: Iterable[str] = ()) -> dict[str, int]:
        """{name: the rank that works on it}, for work of these costs. first: names that are the first rank's."""
        return dict.fromkeys(costs, 0)

    def deal(
        self, owners: Mapping[str, int], work: Callable[[str], Value], device: torch.device
    ) -> Iterator[tuple[str, Value]]:
        """(name, what `work` gives for it), in order, each worked out by its owner.

        device: where the others get the tensors in it that are on a GPU.
        """
        for name in owners:
            yield name, work(name)

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

    Where one of them fails the others raise RankError, which says what happened, the next time that they exchange
    anything; where it ends without a word, they do so at once.
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


def owners(costs: Mapping[str, float], count: int, first: Iterable[str] = ()) -> dict[str, int]:
    """{name: rank} of work of these costs, the costliest first, each to the rank with the least so far.

    first: names that are the first rank's, and cost nothing.
    """
    found, load = dict.fromkeys(first, 0), [0.0] * count
    for name in sorted(costs, key=lambda name: -costs[name]):
        if name not in found:
            found[name] = min(range(count), key=load.__getitem__)
            load[found[name]] += costs[name]
    return {name: found[name] for name in costs}


class _Slot(NamedTuple):
    """The place of a tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype
    on_device: bool


class _Group(Ranks):
    """The ranks of torch's default process group.

    control: a group of the same ranks by which they tell one another objects, and whether they go on. They do so before
    they exchange tensors, so that no rank waits for those of one that has failed. on_host: another one, for tensors on
    the CPU.
    """

    def __init__(self, control: Any, on_host: Any):
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self._control, self._on_host = control, on_host

    def share(self, sizes: Sequence[int]) -> range:
        return shares(sizes, self.count)[self.index]

    def owners(self, costs: Mapping[str, float], first: Iterable[str] = ()) -> dict[str, int]:
        return owners(costs, self.count, first)

    def deal(
        self, owners: Mapping[str, int], work: Callable[[str], Value], device: torch.device
    ) -> Iterator[tuple[str, Value]]:
        own = {name: work(name) for name, owner in owners.items() if owner == self.index}
        for name, owner in owners.items():
            yield name, self.broadcast(own.pop(name, None), owner, device)  # type: ignore[misc]

    def gather(self, value: Value) -> list[Value]:
        return self._exchange(value, None, _LONGEST)

    def tell(self, error: Exception) -> None:
        """Make the others raise an error that this rank has raised."""
        what = " ".join([str(error), *getattr(error, "__notes__", ())])
        kind = "" if isinstance(error, MoonshotError) else f"{type(error).__name__}: "
        with suppress(RankError):  # others have failed too, or do not listen
            self._exchange(None, kind + what, _LAST_WORD)

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
        with _connected():
            for tensor in tensors:
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), source, group=self._group(tensor))
        return found  # type: ignore[return-value]

    def sum_(self, tensors: Iterable[Tensor], wanted_by: int | None = None) -> None:
        self.gather(None)
        with _connected():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                if wanted_by is None:
                    dist.all_reduce(whole, group=self._group(tensor))
                else:
                    dist.reduce(whole, wanted_by, group=self._group(tensor))
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    def agree(self, arguments: Mapping[str, Any]) -> None:
        said = self.gather(dict(arguments))
        for rank, other in enumerate(said):
            if differing := [name for name in said[0] if other.get(name) != said[0][name]]:
                raise RankError(
                    f"rank {rank} was called with other arguments than rank 0, {', '.join(differing)} differ: every "
                    "process must make the same call on the same model"
                )

    def _group(self, tensor: Tensor) -> Any:
        return None if tensor.is_cuda else self._on_host  # None: the default group

    def _exchange(self, value: Any, error: str | None, longest: timedelta) -> list[Any]:
        """What every rank says. Raises RankError where one says that it has failed."""
        content = torch.frombuffer(bytearray(pickle.dumps((value, error))), dtype=torch.uint8)
        with _connected():
            lengths = self._all_gather(torch.tensor([len(content)], device="cpu"), longest)
            padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device="cpu")
            padded[: len(content)] = content
            said = self._all_gather(padded, longest)
        values, errors = zip(*(pickle.loads(each.numpy().tobytes()) for each in said), strict=True)
        failed = [rank for rank, what in enumerate(errors) if what is not None]
        self.told = bool(failed)
        if failed and error is None:
            raise RankError(f"rank {failed[0]} failed: {errors[failed[0]]}")
        return list(values)

    def _all_gather(self, tensor: Tensor, longest: timedelta) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(found, tensor, group=self._control, async_op=True).wait(longest)
        return found


@contextmanager
def _connected() -> Iterator[None]:
    """Say of an exchange that does not come to its end what that means."""
    try:
        yield
    except RuntimeError as error:  # the base class of all that torch raises
        raise RankError(
            f"another process that prunes this model has ended, or cannot be reached any more ({error}): its own "
            "output says why"
        ) from error
