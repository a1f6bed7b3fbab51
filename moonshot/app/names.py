"""What solvers and terms are called on the command line; without torch, for help and completion to be quick."""

from moonshot import solvers
from moonshot.layer.objectives import Fisher, Reconstruction, TokenFisher

TERMS = {"reconstruction": Reconstruction, "fisher": Fisher, "token_fisher": TokenFisher}
SOLVERS = {
    kind.__name__.lower(): kind
    for kind in (
        solvers.Magnitude,
        solvers.Wanda,
        solvers.SparseGPT,
        solvers.OBS,
        solvers.IHT,
        solvers.ADMM,
        solvers.Swaps,
        solvers.Exact,
    )
}
