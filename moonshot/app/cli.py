"""The command line: `moonshot demo`, `prune`, `compare`, `eval`, `unpack` and `targets`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import moonshot
from moonshot.app import options
from moonshot.app.config import given
from moonshot.app.options import OrSkip
from moonshot.app.terminal import (
    ENDS,
    ending_cleanly,
    from_own_code,
    one_line,
    quiet_libraries,
    say,
    unbroken_output,
)
from moonshot.app.usage import UsageError, usage_mistake
from moonshot.app.variadic import Variadic
from moonshot.errors import ArgumentError, MoonshotError

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Prune trained networks in one shot, and say how good the answer is.",
)
console = Console()
DEFAULT_OBJECTIVE = "0.6 reconstruction + 0.2 token_fisher + 0.2 fisher"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moonshot {moonshot.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="With any command: a traceback for every error.")
    ] = False,
) -> None:
    """Options of all commands."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif context.invoked_subcommand != "prune":
        from moonshot.app.launch import refuse_several

        refuse_several(context.invoked_subcommand)


@app.command()
def demo(
    save: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("moonshot-demo"),
    seed: options.Seed = 0,
    seeds: options.Seeds = 1,
) -> None:
    """Prune a small trained Llama by every method and compare held-out perplexities."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the model is small, and here
    from moonshot.app.compare import show
    from moonshot.app.demo import IDEAS, setting
    from moonshot.app.progress import progress
    from moonshot.files.plan import check_writable

    save.mkdir(parents=True, exist_ok=True)
    check_writable(save)
    with console.status("loading"):
        begin = setting(samples=24)
    console.print(str(begin), highlight=False)
    with progress(console) as steps:
        comparison = begin.compare(
            seeds=range(seed, seed + seeds),
            on_run=lambda run, total: steps.done(str(run), total),
            on_progress=steps.doing if console.is_terminal else None,
        )
    show(comparison, console, IDEAS)
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
    objective: options.ObjectiveText = DEFAULT_OBJECTIVE,
    solver: options.SolverName = "admm",
    solver_option: options.SolverOption = None,
    factors: options.Factors = 16,
    dampening_frac: options.Dampening = 0.01,
    refit: options.Refit = False,
    refit_option: options.RefitOption = None,
    bound: options.Bound = False,
    adapter: options.AdapterName = None,
    text_column: options.TextColumn = None,
    device: options.Device = "auto",
    precision: options.PrecisionName = None,
    nsamples: options.Samples = 128,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    compact: options.Compact = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    html: options.Html = None,
    config: options.Config = None,
    eval: options.Eval = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    memory: options.Memory = None,
    checkpoint: options.CheckpointFolder = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Prune a causal language model or an image classifier and save it with its recipe and report."""
    from moonshot.app.parse import (
        parse_adapter,
        parse_objective,
        parse_pattern,
        parse_refit,
        parse_solver,
    )
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
        text_column=text_column,
        held_out=eval,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        factors=factors,
        dampening_frac=dampening_frac,
        targets=targets,
        ignore=ignore or [],
        allocate=allocate,
        choices=choice,
        refit=parse_refit(refit, refit_option or ()),
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
        device=device,
        precision=None if precision is None else precision.value,  # type: ignore[arg-type]
        html=html,
        config=config,
        settings=given(context),
        dry_run=dry_run,
    ).run(Console(quiet=True) if quiet else console)


@app.command(
    cls=Variadic,
    epilog="Examples:\n\n"
    "moonshot compare MODEL --data text/ --pattern 2:4 70% --solver magnitude wanda sparsegpt admm\n\n"
    "moonshot compare MODEL --data train.txt --eval-data test.txt --pattern 2:4 --solver admm "
    '--objective reconstruction "0.5 reconstruction + 0.5 fisher" --seeds 3 --save comparison',
)
def compare(
    model: options.Model,
    data: options.Data,
    pattern: options.Patterns,
    solver: options.Solvers = ["magnitude", "wanda", "sparsegpt", "admm"],  # noqa: B006 - typer reads it
    objective: options.Objectives = [DEFAULT_OBJECTIVE],  # noqa: B006
    nsamples: options.Samples = 128,
    seqlen: options.Seqlen = None,
    seeds: options.Seeds = 1,
    text_column: options.TextColumn = None,
    eval_data: options.EvalData = None,
    eval_nsamples: options.EvalSamples = 0,
    save: options.SaveComparison = None,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    unreached: options.Unreached = OrSkip.error,
    unfit: options.Unfit = OrSkip.error,
    factors: options.Factors = 16,
    dampening_frac: options.Dampening = 0.01,
    refit: options.Refit = False,
    refit_option: options.RefitOption = None,
    adapter: options.AdapterName = None,
    config: options.Config = None,
    quiet: options.Quiet = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Prune a model by several methods and print what each costs: perplexity or accuracy on data set aside."""
    from moonshot.app.compare import CompareCommand
    from moonshot.app.parse import (
        parse_adapter,
        parse_objective,
        parse_pattern,
        parse_refit,
        parse_solver,
    )

    CompareCommand(
        model=model,
        data=data,
        patterns=[parse_pattern(text, None) for text in pattern],
        solvers=[parse_solver(text) for text in solver],
        objectives={text: parse_objective(text) for text in objective},
        eval_data=eval_data,
        eval_nsamples=eval_nsamples,
        nsamples=nsamples,
        seqlen=seqlen,
        text_column=text_column,
        seeds=seeds,
        save=save,
        trust_remote_code=trust_remote_code,
        options={
            "targets": targets,
            "ignore": ignore or [],
            "unreached": unreached.value,
            "unfit": unfit.value,
            "factors": factors,
            "dampening_frac": dampening_frac,
            "refit": parse_refit(refit, refit_option or ()) or False,
            "adapter": parse_adapter(adapter),
        },
    ).run(Console(quiet=True) if quiet else console)


@app.command("eval")
def evaluate(
    model: options.Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="wikitext2 or c4, by the field's protocols; or text or images of your own, as prune takes them.",
            autocompletion=options.completing("wikitext2", "c4"),
        ),
    ] = None,
    text_column: options.TextColumn = None,
    seqlen: options.Seqlen = None,
    nsamples: Annotated[
        int, typer.Option(help="Windows from the start of the text, or images; 0 for all.")
    ] = 0,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks of lm-eval, such as arc_easy,winogrande.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a folder with YAML files of your own tasks.")
    ] = None,
    trust_remote_code: options.Trust = False,
    config: options.Config = None,
) -> None:
    """Print the perplexity and zero-shot accuracies of a causal language model, or the accuracy of an image classifier.

    For a folder that moonshot pruned, the dense model's figures too, where it is on this machine.
    """
    from moonshot.app.evaluate import EvalCommand

    EvalCommand(
        model=model,
        data=data,
        seqlen=seqlen,
        nsamples=nsamples,
        tasks=tasks,
        include_path=include_path,
        text_column=text_column,
        trust_remote_code=trust_remote_code,
    ).run(console)


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
    """Run the command line; a user's mistake is one line on standard error, a bug a traceback.

    The exit code of a mistake is 2 where it is in the words of the command, 1 otherwise.
    What a plug-in raises is a bug in it, whatever it raises, but for a MoonshotError.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads sleep too: see moonshot.threads
    sys.path.insert(0, "")  # one's own module:Class is found beside the working directory's files
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # it may follow the command
    with unbroken_output():
        try:
            with ending_cleanly(), quiet_libraries():
                sys.exit(app(standalone_mode=False) or 0)
        except UsageError as error:
            _complain(usage_mistake(error), error)
            sys.exit(2)
        except (MoonshotError, OSError, ImportError, MemoryError) as error:
            if debug or (from_own_code(error) and not isinstance(error, MoonshotError)):
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
