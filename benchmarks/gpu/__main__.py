"""Run the GPU tests, then time every solver, `prune` and what it leaves on one CUDA device, beside references in torch.

    python -m benchmarks.gpu [--parts tests layers models sparse] [--seconds N] [--output FILE]

Under eight minutes on an H100: each part has a limit of its own, and what it does not reach is said. The table is
printed and written as JSON, with the card's name.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch

from ..speed.machine import versions
from .layers import time_layer
from .models import time_model, time_reference, time_refit
from .rows import Row, Rows
from .sparse import time_sparse

ROOT = Path(__file__).parent.parent.parent
OUTPUT = ROOT / "benchmarks" / "outputs" / "gpu.json"
LIMITS = {"tests": 150, "layers": 150, "models": 130, "sparse": 30}  # seconds
LAYERS = ((1024, 1024), (2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
MODELS = (("1B's widths", 8, 32, 1024), ("8B's widths", 2, 32, 2048))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--parts", nargs="+", default=list(LIMITS), choices=LIMITS)
    parser.add_argument("--seconds", type=float, help="at most for each part, instead of its own limit")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit(
            f"No GPU: torch {torch.__version__} sees no CUDA device here. Nothing was run, nothing is written."
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    record: dict = {"when": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "card": card(), "versions": _versions()}
    print(f"{record['card']}, {record['versions']}")
    parts: dict[str, Callable[[float], object]] = {
        "tests": tests,
        "layers": layers,
        "models": models,
        "sparse": sparse,
    }
    for part in options.parts:
        record[part] = parts[part](options.seconds or LIMITS[part])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


def card() -> str:
    """The device's name and memory."""
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _versions() -> dict[str, str | None]:
    return {**versions(), "cupy": _cupy(), "cuda": torch.version.cuda}


def _cupy() -> str | None:
    for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def tests(limit: float) -> dict:
    """How many of the GPU tests passed, and the names of those that did not."""
    processes = min(12, os.cpu_count() or 1)
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-n",
            str(processes),
            f"--junitxml={report}",
        ]
        begin = time.monotonic()
        try:
            subprocess.run(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=limit
            )
        except subprocess.TimeoutExpired:
            print(f"the GPU tests were not through after {limit:.0f} s")
            return {"note": "not through", "seconds": limit}
        found = summary(report) | {"seconds": round(time.monotonic() - begin, 1)}
    print(", ".join(f"{name}: {value}" for name, value in found.items()))
    return found


def summary(report: Path) -> dict:
    """Counts of a JUnit report, and the names of the tests that did not pass."""
    if not report.exists():
        return {"note": "pytest wrote no report"}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if any(case.find(end) is not None for end in ("failure", "error"))]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": skipped,
    }


def layers(limit: float) -> list[dict]:
    """Seconds of each solver on each layer."""
    rows = Rows("cuda", limit, say)
    for m, d in LAYERS:
        time_layer(rows, m, d)
        free()
    return [asdict(row) for row in rows.all]


def models(limit: float) -> list[dict]:
    """Seconds of `prune` on each model."""
    rows = Rows("cuda", limit, say)
    timed = [(time_one, model) for time_one in (time_model, time_reference) for model in MODELS]
    for time_one, model in [*timed, (time_refit, MODELS[0])]:
        time_one(rows, *model)
        free()
    return [asdict(row) for row in rows.all]


def sparse(limit: float) -> list[dict]:
    """Seconds of a pass of 2:4 blocks, dense and on sparse tensor cores."""
    rows = Rows("cuda", limit, say)
    time_sparse(rows, "8B's widths", 4)
    free()
    return [asdict(row) for row in rows.all]


def say(row: Row) -> None:
    """A line of the table."""
    figure = row.note if row.seconds is None else f"{row.seconds:9.4f} s"
    memory = "" if row.gibibytes is None else f"   {row.gibibytes:5.1f} GiB"
    print(f"{row.group:42s}  {row.name:34s}  {figure}{memory}", flush=True)


def free() -> None:
    """Give back what torch and CuPy hold of the device."""
    torch.cuda.empty_cache()
    if "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
