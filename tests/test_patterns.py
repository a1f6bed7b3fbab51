"""Patterns: how they are written, how many zeros they give, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import Backend
from moonshot.layer.columns import Columns
from moonshot.layer.patterns import NM, PatternError, PatternMismatchError, Unstructured, as_pattern, stages

NUMPY = Backend("numpy")


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        (0.5, Unstructured(0.5)),
        (0, Unstructured(0)),
        (1, Unstructured(1)),
        (np.float32(0.5), Unstructured(0.5)),
        ("0.5", Unstructured(0.5)),
        (".5", Unstructured(0.5)),
        ("0", Unstructured(0)),
        ("50%", Unstructured(0.5)),
        ("62.5 %", Unstructured(0.625)),
        (" 100% ", Unstructured(1)),
        ("2:4", NM(2, 4)),
        (" 1 : 4 ", NM(1, 4)),
        ("0:4", NM(0, 4)),
        ("4:4", NM(4, 4)),
        ("16:32", NM(16, 32)),
        (NM(2, 4), NM(2, 4)),
        (Unstructured(0.3, "row"), Unstructured(0.3, "row")),
    ],
)
def test_spellings(written, pattern):
    assert as_pattern(written) == pattern


@pytest.mark.parametrize("pattern", [Unstructured(0.625), NM(2, 4), Unstructured(0)])
def test_what_a_pattern_prints_is_read_back(pattern):
    assert as_pattern(str(pattern)) == pattern


UNREADABLE = [
    "",
    "2:0",
    "0:0",
    "4:2",
    "5:4",
    "-2:4",
    "2:4:8",
    "2:",
    "abc",
    "-0.1",
    "-50%",
    "1.5",
    "150%",
    "nan",
]


@pytest.mark.parametrize("written", [*UNREADABLE, "1e-1", -0.1, 1.5, 50, math.nan, math.inf])
def test_contradictory_patterns_are_refused(written):
    with pytest.raises(PatternError):
        as_pattern(written)


@pytest.mark.parametrize("written", [True, False, None, [2, 4], (2, 4), b"2:4", 1j, NM, {"n": 2}])
def test_what_is_no_pattern_is_refused(written):
    with pytest.raises(TypeError, match='a pattern is 0.5, "50%", "2:4"'):
        as_pattern(written)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Unstructured("0.5"), TypeError, "sparsity must be a number from 0 to 1"),
        (lambda: Unstructured(True), TypeError, "sparsity must be a number from 0 to 1"),
        (lambda: Unstructured(50), PatternError, 'write "50%" for a percentage'),
        (lambda: Unstructured(0.5, "column"), PatternError, 'scope must be "layer" or "row"'),
        (lambda: NM(2.0, 4), TypeError, "n of an N:M pattern must be an integer"),
        (lambda: NM(1, True), TypeError, "m of an N:M pattern must be an integer"),
        (lambda: NM(4, 2), PatternError, "keeps n of every m"),
    ],
)
def test_constructors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def score_sets(shape, seed=0):
    """Scores without ties, with some and with nothing else."""
    rng = np.random.default_rng(seed)
    return [rng.random(shape), rng.integers(0, 3, shape).astype(float), np.zeros(shape), np.full(shape, np.inf)]


def assert_pruned_by_score(pattern, backend, scores, groups, zeros):
    """That every one of `groups` equal parts has so many zeros, none of them where a score is above one that stays."""
    mask = pattern.keep(backend.array(scores))
    pattern.check(mask)
    kept = backend.numpy(mask)
    assert kept.dtype == bool and kept.shape == scores.shape
    assert pattern.zeros(scores.shape) == groups * zeros
    assert pattern.groups(scores.shape) == (scores.size // groups, zeros)
    for values, chosen in zip(scores.reshape(groups, -1), kept.reshape(groups, -1), strict=True):
        assert (~chosen).sum() == zeros
        assert not chosen.any() or chosen.all() or values[chosen].min() >= values[~chosen].max()


# Nothing, one weight, what rounds down and up, ties of rounding (2.5 and 0.5 zeros), all but one, everything.
BUDGETS = [
    ((3, 8), 0),
    ((3, 8), 0.03),
    ((5, 12), 1 / 3),
    ((1, 5), 0.5),
    ((1, 1), 0.5),
    ((7, 1), 0.6),
    ((1, 7), 0.625),
    ((5, 12), 0.983),
    ((5, 12), 0.999),
    ((3, 8), 1),
]


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_unstructured_zeros_are_exact_with_and_without_ties(backend, scope):
    for shape, sparsity in BUDGETS:
        groups = shape[0] if scope == "row" else 1
        zeros = round(sparsity * shape[0] * shape[1] / groups)
        for scores in score_sets(shape):
            assert_pruned_by_score(Unstructured(sparsity, scope), backend, scores, groups, zeros)


def test_groups_keep_n_of_every_m_with_and_without_ties(backend):
    for n, m in [(0, 4), (1, 4), (2, 4), (4, 4), (0, 1), (1, 1), (1, 12), (3, 6)]:
        for scores in score_sets((5, 12)):
            assert_pruned_by_score(NM(n, m), backend, scores, 60 // m, m - n)


@pytest.mark.fresh
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.data())
def test_random_sizes(seed, m, d, sparsity, data):
    group = data.draw(st.integers(1, 32), "group")
    n = data.draw(st.integers(0, group), "n")
    for scores in score_sets((m, d), seed):
        assert_pruned_by_score(Unstructured(sparsity), NUMPY, scores, 1, round(sparsity * m * d))
        assert_pruned_by_score(Unstructured(sparsity, "row"), NUMPY, scores, m, round(sparsity * d))
    for scores in score_sets((m, group * d), seed):
        assert_pruned_by_score(NM(n, group), NUMPY, scores, m * d, group - n)


@pytest.mark.fresh
@given(st.floats(0, 1), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_a_budget_handed_out_in_parts_adds_up_and_is_even(sparsity, m, d, block):
    pattern = Unstructured(sparsity)
    stops = [*range(0, d, block), d]
    through = [pattern.zeros_through(m * stop, m * d) for stop in stops]
    assert through[0] == 0 and through[-1] == pattern.zeros((m, d))
    for start, stop, before, after in zip(stops, stops[1:], through, through[1:], strict=False):
        assert 0 <= after - before <= m * (stop - start)
        assert abs(after - before - sparsity * m * (stop - start)) <= 2


@pytest.mark.parametrize("inputs", [1, 3, 6, 4095])
def test_groups_that_do_not_divide_the_inputs_are_refused(inputs):
    for use in (
        lambda: NM(2, 4).validate((2, inputs)),
        lambda: NM(2, 4).keep(np.ones((2, inputs))),
        lambda: NM(2, 4).check(np.ones((2, inputs), bool)),
    ):
        with pytest.raises(PatternError, match=f"divisible by 4, this layer has {inputs}: leave the layer out"):
            use()


@pytest.mark.parametrize("array", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)], ids=str)
def test_a_mask_off_by_one_is_caught(pattern, array):
    mask = pattern.keep(np.random.default_rng(0).random((4, 8)))
    pattern.check(array(mask))
    for cell in [(0, 0), (3, 7), (2, 4)]:
        wrong = mask.copy()
        wrong[cell] ^= True
        with pytest.raises(PatternMismatchError, match=str(pattern)):
            pattern.check(array(wrong))


@pytest.mark.parametrize("array", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_the_right_number_of_zeros_in_the_wrong_place_is_caught(array):
    mask = np.zeros((2, 8), bool)
    mask[0] = True
    Unstructured(0.5).check(array(mask))
    with pytest.raises(PatternMismatchError, match="the same number of zeros in every row"):
        Unstructured(0.5, "row").check(array(mask))
    mask = np.array([[1, 1, 1, 0, 1, 0, 0, 0]], bool)
    with pytest.raises(PatternMismatchError, match="does not keep 2"):
        NM(2, 4).check(array(mask))


@given(
    st.one_of(
        st.builds(Unstructured, st.floats(0, 1), st.sampled_from(["layer", "row"])),
        st.integers(1, 8).flatmap(lambda m: st.builds(NM, st.integers(0, m), st.just(m))),
        st.builds(Columns, st.floats(0, 1), st.just(2)),
    ),
    st.integers(1, 5),
)
def test_stages_have_fewer_and_fewer_nonzeros(pattern, count):
    found = stages(pattern, count)
    assert found[-1] == pattern and len(found) <= count and {type(each) for each in found} == {type(pattern)}
    zeros = [each.zeros((8, 840)) for each in found]
    assert zeros == sorted(zeros)
    if isinstance(pattern, NM):
        assert len(set(zeros)) == len(zeros) and (zeros[0] > 0 or zeros == [0])


def test_the_share_of_nonzeros_falls_by_the_same_factor():
    assert [str(each) for each in stages(Unstructured(0.96), 2)] == ["80%", "96%"]
    assert [str(each) for each in stages(Unstructured(0.999, "row"), 3)] == [
        "90% per row",
        "99% per row",
        "99.9% per row",
    ]
    assert stages(NM(2, 4), 4) == [NM(3, 4), NM(2, 4)] and stages(NM(1, 4), 2) == [NM(2, 4), NM(1, 4)]
    assert stages(0.5, 3) == [0.5]  # what has no `eased` is reached at once


def test_groups_longer_than_a_byte_counts():
    pattern, scores = NM(300, 512), np.random.default_rng(0).random((2, 1024))
    mask = pattern.keep(scores)
    pattern.check(mask)
    mask[0, :256] = ~mask[0, :256]  # as many nonzeros modulo 256, or near to it, is not as many
    with pytest.raises(PatternMismatchError):
        pattern.check(mask)
    with pytest.raises(PatternMismatchError):
        NM(44, 512).check(pattern.keep(scores))
