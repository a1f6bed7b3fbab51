"""What pruning is said to take, against what it takes."""

import ctypes
import gc
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numba
import psutil
import pytest
import torch
from torch import nn

import moonshot as ms
from moonshot.files import plan as planning
from moonshot.files.plan import Plan, ResourceError, check_disk, free_memory, plan, told_apart
from moonshot.layer.patterns import as_pattern
from moonshot.models.calibration import as_batches, batch_samples
from moonshot.models.offload import Offload
from moonshot.pruning import by_rows
from tests.models import JOINT, block_layers, decoder, tokens
from tests.processes import new_process
from tests.stand_in import GPU, there_is_a_gpu

CPU = torch.device("cpu")


def planned(model, calibration, objective=JOINT, solver=None, **more):
    batches = as_batches(calibration)
    return plan(model, batches, objective=objective, solver=solver or ms.Magnitude(), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [JOINT, ms.Reconstruction()], ids=["joint", "reconstruction"])
@pytest.mark.parametrize(("targets", "refit"), [(None, None), (None, ms.Refit(epochs=1)), ("*.mlp.*", None)])
def test_what_waits_is_what_the_scratch_file_takes(tmp_path, monkeypatch, dtype, objective, targets, refit):
    kept = []

    class Counting(Offload):
        def store(self, tensor):
            kept.append(tensor.nbytes)
            return super().store(tensor)

    monkeypatch.setattr("moonshot.pruning.run.Offload", Counting)
    monkeypatch.setattr("moonshot.pruning.calibration_pass.Offload", Counting)
    model = decoder(dtype=dtype)
    expected = planned(model, tokens(), objective, targets=targets, refit=refit).offloaded
    options = dict(objective=objective, targets=targets, refit=refit or False)
    ms.prune(model, tokens(), "2:4", solver=ms.Magnitude(), scratch=tmp_path, **options)
    assert sum(kept) == expected


def test_more_of_anything_takes_more(monkeypatch):
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e9)
    monkeypatch.setattr(planning, "_seconds", lambda device, run: 1.0)
    model = decoder()
    one = planned(model, tokens())
    twice, longer = planned(model, tokens(12)), planned(model, tokens(6, 400))
    fewer, single = planned(model, tokens(), factors=2), planned(model, tokens(), ms.Reconstruction())
    assert single.memory < fewer.memory < one.memory <= twice.memory < longer.memory
    assert single.seconds < one.seconds < twice.seconds < longer.seconds
    assert single.offloaded < one.offloaded < twice.offloaded < longer.offloaded
    assert planned(model, tokens(), targets="*.0.mlp.down_proj").seconds < one.seconds


def test_trials_take_more(monkeypatch):
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e9)
    monkeypatch.setattr(planning, "_seconds", lambda device, run: 1.0)
    model = decoder()
    none, some = planned(model, tokens(12)), planned(model, tokens(12), trials=6)
    pruned = sum(module.weight.nbytes for module in block_layers(model).values())
    assert some.offloaded - none.offloaded == 6 * pruned
    assert some.memory > none.memory and 2 * none.seconds < some.seconds < 7 * none.seconds


def test_a_refit_takes_more(monkeypatch):
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e9)
    monkeypatch.setattr(planning, "_seconds", lambda device, run: 1.0)
    none, some, longer = (
        planned(decoder(), tokens(12), ms.Reconstruction(), refit=refit)
        for refit in (None, ms.Refit(epochs=2), ms.Refit(epochs=20))
    )
    assert none.seconds < some.seconds < longer.seconds
    assert none.memory < some.memory == longer.memory and none.offloaded < some.offloaded == longer.offloaded


def test_a_solver_takes_as_long_as_it_does_on_small_problems(monkeypatch):
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e30)
    times = iter([1.0, 8.0])
    monkeypatch.setattr(planning, "_seconds", lambda device, run: next(times))
    model = decoder(num_hidden_layers=3)
    layers = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    expected = 3 * sum(8.0 * m * d**2 / 512**3 for m, d in layers)
    assert planned(model, tokens()).seconds == pytest.approx(expected)


def test_ranks_take_less_each(monkeypatch):
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e9)
    monkeypatch.setattr(planning, "_seconds", lambda device, run: 1e-30)
    one, two = (planned(decoder(), tokens(), ranks=ranks) for ranks in (1, 2))
    assert two.seconds == pytest.approx(one.seconds / 2)
    assert two.memory == one.memory and two.offloaded < one.offloaded
    assert str(two) == f"{replace(two, ranks=1)}, in each of 2 processes"


@pytest.mark.parametrize(
    ("pattern", "targets", "share"),
    [
        ("2:4", "0.mlp.down_proj", (0.5, 0.6)),  # each rank has half of the rows
        (0.5, "0.mlp.down_proj", (1, 1)),
        (0.5, "*.0.mlp.*", (0.5, 0.7)),
    ],
)
def test_layers_and_their_rows_are_shared_by_ranks(monkeypatch, pattern, targets, share):
    monkeypatch.setitem(by_rows._EXCHANGES, "cpu", 0)
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e30)
    monkeypatch.setattr(planning, "_seconds", lambda device, run: 1.0)
    asked = dict(solver=ms.ADMM(), pattern=as_pattern(pattern), targets=targets)
    one, two = (planned(decoder(), tokens(), ranks=ranks, **asked).seconds for ranks in (1, 2))
    assert share[0] <= two / one <= share[1]


def test_the_next_block_counts_where_it_comes_early(monkeypatch):
    there_is_a_gpu(monkeypatch)
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1.0)
    monkeypatch.setattr(planning, "_solver_seconds", lambda *_: 1.0)
    model, last = (decoder(dtype=torch.bfloat16, num_hidden_layers=blocks) for blocks in (2, 1))
    block = sum(parameter.nbytes for parameter in model.model.layers[1].parameters())
    assert planned(model, tokens(), device=GPU).memory == planned(model, tokens()).memory + block
    assert planned(last, tokens(), device=GPU).memory == planned(last, tokens()).memory


@pytest.mark.parametrize("solver", [ms.SparseGPT(), ms.ADMM(), ms.Magnitude()], ids=lambda s: s.name)
def test_a_plan_of_a_real_solver(solver):
    found = planned(decoder(), tokens(), solver=solver)
    assert found.seconds > 0 and found.memory > 0
    assert "about" in str(found) and "MiB of memory" in str(found)


@dataclass(frozen=True)
class Demanding(ms.Magnitude):
    """For 2:4 on so many columns without factors, and fails at anything else, as one may."""

    columns: int = 1000

    def unsupported(self, problem, pattern):
        if problem.hessian.rank:
            return "it takes no factors"
        return None if problem.shape[1] <= self.columns else f"it takes {self.columns} columns"

    def compute(self, state, pattern):
        assert pattern.n == 2
        return super().compute(state, pattern)


def test_a_solver_is_timed_at_what_is_asked_of_it():
    demanding, pattern = Demanding(), ms.NM(2, 4)
    alone = planned(decoder(), tokens(), ms.Reconstruction(), demanding, pattern=pattern)
    assert alone.seconds > 0
    untimed = planned(decoder(), tokens(), JOINT, demanding, pattern=pattern)
    assert untimed.seconds is None and str(untimed).startswith("a time that cannot be estimated")
    exact = planned(decoder(), tokens(), ms.Reconstruction(), ms.Exact(), pattern=pattern)
    assert exact.seconds is None  # rows of 256 are too many for it


def test_a_slow_solver_is_timed_once_after_a_small_problem_that_builds_its_kernels(monkeypatch):
    monkeypatch.setattr(planning, "_multiplication_rate", lambda device: 1e30)
    clock, calls = iter(range(0, 1000, 30)), []
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        planning, "_probe", lambda solver, pattern, rank, size, device: lambda: calls.append(size)
    )
    assert planned(decoder(), tokens()).seconds > 0 and calls == [16, 256]


def test_what_a_solver_refuses_is_known_from_shapes():
    def check(columns, m=4, factors=False):
        shapes = {"a": (8, 16), "b": (8, columns)}
        patterns = {name: [ms.NM(2, m)] for name in shapes}
        planning.check_supported(Demanding(columns=64), shapes, patterns, factors, CPU)

    check(64)
    check(10**6, m=3)  # which does not fit 512 columns: nothing can be said
    with pytest.raises(ms.solvers.NotSupportedError, match="cannot prune b to 2:4: it takes 64 columns"):
        check(10**6)
    with pytest.raises(ms.solvers.NotSupportedError, match="cannot prune a to 2:4: it takes no factors"):
        check(64, factors=True)


def resident(figure):
    """Bytes of memory that this process has now ("VmRSS"), or has had at most ("VmHWM")."""
    return 1024 * int(re.search(rf"{figure}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def planned_and_taken(hidden, scratch, **options):
    """Bytes of memory that pruning a block of this width is said to take, and takes."""
    ms.prune(decoder(), tokens(), "2:4", **options)  # what is imported and compiled
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": hidden // 4}
    sizes["max_position_embeddings"] = 128
    model = decoder(vocab_size=2000, num_hidden_layers=1, **sizes)
    ids = torch.randint(1, 2000, (16, 128), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_seconds", lambda device, run: 1.0)
        said = planned(model, ids, **options).memory
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have left is not what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    before = resident("VmRSS")
    ms.prune(model, ids, "2:4", scratch=scratch, **options)
    return said, resident("VmHWM") - before


@pytest.fixture(scope="module")
def elsewhere():
    """Call a function of this module in a process of its own."""
    with new_process(threads=2) as call:
        yield call


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory was taken")
@pytest.mark.parametrize(
    ("hidden", "objective", "solver", "targets"),
    [
        (512, ms.Reconstruction(), ms.SparseGPT(), None),
        (512, JOINT, ms.SparseGPT(), None),
        (256, JOINT, ms.Swaps(ms.Magnitude(), moves=0.01), "gate_proj"),  # in two parts
    ],
    ids=["reconstruction", "joint", "Swaps"],
)
def test_memory_is_at_most_what_is_said(elsewhere, hidden, objective, solver, targets, tmp_path):
    said, taken = elsewhere(
        planned_and_taken, hidden, tmp_path, objective=objective, solver=solver, targets=targets
    )
    assert said / 4 < taken <= said, f"{taken / 2**20:.0f} MiB of {said / 2**20:.0f}"


@pytest.mark.parametrize("solver", [ms.OBS(), ms.Swaps(ms.OBS()), ms.Swaps(ms.ADMM())], ids=lambda s: s.name)
def test_what_a_solvers_threads_work_on_counts(monkeypatch, solver):
    """A d x d matrix of float64 for each thread, and no more of them than the layer has rows."""
    monkeypatch.setattr(planning, "_seconds", lambda device, run: 1.0)
    assert solver.working_memory((10**6, 4096)) >= numba.get_num_threads() * 8 * 4096**2
    assert solver.working_memory((1, 4096)) == 8 * 4096**2
    model = decoder()
    assert planned(model, tokens(), solver=solver).memory > planned(model, tokens()).memory


def test_the_time_is_said_in_words():
    assert str(Plan(1000, 3 << 30, 5 << 20)) == (
        "about 17 minutes, at most 3.0 GiB of memory beyond what this process has now, and 5 MiB that can be offloaded "
        "to disk"
    )
    assert "about 12 seconds" in str(Plan(12, 1, 1))


def test_what_is_no_transformer_on_tokens_has_no_plan():
    net = nn.Sequential(nn.Linear(4, 4))
    assert planned(net, torch.randn(3, 4)) is None
    assert planned(decoder(), [{"inputs_embeds": torch.randn(2, 5, 32)}]) is None
    assert planned(net, tokens()) is None


def test_targets_that_are_not_there_are_an_error():
    with pytest.raises(ValueError, match="matches no layer"):
        planned(decoder(), tokens(), targets="nothing")


def test_memory_that_is_not_there():
    found = Plan(1.0, memory=100, offloaded=50)
    assert not found.needs_offload(150)
    assert found.needs_offload(149) and found.needs_offload(100)
    with pytest.raises(ResourceError, match="take fewer factors, shorter samples"):
        found.needs_offload(99)


def test_disk_that_is_not_there(tmp_path):
    check_disk({tmp_path: 1})
    check_disk({tmp_path / "new" / "folder": 1})
    with pytest.raises(ResourceError, match="choose a folder on another disk"):
        check_disk({tmp_path: shutil.disk_usage(tmp_path).total + 1})


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (2**20, 2**21, ("1 MiB", "2 MiB")),
        (2**20, 2**20 + 2**18, ("1.0 MiB", "1.2 MiB")),
        (2**40, 2**40 + 1, ("1024.000000000 GiB", "1024.000000001 GiB")),
        (2**30 - 1, 2**30, ("1024 MiB", "1.0 GiB")),
    ],
)
def test_sizes_of_which_one_is_too_large_do_not_look_the_same(one, other, words):
    assert told_apart(one, other) == words


def test_folders_on_one_disk_need_it_together(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_disk({tmp_path: 50, tmp_path / "new": 50})
    with pytest.raises(ResourceError, match="has 0.000095 MiB left and pruning takes 0.000096 MiB there"):
        check_disk({tmp_path: 51, tmp_path / "new": 50})


def group(folder, names, values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, values, strict=True):
        (folder / name).write_text(f"{value}\n")


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


@pytest.mark.parametrize(
    ("membership", "groups", "left"),
    [
        ("0::/", {"": (V2, 1000, 300, "")}, 700),
        ("0::/a/b", {"a": (V2, 1000, 300, ""), "a/b": (V2, "max", 100, "")}, 700),
        ("0::/a/b", {"a": (V2, 1000, 300, ""), "a/b": (V2, 500, 100, "")}, 400),
        ("0::/a/b", {"": (V2, 900, 300, ""), "a/b": (V2, 800, 100, "")}, 600),
        ("0::/not/seen/here", {"": (V2, 1000, 300, "")}, 700),
        ("0::/../of/another", {"": (V2, 1000, 300, "")}, 700),
        ("0::/", {"": (V2, 1000, 900, "anon 700\ninactive_file 200\nfile 200")}, 300),
        ("0::/", {"": (V2, 1000, 1300, "")}, 0),
        ("5:cpu,memory:/a\n0::/", {"memory": (V1, 1000, 300, ""), "memory/a": (V1, 600, 100, "")}, 500),
        ("5:memory:/docker/x", {"memory": (V1, 1000, 900, "total_inactive_file 100")}, 200),
        ("0::/", {"": (V2, "max", 300, "")}, None),
        ("3:cpu:/a", {"": (V2, 1000, 300, "")}, None),
    ],
)
def test_memory_within_the_limits_of_control_groups(tmp_path, monkeypatch, membership, groups, left):
    free = free_memory(CPU)
    assert free > 2000
    for name, (names, *values) in groups.items():
        group(tmp_path / name, names, values)
    (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(planning, "_CGROUP", tmp_path)
    monkeypatch.setattr(planning, "_MEMBERSHIP", tmp_path / "membership")
    assert free_memory(CPU) == left if left is not None else free_memory(CPU) > 2000


def test_memory_within_a_limit_of_ones_own():
    taken = psutil.Process().memory_info().rss
    assert free_memory(CPU, taken / 2**30 + 0.5) == pytest.approx(2**29, rel=0.2)
    assert free_memory(CPU, 0.001) == 0
    assert free_memory(CPU, 1e300) > 0


def test_factors_are_no_more_than_samples():
    model = decoder()
    ids = tokens(2)
    assert sum(batch_samples(batch) for batch in as_batches(ids)) == 2
    assert planned(model, ids, factors=16).memory == planned(model, ids, factors=2).memory
    assert replace(planned(model, ids), seconds=0) == replace(planned(model, ids, factors=2), seconds=0)
