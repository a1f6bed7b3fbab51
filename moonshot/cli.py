"""The command line: `moonshot demo`, `moonshot prune`, `moonshot eval`."""

import os
import re
import shutil
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune trained networks in one shot, and say how good the answer is.",
)
console = Console()


class SolverName(str, Enum):
    """The solvers by their names on the command line."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    obs = "obs"
    iht = "iht"
    admm = "admm"


class Unreached(str, Enum):
    """What `prune` does with layers that no calibration sample reaches."""

    error = "error"
    skip = "skip"


Model = Annotated[str, typer.Argument(help="A folder or hub name that transformers loads.")]
Data = Annotated[
    str,
    typer.Option(
        help="A text file or a folder of them; for an image classifier a folder with one sub-folder of images for each "
        "class; or a datasets name[:config[:split]]."
    ),
]
Seqlen = Annotated[int | None, typer.Option(help="Tokens a sample of text; 2048 unless given.")]
Seed = Annotated[int, typer.Option(help="Seed of the calibration samples and random signs.")]


@app.command()
def demo(
    save: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("moonshot-demo"), seed: Seed = 0
) -> None:
    """Prune a small trained Llama by every method and compare held-out perplexities."""
    from moonshot.comparison import compare

    with console.status("loading") as status:
        comparison = compare(samples=24, seed=seed, on_step=lambda step: status.update(step))
    dense = comparison.dense
    patterns = list(comparison.rows[0].perplexities)
    table = Table(title=f"Held-out perplexity, context {dense.context}, {dense.windows} windows")
    table.add_column("method")
    for pattern in patterns:
        table.add_column(pattern, justify="right")
    table.add_row("dense", *[f"{dense.value:.2f}"] * len(patterns))
    for row in comparison.rows:
        table.add_row(row.method, *(f"{row.perplexities[pattern]:.2f}" for pattern in patterns))
    console.print(table)
    save.mkdir(parents=True, exist_ok=True)
    comparison.plot(save / "demo.png")
    console.print(f"picture: {save / 'demo.png'}")


@app.command()
def prune(
    model: Model,
    data: Data,
    save: Annotated[Path, typer.Option(help="Folder to write, which must not exist.")],
    pattern: Annotated[str | None, typer.Option(help='"2:4", "50%" or 0.5.')] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of zeros, 0 to 1.")] = None,
    objective: Annotated[
        str, typer.Option(help='Terms reconstruction, fisher, token_fisher with weights, or "auto".')
    ] = "0.6 reconstruction + 0.2 token_fisher + 0.2 fisher",
    solver: Annotated[SolverName, typer.Option(help="The method.")] = SolverName.admm,
    nsamples: Annotated[int, typer.Option(help="Calibration samples: windows of text, or images.")] = 128,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    factors: Annotated[int, typer.Option(help="Random factors for per-sample gradients.")] = 16,
    dampening_frac: Annotated[float, typer.Option(help="Ridge, as a fraction of the mean diagonal.")] = 0.01,
    targets: Annotated[list[str] | None, typer.Option(help="Layers: names, globs, re:...")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers to leave alone.")] = None,
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Share the zeros among the layers by what they cost.")
    ] = False,
    choice: Annotated[
        list[str] | None,
        typer.Option(
            help="With --allocate: a pattern that a layer may have, such as 2:4, or 0 for none; repeat."
        ),
    ] = None,
    bound: Annotated[
        bool, typer.Option("--bound", help="Prove how far from the optimum each layer is at most.")
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="GiB it may take in all; what is free unless given.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder for finished layers, from which the same command goes on if it was cut short."
        ),
    ] = None,
    unreached: Annotated[
        Unreached, typer.Option(help="What becomes of layers that no calibration sample reaches.")
    ] = Unreached.error,
) -> None:
    """Prune a causal language model or an image classifier and save it with its mask, recipe and report."""
    from moonshot import allocation, auto, pruning, storage
    from moonshot.models.images import ImageBatches

    if choice and not allocate:
        raise ValueError("--choice is what --allocate chooses from: add --allocate")
    chosen = _pattern(pattern, sparsity)
    terms = parse_objective(objective)
    if save.exists():
        raise FileExistsError(f"{save} exists: choose another folder, or remove it first")
    images = storage.is_image_classifier(model)
    found: Any = _pictures(data, seqlen) if images else storage.read_text(data)
    with storage.opened(model, save) as opened:
        network = opened.model
        calibration: Any
        broken: list[str] | None = None
        if images:
            pictures = ImageBatches(network, opened.processor, found, nsamples, seed)
            calibration, broken = list(pictures), pictures.skipped
            _print_skipped(broken)
        else:
            calibration = _windows(opened.processor, found, nsamples, seqlen, seed)
        judge = auto.DEFAULT_OBJECTIVE if terms == "auto" else terms
        trials = len(auto.CANDIDATES) if terms == "auto" else 0
        work = dict(solver=_solver(solver), targets=targets, ignore=ignore or (), factors=factors)
        recipe = work | dict(
            dampening_frac=dampening_frac,
            seed=seed,
            unreached=unreached.value,
            scratch=_scratch(opened, calibration, memory, checkpoint, objective=judge, trials=trials, **work),
        )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("gradients", total=None)

            def advance(what: str, total: int) -> None:
                opened.release()
                progress.update(task, description=what, total=total, advance=1)
                if not console.is_terminal:  # where a log is all there is, a line for each step
                    console.print(f"{progress.tasks[0].completed:.0f} of {total}: {what}", highlight=False)

            budget = None
            if allocate:
                budget = allocation.allocate(
                    network, calibration, chosen, objective=judge, patterns=choice, on_step=advance, **recipe
                )
                progress.reset(task)
            report = pruning.prune(
                network,
                calibration,
                budget or chosen,
                objective=terms,
                bound=bound,
                checkpoint=checkpoint,
                on_layer=lambda layer, total: advance(layer.name, total),
                **recipe,
            )
        if budget:
            report.recipe.update(pattern=str(chosen), budget=budget.budget)
            report.trials = [*budget.trials, *report.trials]
        report.recipe.update(model=model, data=data)
        if broken is not None:
            report.recipe["broken_images"] = len(broken)
        console.print(str(report), highlight=False, soft_wrap=True)
        opened.save(report)
    if checkpoint is not None:
        shutil.rmtree(checkpoint)
    console.print(f"saved: {save}")


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    seqlen: Seqlen = None,
    nsamples: Annotated[
        int, typer.Option(help="Windows from the start of the text, or images; 0 for all.")
    ] = 0,
) -> None:
    """Print the perplexity of a causal language model on a text, or the accuracy of an image classifier."""
    from moonshot import evaluation, storage
    from moonshot.models.images import ImageBatches

    if storage.is_image_classifier(model):
        found = _pictures(data, seqlen)
        network, processor = storage.load_classifier(model)
        pictures = ImageBatches(network, processor, found, nsamples or None, 0)
        console.print(f"accuracy {evaluation.accuracy(network, pictures)}", highlight=False)
        _print_skipped(pictures.skipped)
    else:
        text = storage.read_text(data)
        network, tokenizer = storage.load(model)
        ids = _windows(tokenizer, text, nsamples or None, seqlen, None)
        console.print(f"perplexity {evaluation.perplexity(network, ids)}", highlight=False)


def _scratch(opened, calibration, memory: float | None, checkpoint: Path | None, **work) -> Path | None:
    """Say what pruning will take; the folder for what does not fit into memory, None where it does.

    work: what planning.plan wants to know. Raises ResourceError where there is not enough memory or disk.
    """
    from moonshot import planning
    from moonshot.models.calibration import as_batches, tokens_at_once

    model = opened.model
    plan = planning.plan(model, as_batches(calibration, tokens_at_once(model)), **work)
    if plan is None:
        return None
    console.print(str(plan), highlight=False, soft_wrap=True)
    on_disk = plan.needs_scratch(planning.free_memory(model.device, memory))
    needed = {opened.draft: opened.unwritten + plan.waiting * on_disk}
    if checkpoint is not None:
        needed[checkpoint] = sum(parameter.nbytes for parameter in model.parameters())
    planning.check_disk(needed)
    return opened.draft if on_disk else None


def _windows(tokenizer, text: str, samples: int | None, seqlen: int | None, seed: int | None):
    """Token ids (samples, seqlen); as many windows as the text has for samples=None."""
    from moonshot.models.calibration import windows

    length = 2048 if seqlen is None else seqlen
    if samples is None:
        tokens = len(tokenizer(text, verbose=False)["input_ids"])
        samples = max(tokens // max(length, 1), 1)
    return windows(tokenizer, text, samples, length, seed)


def _pictures(data: str, seqlen: int | None):
    """The images that --data names."""
    from moonshot.models.images import find_pictures

    if seqlen is not None:
        raise ValueError("--seqlen is tokens of text, and the model is an image classifier: leave it out")
    return find_pictures(data)


def _print_skipped(skipped: list[str]) -> None:
    if skipped:
        names = ", ".join(skipped)
        console.print(f"{len(skipped)} broken images skipped: {names}", highlight=False, soft_wrap=True)


def parse_objective(text: str):
    """ "0.6 reconstruction + 0.4 fisher" as an objective; a missing weight is 1. "auto" stays what it is."""
    if text.strip() == "auto":
        return "auto"
    from moonshot.objectives import Fisher, Objective, Reconstruction, TokenFisher

    terms: dict[str, Objective] = {
        "reconstruction": Reconstruction(),
        "fisher": Fisher(),
        "token_fisher": TokenFisher(),
    }
    total: Objective | None = None
    for part in text.split("+"):
        match = re.fullmatch(r"\s*([0-9.eE-]+)?\s*\*?\s*([a-z_]+)\s*", part)
        if match is None or match[2] not in terms:
            raise ValueError(f"cannot read {part.strip()!r} in the objective: terms are {', '.join(terms)}")
        term = (float(match[1]) if match[1] else 1.0) * terms[match[2]]
        total = term if total is None else total + term
    return total


def _pattern(pattern: str | None, sparsity: float | None):
    from moonshot.patterns import as_pattern

    if pattern is None and sparsity is None:
        raise ValueError("say how much to prune: --pattern 2:4 or --sparsity 0.5")
    if pattern is None:
        return as_pattern(sparsity)  # type: ignore[arg-type]
    chosen = as_pattern(pattern)
    if sparsity is not None and abs(chosen.sparsity - sparsity) > 1e-9:  # type: ignore[attr-defined]
        raise ValueError(
            f"--pattern {pattern} and --sparsity {sparsity:g} contradict each other (N:M keeps n of every m): "
            "give one of them"
        )
    return chosen


def _solver(name: SolverName):
    from moonshot import ADMM, IHT, OBS, Magnitude, SparseGPT, Wanda

    return {
        SolverName.magnitude: Magnitude,
        SolverName.wanda: Wanda,
        SolverName.sparsegpt: SparseGPT,
        SolverName.obs: OBS,
        SolverName.iht: IHT,
        SolverName.admm: ADMM,
    }[name]()


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 1."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads sleep too: see moonshot.threads
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        print(f"moonshot: {error} {notes}".rstrip(), file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Control-C
            print("moonshot: interrupted, nothing was saved but what --checkpoint has", file=sys.stderr)
        raise
