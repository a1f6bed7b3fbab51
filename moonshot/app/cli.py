"""The command line: `moonshot demo`, `prune`, `eval`, `unpack` and `targets`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import moonshot
from moonshot.app import options
from moonshot.app.config import given
from moonshot.app.options import OrSkip
from moonshot.app.terminal import ENDS, ending_cleanly, one_line, quiet_libraries, say, unbroken_output
from moonshot.errors import ArgumentError, MoonshotError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune trained networks in one shot, and say how good the answer is.",
)
console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moonshot {moonshot.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="With any command: a traceback for every error.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def demo(
    save: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("moonshot-demo"),
    seed: options.Seed = 0,
) -> None:
    """Prune a small trained Llama by every method and compare held-out perplexities."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the model is small, and here
    from moonshot.app.demo import IDEAS, setting

    with console.status("loading"):
        begin = setting(samples=24, seed=seed)
    console.print(str(begin), highlight=False)
    with console.status("pruning") as status:
        comparison = begin.compare(seed=seed, on_step=lambda step: status.update(f"pruning: {step}"))
    patterns = list(comparison.rows[0].perplexities)
    table = Table(title=f"Held-out perplexity, dense {begin.dense}")
    table.add_column("method")
    for pattern in patterns:
        table.add_column(pattern, justify="right")
    table.add_column("what it does")
    for row in comparison.rows:
        values = (f"{row.perplexities[pattern]:.2f}" for pattern in patterns)
        table.add_row(row.method, *values, IDEAS[row.method])
    console.print(table)
    save.mkdir(parents=True, exist_ok=True)
    comparison.plot(save / "demo.png")
    say(console, f"picture: {save / 'demo.png'}")


@app.command(
    epilog="Examples:\n\n"
    "moonshot prune gpt2 --pattern 2:4 --data wikitext:wikitext-2-raw-v1:train --save pruned\n\n"
    "moonshot prune MODEL --sparsity 0.7 --allocate --refit --data text/ --save pruned --html report.html\n\n"
    "moonshot prune --config pruned/run.yaml --save again"
)
def prune(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    save: options.Save,
    pattern: options.PatternText = None,
    sparsity: options.Sparsity = None,
    columns: options.Columns = None,
    shrink: options.Shrink = False,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    allocate: options.Allocate = False,
    choice: options.Choice = None,
    unreached: options.Unreached = OrSkip.error,
    unfit: options.Unfit = OrSkip.error,
    objective: options.ObjectiveText = "0.6 reconstruction + 0.2 token_fisher + 0.2 fisher",
    solver: options.SolverName = "admm",
    solver_option: options.SolverOption = None,
    factors: options.Factors = 16,
    dampening_frac: options.Dampening = 0.01,
    refit: options.Refit = False,
    bound: options.Bound = False,
    adapter: options.AdapterName = None,
    nsamples: options.Samples = 128,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    compact: options.Compact = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    html: options.Html = None,
    config: options.Config = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    memory: options.Memory = None,
    checkpoint: options.CheckpointFolder = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Prune a causal language model or an image classifier and save it with its recipe and report."""
    from moonshot.app.parse import parse_adapter, parse_objective, parse_pattern, parse_solver
    from moonshot.app.prune import PruneCommand
    from moonshot.files.hub import Push

    if private and push_to_hub is None:
        raise ArgumentError("--private is for a repository on the hub: add --push-to-hub NAME")
    PruneCommand(
        model=model,
        data=data,
        save=save,
        pattern=parse_pattern(pattern, sparsity, columns),
        objective=parse_objective(objective),
        solver=parse_solver(solver, solver_option or ()),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        factors=factors,
        dampening_frac=dampening_frac,
        targets=targets,
        ignore=ignore or [],
        allocate=allocate,
        choices=choice,
        refit=refit,
        bound=bound,
        memory=memory,
        checkpoint=checkpoint,
        overwrite=overwrite,
        compact=compact,
        push=None if push_to_hub is None else Push(push_to_hub, private, overwrite),
        columns=columns,
        shrink=shrink,
        trust_remote_code=trust_remote_code,
        command=shlex.join(["moonshot", *sys.argv[1:]]),
        unreached=unreached.value,  # type: ignore[arg-type]
        unfit=unfit.value,  # type: ignore[arg-type]
        adapter=parse_adapter(adapter),
        html=html,
        config=config,
        settings=given(context),
        dry_run=dry_run,
    ).run(Console(quiet=True) if quiet else console)


@app.command("eval")
def evaluate(
    model: options.Model,
    data: options.Data,
    seqlen: options.Seqlen = None,
    nsamples: Annotated[
        int, typer.Option(help="Windows from the start of the text, or images; 0 for all.")
    ] = 0,
    trust_remote_code: options.Trust = False,
    config: options.Config = None,
) -> None:
    """Print the perplexity of a causal language model on a text, or the accuracy of an image classifier."""
    from moonshot.app.data import pictures, text_windows
    from moonshot.app.prune import print_skipped
    from moonshot.files.compact import load_any
    from moonshot.files.load import Source
    from moonshot.files.text import read_text
    from moonshot.models.evaluation import accuracy, perplexity
    from moonshot.models.images import ImageBatches

    source = Source(model, trust_remote_code)
    if source.is_image_classifier:
        found = pictures(data, seqlen)
        images = ImageBatches(source.skeleton(), source.processor, found, nsamples or None, 0)
        say(console, f"accuracy {accuracy(load_any(source), images)}")
        print_skipped(console, images.skipped)
    else:
        ids = text_windows(source, read_text(data), nsamples or None, seqlen, None)
        say(console, f"perplexity {perplexity(load_any(source), ids)}")


@app.command()
def unpack(
    folder: Annotated[Path, typer.Argument(help="A folder that moonshot prune --compact saved.")],
    save: Annotated[Path, typer.Option(help="Folder to write, which must not exist.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that moonshot wrote before.")
    ] = False,
) -> None:
    """Make an ordinary folder of a compact one, bit for bit what it was made from."""
    from moonshot.files.compact import unpack_folder

    say(console, f"saved: {unpack_folder(folder, save, overwrite=overwrite)}")


@app.command()
def targets(
    folder: Annotated[Path, typer.Argument(help="A folder that moonshot prune saved.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Time it here, in turns with the dense model.")
    ] = False,
    dense: Annotated[
        str | None, typer.Option(help="The dense model; the one that was pruned unless given.")
    ] = None,
) -> None:
    """Say for each engine whether a saved model is smaller or faster there, and how to get it there."""
    from moonshot.app.targets import say_targets

    say_targets(folder, measure, dense, console)


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 1, a bug a traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads sleep too: see moonshot.threads
    sys.path.insert(0, "")  # one's own module:Class is found beside the working directory's files
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # it may follow the command
    with unbroken_output():
        try:
            with ending_cleanly(), quiet_libraries():
                app()
        except (MoonshotError, OSError, ImportError, MemoryError) as error:
            if debug:
                raise
            _complain(str(error) or "out of memory", error)
            sys.exit(1)
        except SystemExit as stop:
            if stop.code in ENDS:
                _complain(ENDS[stop.code], stop)
            raise


def _complain(what: str, error: BaseException) -> None:
    """One line on standard error, with what was noted on the way."""
    print(f"moonshot: {one_line(' '.join([what, *getattr(error, '__notes__', ())]))}", file=sys.stderr)
