"""Every error a user can make is a MoonshotError."""

import ast
import importlib
import inspect

import pytest

import moonshot as ms
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


def test_a_wrong_kind_is_a_type_error_too():
    with pytest.raises(TypeError) as error:
        ms.NM(2.0, 4)
    assert isinstance(error.value, ms.MoonshotError)
