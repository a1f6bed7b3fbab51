"""Every error a user can make is a MoonshotError."""

import ast
import importlib
import inspect
from functools import partial
from math import inf, isfinite, nan

import numpy as np
import pytest
import torch

import moonshot as ms
from moonshot.errors import meant_path
from strategies import random_layer
from test_imports import FILES, dotted


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(dotted(path)))
def test_no_plain_value_or_type_error_is_raised(path):
    plain = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func) in ("ValueError", "TypeError")
    ]
    assert plain == [], "raise ArgumentError or ArgumentTypeError of moonshot.errors, or one of your own"


def test_the_errors_of_every_module_have_one_base():
    modules = [importlib.import_module(".".join(("moonshot", *dotted(path)))) for path in FILES]
    errors = {
        kind
        for module in modules
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if name.endswith("Error") and kind.__module__.startswith("moonshot")
    } - {ms.checks.faults.CheckError}  # what a plug-in of one's own does wrong, as an assertion
    assert len(errors) >= 13
    assert all(issubclass(kind, ms.MoonshotError) for kind in errors)
    assert issubclass(ms.MoonshotError, ValueError)


OPTIONS = {
    ms.ADMM: {"rho", "growth", "tolerance", "iterations", "refits"},
    ms.IHT: {"iterations", "steps", "refits"},
    ms.SparseGPT: {"block"},
    ms.Exact: {"nodes", "seconds"},
    partial(ms.Swaps, ms.Wanda()): {"moves"},
    ms.Refit: {"epochs", "steps", "lr", "share"},
}
NUMBERS = (0, -1, 1, 2**40, 10**400, 0.5, nan, inf, -inf, 1e300, 1e-300, np.float32(2), np.int64(3))
OTHERS = (True, np.True_, "1", [1], 1j, np.ones(2), torch.tensor(1.0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "option"), [(kind, option) for kind, options in OPTIONS.items() for option in sorted(options)]
)
def test_an_option_of_any_value_is_refused_by_name_or_gives_an_answer(kind, option):
    for value in OTHERS:
        with pytest.raises(ms.MoonshotError, match=f"^{option} must be a"):
            kind(**{option: value})
    for value in NUMBERS:
        try:
            made = kind(**{option: value})
        except ms.MoonshotError as error:
            assert str(error).startswith(f"{option} must be ")
        else:
            if kind is not ms.Refit:
                assert isfinite(ms.solve(random_layer(0, 2, 8, 2).problem, "2:4", made).value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("modle", "model"),
        ("modle/wieghts.txt", "model/weights.txt"),
        ("model/nothing", None),
        ("x/y", None),
        ("m" * 300, None),
        ("model", None),
    ],
)
def test_a_path_that_is_nearly_there(tmp_path, wrong, meant):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.txt").touch()
    asked = "" if meant is None else f"; did you mean {tmp_path / meant}?"
    assert meant_path(tmp_path / wrong) == asked


def test_a_wrong_kind_is_a_type_error_too():
    with pytest.raises(TypeError) as error:
        ms.NM(2.0, 4)
    assert isinstance(error.value, ms.MoonshotError)
