"""Copies beside what a GPU computes, in two worlds that know no GPU: in one copies come first, in the other last."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch.overrides import TorchFunctionMode

from moonshot.models import copies
from moonshot.models.copies import to_device, to_host, write_back
from moonshot.models.offload import _OnHost, in_turn
from tests.stand_in import GPU

COPYING = copies._copying


class Stream:
    """Does what it is given in order: at once if it is eager, otherwise when another waits for it."""

    def __init__(self, eager):
        self._eager, self._waiting, self._done = eager, [], 0

    def add(self, work):
        self._waiting.append(work)
        if self._eager:
            self.run_to(self.record_event())

    def record_event(self):
        return self, self._done + len(self._waiting)

    def wait_event(self, event):
        stream, place = event
        self.add(lambda: stream.run_to((stream, place)))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.run_to(self.record_event())

    def run_to(self, event):
        while self._done < event[1]:
            work = self._waiting.pop(0)
            self._done += 1
            work()


class OnDevice(torch.Tensor):
    is_cuda, device = True, GPU


class Machine(TorchFunctionMode):
    """Copies that are made when the stream comes to them; `used`: which tensors another stream was said to use."""

    def __init__(self, copies_first):
        super().__init__()
        self.copying, self.computing = Stream(copies_first), Stream(not copies_first)
        self.weights = Stream(False)
        self.current, self.used = self.computing, []

    @contextmanager
    def on(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def compute(self, function, tensor):
        result = torch.full_like(tensor, torch.nan)
        self.computing.add(lambda: result.copy_(function(tensor)))
        return result

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to and GPU in args:
            copy = torch.full_like(args[0], torch.nan)
            self.current.add(lambda: copy.copy_(args[0]))
            return copy
        if function is torch.Tensor.copy_ and kwargs.get("non_blocking"):
            self.current.add(lambda: args[0].copy_(args[1]))
            return args[0]
        if function is torch.empty:
            assert kwargs.pop("pin_memory")
            return torch.full(*args, torch.nan, **kwargs)
        return function(*args, **kwargs)


@pytest.fixture(params=[True, False], ids=["copies first", "copies last"])
def machine(request, monkeypatch):
    machine = Machine(request.param)
    monkeypatch.setattr(
        copies, "_copying", lambda _, unchanged=False: machine.weights if unchanged else machine.copying
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.current)
    monkeypatch.setattr(torch.cuda, "stream", machine.on)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda *call: machine.used.append((call[0].data_ptr(), call[1]))
    )
    with machine:
        yield machine


def test_a_copy_is_there_before_it_is_computed_with(machine):
    coming = to_device(torch.arange(3.0), GPU)
    copy = coming()
    result = machine.compute(lambda x: x + 1, copy)
    machine.computing.run_to(machine.computing.record_event())
    assert result.tolist() == [1, 2, 3]
    assert machine.used == [(copy.data_ptr(), machine.computing)]


def test_what_goes_to_the_host_is_computed_before_and_comes_back_as_it_is(machine):
    there = machine.compute(lambda x: x + 1, torch.arange(3.0))
    host = to_host(there)
    assert machine.used == [(there.data_ptr(), machine.copying)]
    result = machine.compute(lambda x: x * 2, to_device(host, GPU)())
    machine.computing.run_to(machine.computing.record_event())
    assert result.tolist() == [2, 4, 6]


def test_what_goes_and_what_comes_back_share_a_stream_and_weights_have_another(machine, monkeypatch):
    made = []
    monkeypatch.setattr(copies, "_copying", cache(COPYING.__wrapped__))
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: made.append(Stream(True)) or made[-1])
    to_device(to_host(torch.zeros(3).as_subclass(OnDevice)), GPU)
    assert len(made) == 1
    to_device(torch.zeros(3), GPU, unchanged=True)
    assert len(made) == 2


def test_weights_come_while_what_goes_to_the_host_is_still_computed(machine):
    machine.copying, machine.computing = Stream(False), Stream(False)
    machine.current = machine.computing
    there = machine.compute(lambda x: x + 1, torch.zeros(3))
    to_host(there)
    weights = to_device(torch.arange(3.0), GPU, unchanged=True)()
    machine.weights.synchronize()
    assert weights.tolist() == [0, 1, 2] and there.isnan().all()


def test_what_is_written_back_is_there_at_once(machine):
    there = machine.compute(lambda x: x + 1, torch.arange(3.0)).as_subclass(OnDevice)
    here, plain = torch.zeros(3, dtype=torch.float64), torch.zeros(2)
    write_back([(here, there), (plain, torch.ones(2))])
    assert here.tolist() == [1, 2, 3] and plain.tolist() == [1, 1]


def test_what_is_replaced_again_and_again_is_the_last(machine):
    stored = [_OnHost(torch.full((2,), float(k))) for k in range(4)]
    for each in stored:
        each._device = GPU
    for _ in range(3):
        for b in in_turn(stored):
            each = machine.compute(lambda x: 2 * x + 1, stored[b].read())
            stored[b].replace(each)
            stored[b]._device = GPU
    found = [machine.compute(lambda x: x, each.read()) for each in stored]
    machine.computing.run_to(machine.computing.record_event())
    assert [each.tolist() for each in found] == [[8.0 * k + 7] * 2 for k in range(4)]
