"""The command line: `moonshot demo`, `moonshot prune`, `moonshot eval`, `moonshot unpack`."""

import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import moonshot
from moonshot.app.terminal import ENDS, ending_cleanly, one_line, say, unbroken_output
from moonshot.errors import MoonshotError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune trained networks in one shot, and say how good the answer is.",
)
console = Console()


class OrSkip(str, Enum):
    """What `prune` does with layers that it cannot prune."""

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
Seqlen = Annotated[
    int | None,
    typer.Option(help="Tokens in a sample of text; 2048 unless given, or all positions of a model of fewer."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model: read it first.")
]
Seed = Annotated[int, typer.Option(help="Seed of the calibration samples and random signs.")]


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
    save: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("moonshot-demo"), seed: Seed = 0
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


@app.command()
def prune(
    model: Model,
    data: Data,
    save: Annotated[Path, typer.Option(help="Folder to write, which must not exist.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that moonshot wrote before.")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Save values and a bit for each weight, without the zeros.")
    ] = False,
    pattern: Annotated[str | None, typer.Option(help='"2:4", "50%", 0.5, or your own as module:Class.')] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of zeros, 0 to 1.")] = None,
    columns: Annotated[
        float | None,
        typer.Option(help="Instead: the fraction of hidden units and groups of heads to prune in every block."),
    ] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="With --columns: cut them out; an ordinary smaller model.")
    ] = False,
    objective: Annotated[
        str,
        typer.Option(
            help="Terms with weights: reconstruction, fisher, token_fisher, your own as module:Class; or 'auto'."
        ),
    ] = "0.6 reconstruction + 0.2 token_fisher + 0.2 fisher",
    solver: Annotated[
        str,
        typer.Option(
            help="magnitude, wanda, sparsegpt, obs, iht, admm, swaps, exact, or your own as module:Class."
        ),
    ] = "admm",
    solver_option: Annotated[
        list[str] | None, typer.Option(help="An option of the solver, such as growth=1.05; repeat.")
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration samples: windows of text, or images.")] = 128,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    factors: Annotated[int, typer.Option(help="Random factors for per-sample gradients.")] = 16,
    dampening_frac: Annotated[
        float, typer.Option(help="Ridge, as a fraction of the Hessians' mean diagonal.")
    ] = 0.01,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers to prune, as names, globs or re:EXPRESSION; repeat.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers to leave alone, written in the same way; repeat.")
    ] = None,
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Put the zeros into the layers where they cost least.")
    ] = False,
    choice: Annotated[
        list[str] | None,
        typer.Option(
            help="With --allocate: a pattern that a layer may have, such as 2:4, or 0 for none; repeat."
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="Fit what is left of each part to the dense part once its layers are pruned."
        ),
    ] = False,
    bound: Annotated[
        bool, typer.Option("--bound", help="Prove for each layer how far from the optimum it can be at most.")
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="Memory it may use, in GiB; all that is free unless given.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder for finished layers; the same command then continues an interrupted run."),
    ] = None,
    unreached: Annotated[
        OrSkip, typer.Option(help="What to do with layers that no calibration sample reaches.")
    ] = OrSkip.error,
    unfit: Annotated[
        OrSkip, typer.Option(help="What to do with layers that the pattern does not fit.")
    ] = OrSkip.error,
    trust_remote_code: Trust = False,
    adapter: Annotated[
        str | None, typer.Option(help="How the model is divided, if it needs one of your own: module:Class.")
    ] = None,
) -> None:
    """Prune a causal language model or an image classifier and save it with its recipe and report."""
    from moonshot.app.parse import parse_adapter, parse_objective, parse_pattern, parse_solver
    from moonshot.app.prune import PruneCommand

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
        columns=columns,
        shrink=shrink,
        trust_remote_code=trust_remote_code,
        command=shlex.join(["moonshot", *sys.argv[1:]]),
        unreached=unreached.value,  # type: ignore[arg-type]
        unfit=unfit.value,  # type: ignore[arg-type]
        adapter=parse_adapter(adapter),
    ).run(console)


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    seqlen: Seqlen = None,
    nsamples: Annotated[
        int, typer.Option(help="Windows from the start of the text, or images; 0 for all.")
    ] = 0,
    trust_remote_code: Trust = False,
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


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 1, a bug a traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads sleep too: see moonshot.threads
    sys.path.insert(0, "")  # one's own module:Class is found beside the working directory's files
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # it may follow the command
    with unbroken_output():
        try:
            with ending_cleanly():
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
