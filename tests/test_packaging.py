"""A base install prunes; what an extra brings is asked for in one line; the source tree alone is enough."""

import subprocess
import sys
from pathlib import Path

import pytest

import moonshot

ROOT = Path(moonshot.__file__).parent.parent
EXTRAS = ("datasets", "matplotlib", "PIL", "psutil", "rich", "transformers", "typer", "yaml")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"
UNINSTALLED = """
import importlib.metadata

def distribution(name, found=importlib.metadata.distribution):
    if name == "moonshot":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.distribution = distribution
"""
PRUNE = """
import numpy as np
import torch
import moonshot as ms

x, g, w = np.eye(8), np.ones((2, 4, 8)), np.ones((4, 8))
assert ms.solve((ms.Reconstruction() + ms.Fisher()).problem(w, inputs=x, gradients=g), "2:4", ms.ADMM()).sparsity == 0.5
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
batch = torch.randn(16, 8), torch.randint(4, (16,))


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


report = ms.prune(model, [batch], "50%", loss=loss)
print(report.sparsity, report.versions["moonshot"])
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_a_source_tree_and_the_base_packages_are_enough_to_prune():
    done = python(WITHOUT + UNINSTALLED + PRUNE)
    assert done.stdout.split() == ["0.5", moonshot.__version__], done.stderr


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from moonshot.storage import load; load('model')", "cli"),
        ("from moonshot.storage import read_text; read_text('wikitext')", "cli"),
        ("from moonshot.models.images import find_pictures; find_pictures('images')", "vision"),
        ("from moonshot.files.plan import free_memory; import torch; free_memory(torch.device('cpu'))", "cli"),
        ("from moonshot.pruning.picture import blank; blank(1, 1)", "cli"),
    ],
)
def test_what_is_missing_names_its_extra(code, extra):
    done = python(WITHOUT + code)
    assert done.stderr.splitlines()[-1].startswith("ImportError: "), done.stderr
    assert f"pip install 'moonshot[{extra}]'" in done.stderr.splitlines()[-1]


def test_the_command_line_without_its_extra_says_so_in_one_line():
    done = python(WITHOUT + "import runpy; runpy.run_module('moonshot', run_name='__main__')")
    assert done.returncode == 1 and done.stderr == (
        "moonshot: rich is not installed: pip install 'moonshot[cli]' brings it\n"
    )
