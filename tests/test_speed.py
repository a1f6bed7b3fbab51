"""The speed benchmark: what it divides by what, what it calls slower, and that no solver falls out of it."""

import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

import moonshot as ms
from benchmarks.speed import __main__ as command
from benchmarks.speed import cases, growth, machine, timing
from benchmarks.speed.record import Record, RecordError, changes
from benchmarks.speed.timing import Case, Figure, Measured, alternate, measured
from moonshot import solvers

ONE = Figure(1, 1, 1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only what is timed moves on: `clock(name, seconds)` is a run that takes its next of `seconds`."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run(name, *seconds):
        left = iter(seconds)

        def take():
            calls.append(name)
            now[0] += next(left)
            return name

        return take

    run.calls = calls
    return run


def test_a_case_is_warmed_up_and_divided_round_by_round(clock):
    runs = {"ours": clock("ours", 99, 1, 2, 6), "theirs": clock("theirs", 99, 2, 8, 3)}
    figures = measured(
        Case("", runs, (("ours", "theirs"),), {"ours": 3, "theirs": 4}.get, (("ours", "theirs"),)), 3
    )
    assert figures.ratios == {"ours / theirs": Figure(0.5, 0.25, 2.0)}
    assert figures.seconds == {"ours": Figure(2, 1, 6), "theirs": Figure(3, 2, 8)}
    assert figures.values == {"ours / theirs": 0.75}


def test_every_round_begins_with_another_run(clock):
    alternate({name: clock(name, 1, 1, 1, 1) for name in "abc"}, 4)
    assert "".join(clock.calls) == "abcbcacababc"


def test_a_slow_case_has_few_rounds(clock):
    assert alternate({"a": clock("a", *[10] * 9)}, 9, seconds=1) == {"a": [10] * timing.LEAST_ROUNDS}
    assert alternate({"a": clock("a", *[10] * 9)}, 9, seconds=45) == {"a": [10] * 5}
    assert alternate({"a": clock("a", *[10] * 9)}, 2, seconds=1) == {"a": [10] * 2}


def record(ratio, seconds=ONE, value=1.0, **of_machine):
    case = Measured({"a / b": ratio}, {"a": seconds}, {"a / b": value})
    return Record("2026-01-02T03:04:05Z", {"processor": "one", **of_machine}, {"commit": None}, {"case": case})


EARLIER = record(Figure(1.0, 0.9, 1.1), Figure(2, 1.8, 2.2), 1.0)


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (record(Figure(1.5, 1.2, 1.6), Figure(2, 1.8, 2.2)), [("ratios", "slower")]),
        (record(Figure(0.5, 0.4, 0.8), Figure(2, 1.8, 2.2)), [("ratios", "faster")]),
        (record(Figure(1.5, 1.05, 1.6), Figure(2, 1.8, 2.2)), []),  # the rounds of both overlap
        (record(Figure(1.0, 0.9, 1.1), Figure(3, 2.9, 3.2)), [("seconds", "slower")]),
        (record(Figure(1.0, 0.9, 1.1), Figure(2, 1.8, 2.2), 1.01), [("values", "worse")]),
        (record(Figure(1.0, 0.9, 1.1), Figure(2, 1.8, 2.2), 0.9), [("values", "better")]),
        (record(Figure(1.0, 0.9, 1.1), Figure(2, 1.8, 2.2), 1.0005), []),  # rounding
        (
            record(Figure(1.5, 1.2, 1.6), Figure(3, 2.9, 3.2), 2.0),
            [("ratios", "slower"), ("values", "worse"), ("seconds", "slower")],
        ),
    ],
)
def test_what_moved_beyond_both_spreads_is_named(now, found):
    assert [(change.kind, change.verdict) for change in changes(now, EARLIER)] == found


def test_a_narrow_spread_does_not_make_a_difference_matter():
    a, b = record(Figure(1.0, 0.999, 1.001)), record(Figure(1.01, 1.009, 1.011))
    assert changes(b, a) == [] and changes(a, b) == []


def test_a_change_says_what_and_how_much():
    (change,) = changes(record(Figure(1.5, 1.2, 1.6), Figure(2, 1.8, 2.2)), EARLIER)
    assert str(change) == "slower: case: a / b: 1.5 (1.2 to 1.6), was 1 (0.9 to 1.1)"


@given(st.lists(st.floats(0.01, 100), min_size=1), st.lists(st.floats(0.01, 100), min_size=1))
def test_what_is_slower_one_way_is_faster_the_other(xs, ys):
    a, b = record(Figure.of(xs)), record(Figure.of(ys))
    there, back = changes(a, b), changes(b, a)
    assert len(there) == len(back) <= 1 and changes(a, a) == []
    assert {change.verdict for change in there + back} in (set(), {"slower", "faster"})
    assert bool(there) <= (min(xs) > max(ys) or max(xs) < min(ys))


def test_cases_that_only_one_run_has_are_not_compared():
    assert changes(replace(EARLIER, cases={}), EARLIER) == changes(EARLIER, replace(EARLIER, cases={})) == []


def test_another_machine_is_not_compared():
    other = record(Figure(9, 9, 9), threads=2)
    with pytest.raises(ValueError, match="measure both on one"):
        changes(other, EARLIER)
    lines = command.comparison(other, EARLIER)
    assert "another machine" in lines[0] and not any("slower" in line for line in lines)


def test_seconds_are_told_apart_from_ratios():
    assert command.comparison(EARLIER, EARLIER)[1:] == ["  no ratio has changed"]
    now = record(Figure(1.5, 1.2, 1.6), Figure(3, 2.9, 3.2), 2.0)
    _, ratio, value, heading, seconds = command.comparison(now, EARLIER)
    assert "slower: case: a / b: 1.5" in ratio and "worse: case: a / b in value: 2" in value
    assert "machine" in heading and "slower: case: a s: 3" in seconds
    assert command.comparison(replace(now, cases={}), EARLIER) == [
        f"the run of {EARLIER.date} has none of these cases"
    ]


def test_a_record_survives_the_file_and_keeps_the_one_before(tmp_path):
    path = tmp_path / "outputs" / "speed.json"
    assert EARLIER.save(path) is None
    assert Record.load(path) == EARLIER
    now = record(Figure(9, 9, 9))
    kept = now.save(path)
    assert kept == path.with_name("speed-2026-01-02T03-04-05Z.json")
    assert (Record.load(path), Record.load(kept)) == (now, EARLIER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"date": "", "machine": {}, "versions": {}, "cases": []}',
        '{"date": "", "machine": {}, "versions": {}, "cases": {"a": {"ratios": {"b": 1}}}}',
    ],
)
def test_a_broken_record_says_what_to_do(tmp_path, monkeypatch, text):
    path = tmp_path / "speed.json"
    path.write_text(text)
    monkeypatch.setattr(command, "measured", lambda *_: pytest.fail("it measured before it looked"))
    with pytest.raises(RecordError, match=r"speed\.json is not a record .* delete it or move it away"):
        command.main(["--output", str(path)])
    with pytest.raises(RecordError):
        EARLIER.save(path)
    assert path.read_text() == text


@pytest.fixture(scope="module")
def tiny():
    """The figures of every case on a tiny layer, and the names of the solvers that were asked in each."""
    asked, found = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in public_solvers():

            def spied(self, *arguments, _compute=kind.compute, _name=kind.__name__):
                asked[case.__name__].add(_name)
                return _compute(self, *arguments)

            patch.setattr(kind, "compute", spied)
        for case in cases.CASES:
            asked[case.__name__] = set()
            found[case.__name__] = measured(case(16, 16, 2), 1)
    return found, asked


def public_solvers():
    public = [getattr(solvers, name) for name in solvers.__all__]
    return [item for item in public if hasattr(item, "compute") and item is not ms.Solver]


def test_every_public_solver_is_timed(tiny):
    names = {kind.__name__ for kind in public_solvers()}
    assert len(names) >= 8
    assert set.union(*tiny[1].values()) == names
    assert names <= {grown.name for grown in growth.GROWN} | {"Exact"}  # whose time depends on the data alone


def test_every_case_has_a_peer_or_a_floor_and_figures(tiny):
    for name, figures in tiny[0].items():
        assert figures.ratios, name
        for figure in (*figures.ratios.values(), *figures.seconds.values()):
            assert 0 < figure.low <= figure.median <= figure.high


def test_answers_agree_with_the_references(tiny):
    found, _ = tiny
    for case, pair in [
        ("diagonal", "Wanda / torch Wanda"),
        ("sweep", "single / torch"),
        ("obs", "OBS / torch OBC"),
        ("exact", "Exact / enumeration"),
    ]:
        assert found[case].values[pair] == pytest.approx(1, abs=1e-4), case
    assert found["swaps"].values["Swaps(ADMM) / ADMM"] <= 1 + 1e-6


def test_the_products_of_a_run_are_counted():
    layer = cases.random_layer(6, 16, 2)
    one = cases.rows_multiplied(layer.joint(), ms.IHT(iterations=1, steps=3, refits=2))
    # the start's refit and its gradient; the step's; a refit and its gradient before the end
    assert one == [6] * ((1 + 2) + 1 + (1 + 3) + 1 + (1 + 2) + 1)
    whole = cases.rows_multiplied(layer.joint(), ms.IHT())
    assert len(whole) > len(one) and whole[0] == 6 and min(whole) < 6  # rows that have settled are left out
    # two iterations; the refit's start and steps; the losses of the answer and of both starts
    assert cases.rows_multiplied(layer.single(), ms.ADMM(iterations=2, refits=3)) == [6] * (2 + (1 + 3) + 3)
    assert cases.rows_multiplied(layer.joint(), ms.SparseGPT()) == []


def test_the_command_compares_with_the_run_before(tmp_path, monkeypatch, capsys):
    path, arguments = tmp_path / "speed.json", ["--size", "16", "--factors", "2", "--runs", "1"]
    ratio = [Figure(1, 1, 1)]
    monkeypatch.setattr(
        command, "measured", lambda case, rounds, seconds: Measured({"a / b": ratio[0]}, {"a": ratio[0]})
    )
    command.main([*arguments, "--output", str(path)])
    assert "no earlier run" in capsys.readouterr().out
    ratio[0] = Figure(2, 2, 2)
    command.main([*arguments, "--output", str(path), "--cases", "sweep"])
    out = capsys.readouterr().out
    assert "slower: SparseGPT, 16 x 16, n = 2: a / b: 2 (2 to 2), was 1 (1 to 1)" in out
    assert json.loads(path.read_text())["cases"]["SparseGPT, 16 x 16, n = 2"]["ratios"]["a / b"]["median"] == 1
    command.main([*arguments, "--output", str(path)])
    assert "faster" not in capsys.readouterr().out
    assert Record.load(path).machine == machine.machine()
    assert len(list(tmp_path.iterdir())) == 2
    assert len(Record.load(path).cases) == len(cases.CASES)


def test_rows_and_columns_may_differ(tmp_path, capsys):
    options = ["--size", "8", "16", "--factors", "2", "--runs", "1", "--output", str(tmp_path / "speed.json")]
    command.main([*options, "--cases", "sweep"])
    out = capsys.readouterr().out
    assert "SparseGPT, 8 x 16, n = 2" in out and "joint / torch" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "6"], "multiple of 4"),
        (["--size", "8", "6"], "multiple of 4"),
        (["--size", "8", "8", "8"], "one or two"),
        (["--factors", "0"], "1 or more"),
        (["--cases", "none"], "invalid choice"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_machine_is_described():
    found, versions = machine.machine(), machine.versions()
    assert found["cores"] >= 1 and found["memory, GiB"] >= 1 and found["processor"]
    assert {"python", "numpy", "scipy", "numba", "torch", "moonshot", "commit"} == set(versions)


def test_other_threads_are_another_machine(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    assert machine.machine()["threads of BLAS"] == "7"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.versions()["commit"] is None


@given(st.floats(0.25, 4), st.floats(0.01, 100))
def test_the_exponent_of_a_power_is_its_own(power, scale):
    sizes = [10, 20, 40, 80]
    figures = [1e9, 1e-9] + [scale * size**power for size in sizes[2:]]  # the lower half does not count
    assert growth.exponent(sizes, figures) == pytest.approx(power)


def test_growth_is_timed_at_the_sizes_it_says(clock):
    grown = growth.Grown("", growth.Size(8, 16), ("m",), lambda s: clock(s.m, *[s.m**2] * 9), lambda s: s.m**3)
    sizes, seconds, measured_exponent, counted = growth.grow(grown, "m", 2)
    assert sizes == [2, 4, 8, 16] and seconds == [4, 16, 64, 256]
    assert (measured_exponent, counted) == (pytest.approx(2), pytest.approx(3))


@pytest.mark.parametrize("grown", growth.GROWN, ids=lambda grown: grown.name)
def test_everything_that_grows_runs_and_is_counted(grown):
    for dimension in grown.dimensions:
        assert getattr(grown.base, dimension) % 4 == 0 or dimension == "n"
    tiny = growth.Size(4, 8, 2, 8)
    assert grown.prepared(tiny)() is not None
    for dimension in grown.dimensions:
        counts = [grown.count(size) for size in growth.Size(64, 64, 16, 64).grown(dimension)]
        assert counts == sorted(set(counts))


def test_growth_prints_a_row_for_each_dimension(monkeypatch, capsys):
    small = replace(growth.GROWN[0], base=growth.Size(16, 16, 1))
    monkeypatch.setattr(growth, "GROWN", (small, *growth.GROWN[1:]))
    growth.main(["--only", small.name, "--runs", "1"])
    out = capsys.readouterr().out
    assert f"{small.name}, 16 x 16, n = 1" in out
    assert out.count("4 to 32") == len(small.dimensions) and out.count("1.00") >= 2
    with pytest.raises(SystemExit):
        growth.main(["--runs", "0"])


def test_large_layers_have_the_shapes_of_a_llama(monkeypatch):
    monkeypatch.setattr(cases, "LARGE_SHAPES", ((4, 8), (8, 4)))
    names = [case.name for case in cases.large_cases(("sweep", "admm", "obs"), 1)]
    assert names == [
        f"{name}, {shape}, n = 1" for shape in ("4 x 8", "8 x 4") for name in ("SparseGPT", "ADMM")
    ]
