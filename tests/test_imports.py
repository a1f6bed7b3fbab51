"""What imports what: `import moonshot` is light, and imports point one way."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moonshot

ROOT = Path(moonshot.__file__).parent
HEAVY = {"torch", "cupy", "transformers", "datasets", "matplotlib", "PIL", "psutil"}

# The folders of moonshot, from the ground up: each may import those before it, in functions too.
FLOORS = ("linalg", "layer", "bounds", "solvers", "checks", "models", "pruning", "files", "app")
# What has to be at the top level, and what it may import: what must be first, old names, and the way in.
TOP_LEVEL = {
    "threads": (),
    "errors": (),
    "extras": (),
    "evaluation": ("models",),
    "storage": ("files",),
    "__main__": ("app",),
}
MAY_IMPORT = {floor: {*FLOORS[:height]} for height, floor in enumerate(FLOORS)}
MAY_IMPORT |= {name: set(below) for name, below in TOP_LEVEL.items()}
# Everybody may say which extra brings what is missing, and what a user's mistake is.
for allowed in MAY_IMPORT.values():
    allowed |= {"extras", "errors"}
# What does not need a floor below it although it could.
MAY_IMPORT["models"] -= {"bounds", "solvers", "checks"}
MAY_IMPORT["pruning"] -= {"checks"}
MAY_IMPORT["files"] -= {"checks", "bounds"}
# Who may use the public names of `import moonshot`: nobody below them, or imports would go round.
PUBLIC_NAMES = {"app"}
# Packages whose modules are plug-ins: they import no sibling but this one, and their own kernels.
ONLY_SIBLING = {"solvers": "base"}
# Who may need torch to be imported at all.
TORCH = {"models", "pruning", "files", "app", "evaluation", "storage", "__main__"}
CORE = {"linalg", "layer", "bounds", "solvers", "checks"}

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
        own = len(parts) > 1 and len(name) > 2 and name[2].split("_")[0] == parts[1].split("_")[0]
        if inside and sibling and len(parts) > 1 and name[2:3] != (sibling,) and not own:
            found.append(f"imports its sibling {'.'.join(name)}")
    for name in imported(at_import_time(ast.parse(source)), package):
        if name[0] in HEAVY and (parts[0] not in TORCH or name[0] != "torch"):
            found.append(f"imports {name[0]} when it is imported")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(dotted(path)))
def test_imports_point_downwards(path):
    parts = dotted(path)
    package = parts if path.name == "__init__.py" else parts[:-1]
    assert complaints(parts, path.read_text("utf-8"), package) == []


def test_the_top_level_has_only_what_must_be_there():
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", *TOP_LEVEL}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == {*FLOORS, "demo"}


def test_modules_of_a_folder_import_each_other_one_way():
    below = {}
    for path in FILES:
        parts = dotted(path)
        if len(parts) < 2 or path.name == "__init__.py":
            continue
        names = imported(ast.parse(path.read_text("utf-8")), parts[:-1])
        below[parts] = {name[1:3] for name in names if name[1:2] == parts[:1] and len(name) > 2} - {parts}
    done = set()
    while len(done) < len(below):
        ready = {parts for parts, names in below.items() if names & set(below) <= done} - done
        assert ready, f"a circle among {sorted('.'.join(parts) for parts in set(below) - done)}"
        done |= ready


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg.backend", "from moonshot.layer.problem import Problem"),
        ("linalg.backend", "def f():\n    import moonshot.layer.patterns"),
        ("layer.problem", "from moonshot.bounds import certificate"),
        ("layer.problem", "import moonshot"),
        ("layer.problem", "from ..solvers import base"),
        ("linalg.backend", "from ..layer.problem import Problem"),
        ("models.layers", "from moonshot.pruning.report import Report"),
        ("pruning.prune", "from moonshot.files.load import load"),
        ("solvers.sparsegpt", "from moonshot.solvers.diagonal import Magnitude"),
        ("solvers.sparsegpt", "from moonshot.solvers import Magnitude"),
        ("solvers.sparsegpt", "from .diagonal import Magnitude"),
        ("solvers.sparsegpt", "from moonshot.solvers import obs_kernels"),
        ("solvers.sparsegpt", "import torch"),
        ("layer.objectives", "if True:\n    from torch import Tensor"),
        ("pruning.report", "import matplotlib.pyplot as plt"),
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
        ("solvers.sparsegpt", "from moonshot.solvers import sparsegpt_kernels"),
        ("solvers.obs_kernels", "from moonshot.solvers.obs_batched import LOST"),
        ("solvers.sparsegpt", "from moonshot.linalg import kernels"),
        ("layer.objectives", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("pruning.prune", "import torch"),
        ("app.cli", "from moonshot import ADMM"),
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
        "from moonshot.layer.objectives import Fisher, Reconstruction\n"
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
