"""The first few values of a function are kept, and no more."""

from moonshot.linalg.cache import FirstFewCache


def test_the_first_values_are_kept():
    asked = []
    find = FirstFewCache(lambda *arguments: asked.append(arguments) or len(asked))
    first = [find(shift, "float32") for shift in range(6)]
    assert first == [1, 2, 3, 4, 5, 6]
    assert [find(shift, "float32") for shift in range(6)] == [1, 2, 3, 4, 7, 8]
    assert find(0, "float64") == 9
    assert asked == [*((k, "float32") for k in (0, 1, 2, 3, 4, 5, 4, 5)), (0, "float64")]
