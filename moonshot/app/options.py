"""The options that commands have in common, and how the help groups them."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moonshot.app.config import read_into
from moonshot.app.names import SOLVERS, TERMS

CALIBRATION, PATTERN, METHOD = "Calibration data", "What becomes zero", "How"
OUTPUT, RUN = "What is written", "The run"


class OrSkip(str, Enum):
    """What becomes of layers that cannot be pruned."""

    error = "error"
    skip = "skip"


class Precision(str, Enum):
    """What passes are computed in."""

    model = "model"
    float32 = "float32"


def _option(panel: str, text: str, *flags: str, **more: Any) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=panel, **more)


def completing(*names: str) -> Any:
    """What a shell completes an option by."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Model = Annotated[str, typer.Argument(help="A folder or hub name that transformers loads.")]
Data = Annotated[
    str,
    _option(
        CALIBRATION,
        "wikitext2 or c4, by the field's protocols; or a file of text, JSON lines, CSV or Parquet, or a folder of "
        "them; for an image classifier a folder with one sub-folder of images for each class; or a datasets "
        "name[:config[:split]].",
        autocompletion=completing("wikitext2", "c4"),
    ),
]
TextColumn = Annotated[
    str | None,
    _option(CALIBRATION, "The column of rows that has the text, or chats; text or messages unless given."),
]
Samples = Annotated[int, _option(CALIBRATION, "Calibration samples: windows of text, or images.")]
Seqlen = Annotated[
    int | None,
    _option(
        CALIBRATION, "Tokens in a sample of text; 2048 unless given, or all positions of a model of fewer."
    ),
]
Eval = Annotated[
    list[str] | None,
    _option(
        RUN,
        "What to measure before and after, named as --data is, or none; repeat. With wikitext2 or c4 as --data its "
        "test part unless given.",
        "--eval",
    ),
]
Seed = Annotated[int, _option(CALIBRATION, "Seed of the calibration samples and random signs.")]

PatternText = Annotated[
    str | None,
    _option(
        PATTERN,
        '"2:4", "50%", 0.5, or your own as module:Class.',
        autocompletion=completing("2:4", "4:8", "50%"),
    ),
]
Sparsity = Annotated[float | None, _option(PATTERN, "Fraction of zeros, 0 to 1.")]
Columns = Annotated[
    float | None,
    _option(PATTERN, "Instead: the fraction of hidden units and groups of heads to prune in every block."),
]
Shrink = Annotated[
    bool, _option(PATTERN, "With --columns: cut them out; an ordinary smaller model.", "--shrink")
]
Targets = Annotated[
    list[str] | None, _option(PATTERN, "Layers to prune, as names, globs or re:EXPRESSION; repeat.")
]
Ignore = Annotated[
    list[str] | None, _option(PATTERN, "Layers to leave alone, written in the same way; repeat.")
]
Allocate = Annotated[
    bool, _option(PATTERN, "Put the zeros into the layers where they cost least.", "--allocate")
]
Choice = Annotated[
    list[str] | None,
    _option(PATTERN, "With --allocate: a pattern that a layer may have, such as 2:4, or 0 for none; repeat."),
]
Unreached = Annotated[OrSkip, _option(PATTERN, "What to do with layers that no calibration sample reaches.")]
Unfit = Annotated[OrSkip, _option(PATTERN, "What to do with layers that the pattern does not fit.")]

ObjectiveText = Annotated[
    str,
    _option(
        METHOD,
        "Terms with weights: reconstruction, fisher, token_fisher, your own as module:Class; or 'auto'.",
        autocompletion=completing(*TERMS, "auto"),
    ),
]
SolverName = Annotated[
    str,
    _option(
        METHOD,
        f"{', '.join(SOLVERS)}, or your own as module:Class.",
        autocompletion=completing(*SOLVERS),
    ),
]
SolverOption = Annotated[
    list[str] | None, _option(METHOD, "An option of the solver, such as growth=1.05; repeat.")
]
Factors = Annotated[int, _option(METHOD, "Random factors for per-sample gradients.")]
Dampening = Annotated[float, _option(METHOD, "Ridge, as a fraction of the Hessians' mean diagonal.")]
Refit = Annotated[
    bool,
    _option(METHOD, "Fit what is left of each part to the dense part once its layers are pruned.", "--refit"),
]
RefitOption = Annotated[
    list[str] | None, _option(METHOD, "An option of the refit, such as stages=3; repeat. It includes --refit.")
]
Bound = Annotated[
    bool, _option(METHOD, "Prove for each layer how far from the optimum it can be at most.", "--bound")
]
AdapterName = Annotated[
    str | None, _option(METHOD, "How the model is divided, if it needs one of your own: module:Class.")
]

Save = Annotated[Path, _option(OUTPUT, "Folder to write, which must not exist.")]
Overwrite = Annotated[bool, _option(OUTPUT, "Replace a folder that moonshot wrote before.", "--overwrite")]
Compact = Annotated[
    bool, _option(OUTPUT, "Save values and a bit for each weight, without the zeros.", "--compact")
]
PushToHub = Annotated[
    str | None, _option(OUTPUT, "Then send the folder to this repository of the Hugging Face hub.")
]
Private = Annotated[bool, _option(OUTPUT, "With --push-to-hub: a repository that only you see.", "--private")]
Html = Annotated[
    Path | None, _option(OUTPUT, "A report to look at, in one HTML file; measures the model before and after.")
]

Seeds = Annotated[
    int,
    _option(
        CALIBRATION, "How many draws of the calibration samples: the table has mean and deviation over them."
    ),
]
EvalData = Annotated[
    str | None,
    _option(CALIBRATION, "What to measure on, named like --data; a fifth of --data is set aside if not given."),
]
EvalSamples = Annotated[int, _option(CALIBRATION, "Windows or images to measure on; 0 for all.")]
Patterns = Annotated[
    list[str], _option(PATTERN, '"2:4", "50%", 0.5, or your own as module:Class; several.', "--pattern")
]
Solvers = Annotated[
    list[str],
    _option(
        METHOD,
        f'{", ".join(SOLVERS)}, or your own as module:Class; several. Options may follow: "admm(growth=1.05)".',
        "--solver",
    ),
]
Objectives = Annotated[
    list[str],
    _option(METHOD, "Terms with weights, as for prune, or 'auto'; several.", "--objective"),
]
SaveComparison = Annotated[
    Path | None,
    _option(
        OUTPUT,
        "Folder for every run, the table as CSV, JSON and Markdown, and the picture; done runs are not repeated.",
    ),
]

Config = Annotated[
    Path | None,
    _option(
        RUN,
        "A YAML file of these options, such as the run.yaml beside a pruned model; the command line comes first.",
        callback=read_into,
        is_eager=True,
    ),
]
DryRun = Annotated[
    bool, _option(RUN, "Check everything and say what it would take, and prune nothing.", "--dry-run")
]
Quiet = Annotated[bool, _option(RUN, "Say nothing but what goes wrong.", "--quiet")]
Device = Annotated[
    str,
    _option(
        RUN,
        "Where it runs: auto, cpu, cuda, or such as cuda:1, to which the model moves part by part; auto is the GPU "
        "where there is one, with the whole model on it if it fits.",
        autocompletion=completing("auto", "cpu", "cuda"),
    ),
]
PrecisionName = Annotated[
    Precision | None,
    _option(RUN, "Of the passes: the model's own dtype, the default on a GPU, or float32, that on the CPU."),
]
Memory = Annotated[float | None, _option(RUN, "Memory it may use, in GiB; all that is free unless given.")]
CheckpointFolder = Annotated[
    Path | None,
    _option(RUN, "Folder for finished layers; the same command then continues an interrupted run."),
]
Trust = Annotated[
    bool,
    _option(RUN, "Run code that comes with the model: read it first.", "--trust-remote-code"),
]
