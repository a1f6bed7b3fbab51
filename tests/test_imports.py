"""What imports what: `import moonshot` is light, and imports point one way."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moonshot

ROOT = Path(moonshot.__file__).parent
HEAVY = {"torch", "cupy", "transformers", "datasets", "matplotlib"}

CORE = {
    "linalg",
    "problem",
    "patterns",
    "assembly",
    "objectives",
    "front",
    "branching",
    "relaxation",
    "certificate",
    "solvers",
}
# Each module or package of moonshot and which others it may import, in functions too.
MAY_IMPORT = {
    "threads": set(),
    "linalg": set(),
    "problem": {"linalg"},
    "patterns": {"linalg"},
    "assembly": {"problem", "linalg"},
    "objectives": {"assembly", "problem", "linalg"},
    "front": {"objectives", "assembly", "problem", "linalg"},
    "branching": {"problem", "linalg"},
    "relaxation": {"problem", "linalg"},
    "certificate": {"branching", "relaxation", "problem", "patterns", "linalg"},
    "solvers": {"certificate", "branching", "problem", "patterns", "linalg"},
    "checks": CORE,
    "models": {"objectives", "problem", "linalg"},
    "report": {"objectives", "patterns", "problem", "linalg"},
    "storage": {"models", "report", "patterns", "problem"},
    "evaluation": {"models", "report", "patterns", "problem", "linalg"},
    "planning": {"models", "objectives", "solvers", "patterns", "problem", "linalg"},
    "checkpoint": {"report"},
    "choosing": {"report"},
    "budgets": set(),
    "layerwise": {"models", "front", "objectives", "patterns", "problem", "linalg"},
    "walk": CORE | {"models", "checkpoint", "layerwise", "report", "evaluation"},
    "auto": {"models", "objectives", "choosing", "report", "walk"},
    "pruning": CORE | {"models", "checkpoint", "layerwise", "report", "walk", "auto"},
    "allocation": CORE
    | {"budgets", "models", "layerwise", "report", "evaluation", "choosing", "auto", "pruning"},
    "comparison": CORE | {"models", "report", "storage", "evaluation", "auto", "pruning", "allocation"},
}
MAY_IMPORT["cli"] = {"checks", "planning", *MAY_IMPORT["comparison"], "comparison"}
# Who may use the public names of `import moonshot`: nobody below them, or imports would go round.
PUBLIC_NAMES = {"cli"}
# Packages whose modules are plug-ins: they import no sibling but this one.
ONLY_SIBLING = {"solvers": "base"}
# Who may need torch to be imported at all.
TORCH = {
    "models",
    "layerwise",
    "checkpoint",
    "choosing",
    "planning",
    "walk",
    "auto",
    "pruning",
    "allocation",
    "evaluation",
    "storage",
    "comparison",
    "cli",
}

FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def dotted(path):
    """("solvers", "base") for moonshot/solvers/base.py; ("solvers",) for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def exists(parts):
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or path.is_dir()


def imported(tree, package):
    """Every module that `import` statements name, as tuples of its dotted parts, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ("moonshot", *package)[: len(package) + 2 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                deeper = (*base, alias.name)
                yield deeper if base[0] == "moonshot" and exists(deeper[1:]) else base


def at_import_time(tree):
    """The module without the bodies of its functions and of `if TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            node.body = []
    return tree


def complaints(parts, source, package=None):
    """What a module of moonshot with this source imports and may not."""
    package = parts[:-1] if package is None else package
    allowed = MAY_IMPORT.get(parts[0])
    if allowed is None:
        return [f"{parts[0]} is not in MAY_IMPORT: say there what it may import"]
    found = []
    for name in imported(ast.parse(source), package):
        if name[0] != "moonshot":
            continue
        inside = name[1:2] == parts[:1]
        if not (inside or name[1] in allowed if name[1:] else parts[0] in PUBLIC_NAMES):
            found.append(f"imports {'.'.join(name)}")
        sibling = ONLY_SIBLING.get(parts[0])
        if inside and sibling and len(parts) > 1 and name[2:3] != (sibling,):
            found.append(f"imports its sibling {'.'.join(name)}")
    for name in imported(at_import_time(ast.parse(source)), package):
        if name[0] in HEAVY and (parts[0] not in TORCH or (name[0] != "torch" and parts[0] in CORE)):
            found.append(f"imports {name[0]} when it is imported")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(dotted(path)))
def test_imports_point_downwards(path):
    parts = dotted(path)
    package = parts if path.name == "__init__.py" else parts[:-1]
    assert complaints(parts, path.read_text("utf-8"), package) == []


def test_the_table_has_no_cycle():
    done = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, below in MAY_IMPORT.items() if below <= done} - done
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg.backend", "from moonshot.problem import Problem"),
        ("linalg.backend", "def f():\n    import moonshot.patterns"),
        ("problem", "from moonshot import patterns"),
        ("problem", "import moonshot"),
        ("problem", "from . import patterns"),
        ("linalg.backend", "from ..problem import Problem"),
        ("solvers.sparsegpt", "from moonshot.solvers.diagonal import Magnitude"),
        ("solvers.sparsegpt", "from moonshot.solvers import Magnitude"),
        ("solvers.sparsegpt", "from .diagonal import Magnitude"),
        ("solvers.sparsegpt", "import torch"),
        ("objectives", "if True:\n    from torch import Tensor"),
        ("report", "import matplotlib.pyplot as plt"),
        ("report", "import torch"),
        ("novel", "import math"),
    ],
)
def test_the_checks_catch(module, source):
    assert complaints(tuple(module.split(".")), source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg.backend", "def f():\n    import torch"),
        ("linalg.hessian", "from moonshot.linalg.factor import cholesky"),
        ("linalg.hessian", "from .factor import cholesky"),
        ("solvers.sparsegpt", "from moonshot.solvers.base import Answer"),
        ("solvers.sparsegpt", "from moonshot.linalg import kernels_cpu"),
        ("objectives", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("pruning", "import torch"),
        ("cli", "from moonshot import ADMM"),
    ],
)
def test_the_checks_let_pass(module, source):
    assert complaints(tuple(module.split(".")), source) == []


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_moonshot_loads_nothing_heavy():
    loaded = loaded_after("import moonshot")
    assert "moonshot" in loaded and not loaded & HEAVY


def test_the_core_solves_a_problem_without_torch():
    loaded = loaded_after(
        "import numpy as np\n"
        "from moonshot.objectives import Fisher, Reconstruction\n"
        "from moonshot.solvers import SparseGPT, solve\n"
        "x, g, w = np.eye(8), np.ones((2, 4, 8)), np.ones((4, 8))\n"
        "solve((Reconstruction() + Fisher()).problem(w, inputs=x, gradients=g), '2:4', SparseGPT())"
    )
    assert "numba" in loaded and not loaded & HEAVY


def test_what_openblas_waits_for_is_set_before_numpy_is_loaded():
    code = """
import os, sys
class Watch:
    def find_spec(name, *_):
        if name == "numpy":
            print(os.environ["OPENBLAS_THREAD_TIMEOUT"])
sys.meta_path.insert(0, Watch)
import moonshot
"""
    for variables, waits in ({}, "6"), ({"OPENBLAS_THREAD_TIMEOUT": "20"}, "20"):
        kept = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=kept | variables, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [waits]
