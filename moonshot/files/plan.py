"""What pruning a language model will take, said before it begins: time, memory, disk.

Everything is counted from the shapes of a transformer's blocks and of the calibration data (`docs/scale.md` has the
formulas), at the rates at which this machine multiplies matrices and solves two small problems. Times are estimates
within a factor of about two; memory is meant as an upper bound.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moonshot.errors import MoonshotError
from moonshot.extras import from_extra
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern, Unstructured
from moonshot.layer.problem import Problem
from moonshot.linalg.hessian import RowHessian
from moonshot.models.batch_sizes import LOGIT_ARRAYS, joined, logits_at_once, replayed_at_once
from moonshot.models.blocks import find_blocks
from moonshot.models.calibration import Batch, batch_tokens, count_samples
from moonshot.models.layers import layers_of
from moonshot.models.precision import home, tensors_outside
from moonshot.models.ranks import owners
from moonshot.models.targets import select
from moonshot.pruning.by_rows import is_divisible, work
from moonshot.pruning.refit import Refit
from moonshot.solvers.base import NotSupportedError, Solver

_FACTORS, _SHARED, _WEIGHTS = 4, 6, 14  # arrays of each kind that a problem and its solver are, at most
_FITTED = 5  # arrays of a part's size in its refit: gradients, two moments, supports, and the best so far
_PROBES = 256, 512  # sizes of the problems solved to time a solver
_FIRST = 16  # size of the one solved before, because kernels are built the first time that they are needed
_PATIENCE = (
    20  # seconds, after which nothing is timed again; a problem of 256 that takes a tenth is the only one
)
_HALF = Unstructured(0.5)
_CPU = torch.device("cpu")
_CGROUP, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class ResourceError(MoonshotError):
    """There is less memory or disk than pruning takes."""


@dataclass(frozen=True)
class Plan:
    """What pruning takes: seconds; bytes of memory beyond what the process has, at most; bytes of disk meanwhile.

    seconds: None where the solver takes none of the small problems that it would be timed on.
    memory is without what can be offloaded (the weights as they were, hidden states and gradients between blocks):
    `offloaded` bytes, in memory or on disk.
    ranks: how many processes share the work; memory and what is offloaded are those of each, at most.
    """

    seconds: float | None
    memory: int
    offloaded: int
    ranks: int = 1

    def needs_offload(self, free: int) -> bool:
        """Whether what can be offloaded must be on disk, for the rest to fit into `free` bytes of memory.

        Raises ResourceError where that does not fit either.
        """
        if self.memory > free:
            taken, left = told_apart(self.memory, free)
            raise ResourceError(
                f"pruning takes {taken} of memory, and {left} are free: take fewer factors, shorter "
                "samples, an objective without Fisher(), or a machine with more"
            )
        return self.memory + self.offloaded > free

    def __str__(self) -> str:
        memory, offloaded = _gib(self.memory), _gib(self.offloaded)
        return (
            f"{self._time()}, at most {memory} of memory beyond what this process has now, and {offloaded} that can be "
            f"offloaded to disk{f', in each of {self.ranks} processes' * (self.ranks > 1)}"
        )

    def _time(self) -> str:
        if self.seconds is None:
            return "a time that cannot be estimated for this solver"
        minutes = self.seconds / 60
        return f"about {minutes:.0f} minutes" if minutes >= 1.5 else f"about {self.seconds:.0f} seconds"


class Layer(NamedTuple):
    """A layer of m x d weights, and the module that it is in, with which it may share its input."""

    m: int
    d: int
    parent: str


@dataclass(frozen=True)
class Counts:
    """What follows from shapes alone: the layers of each block, factors of a row, multiply-adds, memory as in Plan.

    multiplications: of all ranks, without those of solvers.
    """

    blocks: list[list[Layer]]
    rank: int
    multiplications: float
    memory: int
    offloaded: int

    @property
    def layers(self) -> list[Layer]:
        return [layer for block in self.blocks for layer in block]


def plan(
    model: nn.Module,
    batches: list[Batch],
    *,
    objective: Objective,
    solver: Solver,
    pattern: Pattern = _HALF,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    factors: int = 16,
    trials: int = 0,
    refit: Refit | None = None,
    device: torch.device | None = None,
    ranks: int = 1,
) -> Plan | None:
    """What `prune` takes with these arguments; None for what is no transformer on tokens (batches with input_ids).

    pattern: what the solver is timed at, or 50% where that does not fit the problems it is timed on.
    trials: how many objectives on the same terms are tried first; refit: how parts are fitted afterwards, if at all.
    device: where it would run, if not where the model is; on a GPU block by block, of which the next one comes early.
    ranks: how many processes share the work.
    """
    device = device or home(model)
    counts = count(
        model,
        batches,
        objective=objective,
        targets=targets,
        ignore=ignore,
        factors=factors,
        trials=trials,
        refit=refit,
        device=device,
        ranks=ranks,
    )
    if counts is None:
        return None
    seconds = _solver_seconds(solver, pattern, counts, device, ranks)
    if seconds is not None:
        times = trials + (refit.stages if refit else 1)
        seconds = counts.multiplications / ranks / _multiplication_rate(device) + seconds * times
    return Plan(seconds, counts.memory + _working_memory(solver, counts.layers), counts.offloaded, ranks)


def count(
    model: nn.Module,
    batches: list[Batch],
    *,
    objective: Objective,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    factors: int = 16,
    trials: int = 0,
    refit: Refit | None = None,
    device: torch.device = _CPU,
    ranks: int = 1,
) -> Counts | None:
    """What can be said of `plan` for a model without weights, on the meta device."""
    tokens = [batch_tokens(batch) for batch in batches]
    parts = find_blocks(model)
    views = [dict(layers_of(*part)) for part in parts]
    names = [name for of_part in views for name in of_part]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not names or not all(tokens) or not embeddings:
        return None
    chosen = set(select(names, targets, ignore))
    blocks = [_chosen(name, block, chosen) for name, block in parts]
    vocabulary, hidden = embeddings[0].num_embeddings, embeddings[0].embedding_dim
    itemsize = next(model.parameters()).itemsize
    replayed = bool(objective.needed & {"gradients", "output_gradients"})
    rank = min(factors, count_samples(batches)) if "gradients" in objective.needed else 0
    length = max(batch["input_ids"].shape[1] for batch in batches)
    if refit is None:
        layers_of_parts = [of_part.values() for of_part in views]
        batches = joined(batches, replayed_at_once(model, layers_of_parts, length, 4, device))
    total, at_once = sum(tokens), max(map(batch_tokens, batches))
    with_logits = min(
        at_once, max(2 * length, logits_at_once(model, device))
    )  # two samples show how the model runs

    own = min(total, -(-count_samples(batches) // ranks) * length)  # tokens of a rank
    offloaded = sum(m * d for block in blocks for m, d, _ in block) * itemsize * (1 + trials)
    offloaded += own * hidden * itemsize * (2 + len(blocks) if replayed else 1 + (refit is not None))
    early = (
        device.type == "cuda" and home(model) != device
    )  # the next block comes while one is there: models.in_turn
    coming = [early * sum(p.nbytes for p in block.parameters()) for _, block in parts[1:]] + [0]
    weights = [sum(p.numel() for p in block.parameters()) for _, block in parts]
    outside = sum(tensor.numel() for tensor in tensors_outside(model, [block for _, block in parts]))
    memory = max(
        4 * outside + 4 * with_logits * vocabulary * LOGIT_ARRAYS,
        *(
            4 * here
            + following
            + _running(block, at_once, length, replayed or refit is not None)
            + _pruning(block, objective, rank, trials, refit, 4 * here)
            for here, following, block in zip(weights, coming, blocks, strict=True)
        ),
    )
    multiplications = float(total) * sum(weights) * (7 if replayed else 3)
    multiplications += 3.0 * total * hidden * vocabulary * replayed
    if refit is not None:  # a step is three passes of a sample, and those set aside are run after each epoch
        passes = refit.stages * (refit.epochs * (3 - 2 * refit.share) + 2) + (not replayed)
        multiplications += total * sum(weights) * passes
    for block in blocks:
        multiplications += sum(float(total) * d * d * matrices for d, matrices in _grams(block, objective))
        multiplications += sum(float(total) * m * d for m, d, _ in block) * (rank > 0)
    if trials:  # one pass on three quarters of the samples, and each answer's losses on the rest
        multiplications *= 1.75
        multiplications += 0.25 * total * trials * (sum(weights) + hidden * vocabulary)
    return Counts(blocks, rank, multiplications, memory, offloaded)


def _chosen(prefix: str, block: nn.Module, names: set[str]) -> list[Layer]:
    return [
        Layer(view.groups * view.shape[0], view.shape[1], name.rpartition(".")[0])
        for name, view in layers_of(prefix, block)
        if name in names
    ]


def _running(block: list[Layer], tokens: int, length: int, replayed: bool) -> int:
    """Bytes of a block's activations in one batch: what its layers read and return, attention, and gradients of all."""
    width = sum(m + d for m, d, _ in block)
    return tokens * (2 * width + 64 * length) * 4 * (2 if replayed else 1)


def _grams(block: list[Layer], objective: Objective) -> list[tuple[int, int]]:
    """(d, how many matrices d x d) of a block's shared statistics: one an input, one a layer where outputs matter."""
    inputs = {(layer.parent, layer.d) for layer in block}
    shared = [term.needs for _, term in objective.weighted_terms if term.needs != {"gradients"}]
    per_input = shared.count(frozenset({"inputs"}))
    per_layer = len(shared) - per_input
    return [(d, per_input) for _, d in inputs] + [(layer.d, per_layer) for layer in block]


def _pruning(
    block: list[Layer], objective: Objective, rank: int, trials: int, refit: Refit | None, size: int
) -> int:
    """Bytes to solve a block's layers and then to refit it: either, or both where there are stages.

    size: of the block's weights in float32.
    """
    stages = refit.stages if refit else 1
    solving = _solving(block, objective, rank, trials, stages)
    fitting = _FITTED * size * (refit is not None)
    return max(solving, fitting) if stages == 1 else solving + fitting


def _solving(block: list[Layer], objective: Objective, rank: int, trials: int, stages: int) -> int:
    """Bytes of a block's statistics, and of one layer's problem and solver while later layers' gradients wait.

    Trials and stages need a layer's gradients again, trials what their weighting sweep derives from them too.
    """
    arrays = _FACTORS - 1 + 2 * (trials > 0)
    statistics = sum(4 * d * d * matrices for d, matrices in _grams(block, objective))
    gradients = [4 * rank * m * d for m, d, _ in block]
    peaks = [
        sum(gradients[k if stages == 1 else 0 :])
        + arrays * gradients[k]
        + 8 * d * d * _SHARED
        + 4 * m * d * _WEIGHTS
        for k, (m, d, _) in enumerate(block)
    ]
    return statistics + max(peaks, default=0)


def _working_memory(solver: Solver, layers: list[Layer]) -> int:
    """Bytes that a solver says it holds beside a problem, `working_memory(shape)`: one that is of any size."""
    of = getattr(solver, "working_memory", None)
    return max((of((m, d)) for m, d, _ in layers), default=0) if of else 0


def _multiplication_rate(device: torch.device, size: int = 1024) -> float:
    """Multiply-adds a second of float32 matrix products."""
    a = torch.ones(size, size, device=device)
    products = 8
    return size**3 * products / _seconds(device, lambda: [a @ a for _ in range(products)])


def check_supported(
    solver: Solver,
    shapes: Mapping[str, tuple[int, int]],
    patterns: Mapping[str, Sequence[Pattern]],
    factors: bool,
    device: torch.device,
) -> None:
    """Raises NotSupportedError, which names the layer, where the solver says that it cannot take one.

    shapes: (m, d) by layer; one with more than 512 rows or columns is asked about as if it had 512. patterns: by layer;
    those that do not fit such a layer are not asked about. factors: whether rows have factors of their own.
    """
    asked = set()
    for name, (m, d) in shapes.items():
        m, d = (min(length, _PROBES[1]) for length in (m, d))
        for pattern in patterns[name]:
            if (m, d, str(pattern)) in asked or not _fits(pattern, (m, d)):
                continue
            asked.add((m, d, str(pattern)))
            weight, shared, own = _numbers(m, d, int(factors), device)
            if reason := solver.unsupported(Problem(weight, RowHessian(shared, own)), pattern):
                raise NotSupportedError(f"{solver.name} cannot prune {name} to {pattern}: {reason}")


def _fits(pattern: Pattern, shape: tuple[int, int]) -> bool:
    try:
        pattern.validate(shape)
    except ValueError:  # what one's own pattern raises
        return False
    return True


def _solver_seconds(
    solver: Solver, pattern: Pattern, counts: Counts, device: torch.device, ranks: int
) -> float | None:
    """The time of all layers, from that of two small square ones: linear in the rows, a power of the columns.

    So many ranks share the layers of a block among them, as they do when it is pruned.
    Where the smaller takes long it is the only one. None where the solver takes neither pattern.
    """
    times: list[float] = []
    if first := _probe(solver, pattern, counts.rank, _FIRST, device):
        first()
    for size in _PROBES:
        solve = _probe(solver, pattern, counts.rank, size, device)
        if solve is None:
            return None
        times.append(_seconds(device, solve))
        if times[0] > _PATIENCE / 10:
            break
    size, longest = _PROBES[len(times) - 1], times[-1]
    power = min(max(math.log2(longest / times[0]), 2.5), 4.0) if times[1:] else 3.0  # of a square layer

    def one(layer: Layer) -> float:
        return longest * (layer.m / size) * (layer.d / size) ** (power - 1)

    def each(layer: Layer) -> float:
        """The time of each rank where all solve a layer together."""
        cost = partial(work, solver, (layer.m, layer.d), counts.rank, device)
        return one(layer) * cost(ranks) / cost()

    def last(block: list[Layer]) -> float:
        """When the last rank has solved what it has of a block."""
        layers = {str(k): layer for k, layer in enumerate(block)}
        together = {
            k: each(layer)
            for k, layer in layers.items()
            if is_divisible(solver, [pattern], (layer.m, layer.d), ranks)
        }
        return owners({k: one(layer) for k, layer in layers.items()}, ranks, shared=together)[1]

    return sum(map(last, counts.blocks))


def _probe(
    solver: Solver, pattern: Pattern, rank: int, size: int, device: torch.device
) -> Callable[[], object] | None:
    """Prune a square layer of random numbers to the pattern, or by half; None where the solver takes neither."""
    weight, shared, factors = _numbers(size, size, rank, device)

    def problem() -> Problem:  # a new one each time: a Hessian remembers what was derived from it
        return Problem(weight, RowHessian(shared, factors))

    def solve(tried: Pattern) -> object:
        return solver.compute(solver.init(problem()), tried)

    for tried in (pattern, _HALF):
        if _fits(tried, (size, size)) and not solver.unsupported(problem(), tried):
            return partial(solve, tried)
    return None


def _numbers(m: int, d: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight (m, d), shared Hessian (d, d) and factors (m, d, rank) of a random layer."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = normal(2 * d, d) * torch.logspace(0, -1, d, device=device)
    shared = (x.T @ x).double() / (2 * d) + 0.01 * torch.eye(d, device=device)
    factors = normal(rank, m, d).permute(1, 2, 0) if rank else None
    return normal(m, d), shared, factors


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    """How long something takes, the second time; the first where that was long already."""
    for _ in range(2):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - begin
        if elapsed > _PATIENCE:
            break
    return elapsed


def free_memory(device: torch.device, most: float | None = None) -> int:
    """Bytes that this process may still take on a device: of the system's memory within its control group's limit.

    most: GiB of the device's memory that it may take in all.
    """
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else _free_on_host()
    if most is None:
        return free
    taken = torch.cuda.memory_reserved(device) if cuda else _process_memory()
    return max(int(min(free, most * 2**30 - taken)), 0)


def _process_memory() -> int:
    with from_extra("cli"):
        import psutil
    return psutil.Process().memory_info().rss


def _free_on_host() -> int:
    with from_extra("cli"):
        import psutil
    return max(min([psutil.virtual_memory().available, *_left_in_groups()]), 0)


def _left_in_groups() -> Iterator[int]:
    """Bytes left in every control group that this process is in, of both versions, with those that they are in."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used, cached = _CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = _CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        parts = [] if ".." in path.split("/") else [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            group = root.joinpath(*parts[:depth])
            try:
                left = int((group / limit).read_text()) - int((group / used).read_text())
                yield left + _reclaimable(group, cached)
            except (OSError, ValueError):  # it has no limit, or is outside this container
                continue


def _reclaimable(group: Path, key: str) -> int:
    """Bytes of files in memory, such as mapped weights, that a group's use counts and that can be let go at once."""
    try:
        entries = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        return next(int(value) for name, value in entries if name == key)
    except (OSError, ValueError, StopIteration):
        return 0


def check_disk(needed: Mapping[Path, int]) -> None:
    """Raises ResourceError where the disk of a folder, or of several, has fewer bytes left than they need.

    A folder that is not there yet counts where it will be made.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needed:
        disks.setdefault(_there(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        free, taken = shutil.disk_usage(_there(folders[0])).free, sum(needed[folder] for folder in folders)
        if taken > free:
            left, needs = told_apart(free, taken)
            raise ResourceError(
                f"{folders[0]} has {left} left and pruning takes {needs} there: choose a folder on another disk"
            )


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made in a folder; one that is not there yet counts where it will be made."""
    try:
        with TemporaryFile(dir=_there(folder)):
            pass
    except OSError as error:
        raise OSError(f"no file can be made in {folder}: {error}; choose another folder") from error


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def told_apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers of bytes, which are not the same, in words that are not the same either."""
    words = ((_gib(one, more), _gib(other, more)) for more in range(10))
    return next(pair for pair in words if pair[0] != pair[1])


def _gib(size: float, more: int = 0) -> str:
    """A number of bytes in words. more: decimals beyond the usual ones."""
    return f"{size / 2**30:.{1 + more}f} GiB" if size >= 2**30 else f"{size / 2**20:.{more}f} MiB"
