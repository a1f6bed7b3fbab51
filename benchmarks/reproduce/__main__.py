"""A table of MOONSHOT or ALPS once more: each method on each pattern, our figure beside the published one.

    python -m benchmarks.reproduce llama-3.2-1b|llama-3.2-3b|llama-2-7b|llama-3-8b [--tasks [NAMES]]
    python -m benchmarks.reproduce vit-b|deit-b|resnet-50 --images IMAGENET

The model is loaded from the hub, or from --model FOLDER. Text is C4 for calibration, WikiText-2 and C4 for perplexity,
by the field's protocols (docs/evidence.md); IMAGENET is a folder with `train` and `val`, each with a folder of images
for every class. Every figure is written to --output as it is measured, and the same command goes on from there. The
table is markdown; a dash is what was not measured here, or not found in a paper.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import moonshot as ms
from moonshot.app.data import calibration_windows, pictures
from moonshot.app.measure import HeldOut
from moonshot.app.tasks import Harness
from moonshot.errors import MoonshotError
from moonshot.files.load import Source
from moonshot.models.images import ImageBatches
from torch import nn

from benchmarks.reproduce.published import CLAIMS, MOONSHOT, PUBLISHED
from benchmarks.reproduce.tables import METHODS, TABLES, TASKS

Row = dict[
    str, Any
]  # pattern, method, figures {data: value}, minutes, and the settings that it was measured with
ZERO_SHOT = "zero-shot mean"


def main(arguments: list[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    table = TABLES[asked.table]
    if not table.text and asked.images is None:
        raise SystemExit("give the folder of ImageNet: --images IMAGENET")
    try:
        rows = _measured(asked, Path(asked.output) / f"{asked.table}.jsonl")
    except (MoonshotError, OSError, ImportError) as error:
        raise SystemExit(f"{asked.table}: {error}") from error
    print("\n".join(lines(asked.table, rows, asked.seqlen)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--model", help="a folder or another hub name")
    parser.add_argument("--images", type=Path, help="ImageNet, with train and val")
    parser.add_argument("--patterns", nargs="+", help="the table's unless given")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="?", const=TASKS, help=f"by lm-eval; {TASKS} unless named")
    parser.add_argument("--include-path", type=Path, help="a folder with YAML files of your own tasks")
    parser.add_argument("--output", default="benchmarks/outputs/reproduce", help="folder for the figures")
    return parser


def _measured(asked: argparse.Namespace, file: Path) -> list[Row]:
    """Every row of the table, from the file where it is there."""
    table = TABLES[asked.table]
    source = Source(asked.model or table.model)
    settings = {name: getattr(asked, name) for name in ("nsamples", "seqlen", "seed", "tasks")}
    settings["model"] = source.name
    file.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    wanted = [("dense", "dense")]
    wanted += [(pattern, method) for pattern in asked.patterns or table.patterns for method in asked.methods]
    rows, data = [], None
    for pattern, method in wanted:
        row = {"pattern": pattern, "method": method, **settings}
        found = [each for each in known if row.items() <= each.items()]
        if not found:
            data = data or _Data(source, asked, table.text)
            found = [row | data.run(pattern, method)]
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(found[0]) + "\n")
            print(f"{pattern}, {method}: {found[0]['figures']}", flush=True)
        rows += found[:1]
    return rows


class _Data:
    """What a table's models are calibrated and measured on."""

    def __init__(self, source: Source, asked: argparse.Namespace, text: bool):
        self.source, self.seed = source, asked.seed
        self.calibration: Any
        if text:
            self.calibration = calibration_windows(source, "c4", asked.nsamples, asked.seqlen, asked.seed).ids
            names, seqlen = ["wikitext2", "c4"], asked.seqlen
        else:
            train, names, seqlen = (
                pictures(str(asked.images / "train"), None),
                [str(asked.images / "val")],
                None,
            )
            batches = ImageBatches(source.skeleton(), source.processor, train, asked.nsamples, asked.seed)
            self.calibration = list(batches)
        self.held_out = [HeldOut(source, name, None, seqlen) for name in names]
        for each in self.held_out:
            each.title = each.title if text else "ImageNet"
        self.harness = None if asked.tasks is None else Harness(asked.tasks.split(","), asked.include_path)

    def run(self, pattern: str, method: str) -> Row:
        """The model, pruned from its dense weights, and what it reaches."""
        model, start = self.source.load(), time.perf_counter()
        if method != "dense":
            objective, solver = METHODS[method]
            ms.prune(
                model,
                self.calibration,
                pattern,
                objective=objective,
                solver=solver,
                seed=self.seed,
                unfit="skip",
            )
        minutes = (time.perf_counter() - start) / 60
        return {"figures": self._figures(model), "minutes": minutes}

    def _figures(self, model: nn.Module) -> dict[str, float]:
        figures = {}
        for each in self.held_out:
            figure = each.measure(model)
            figures[each.title] = figure.value * (100 if figure.name == "accuracy" else 1)
        if self.harness is not None:
            found = [each for each in self.harness.run(model, self.source.processor) if each.metric == "acc"]
            figures |= {each.task: 100 * each.value for each in found}
            figures[ZERO_SHOT] = 100 * sum(each.value for each in found) / max(len(found), 1)
        return figures


def lines(table: str, rows: list[Row], context: int) -> list[str]:
    """The table as markdown, and what it is held against."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    heads = [head for name in names for head in (name, "published")]
    text = ["| pattern | method | " + " | ".join(heads) + " | minutes |", "|---" * (len(heads) + 3) + "|"]
    papers: dict[str, None] = {}
    for row in rows:
        cells = [row["pattern"], row["method"]]
        for name in names:
            figure, known = (
                row["figures"].get(name),
                PUBLISHED.get((table, row["pattern"], row["method"], name)),
            )
            comparable = known is not None and known.context in (0, context)
            cells += ["-" if figure is None else f"{figure:.2f}", f"{known.value:.2f}" if comparable else "-"]
            if comparable:
                papers[f"{known.value:.2f}: {known.paper}"] = None
        text.append("| " + " | ".join([*cells, f"{row['minutes']:.1f}"]) + " |")
    text += [
        "",
        "Published figures: " + ("; ".join(papers) if papers else "none is known for these rows") + ".",
    ]
    if table in CLAIMS:
        text.append(f"{MOONSHOT}, of two objectives against one: {CLAIMS[table]}.")
    return text


if __name__ == "__main__":
    main()
