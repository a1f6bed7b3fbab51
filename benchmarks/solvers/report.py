"""Write the page that compares the solvers, from what benchopt measured.

python benchmarks/solvers/report.py RESULTS.csv PAGE.md

The figure beside the page comes from plot.py.
"""

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

import pandas as pd

BLIND = ("llmcompressor SparseGPT", "llmcompressor Wanda", "reference ALPS")  # to the factors

PAGE = """# Solvers compared

<!-- Written by benchmarks/solvers/report.py; edit that. -->

Every solver of moonshot and its peers, run by [benchopt](https://benchopt.github.io) in `benchmarks/solvers`.
The benchmark itself grades each answer, in float64 from W, A and U with plain NumPy, and refuses one that
misses its pattern. Seconds are those of one run, all factorisations included, after a first on two rows, so
without compilation. Small differences in time mean nothing.

    make bench-solvers    # measures, in an environment of its own
    make comparison       # this page and its figure

Machine: {machine}.

Peers: `llmcompressor` {llmcompressor} as installed from the registry, and plain torch references written by us
from the papers. Those with a † have one Hessian for all rows, so they see only the shared part A; where rows
have factors they optimise another objective than they are graded by. llmcompressor's dampening is 0, for A is
damped already; its Wanda has the same number of zeros in every row, as in the paper, where ours has one budget for
the layer.

Each layer's loss in units of the lowest that any solver reached, and seconds, both as geometric means over the
patterns; the nearer to the lower left corner, the better:

![Seconds and loss of each solver, a panel for each layer](comparison.png)

## Small rows

    .venv-bench/bin/benchopt run benchmarks/solvers --no-cache --no-plot -d small

Rows of 14 columns at 50 % and 70 % zeros, 12 at 2:4, {rows} for each condition number of A and number of
factors, whose optimum is known by enumeration. Share of rows solved to optimality (within a relative 1e-6), and
the mean excess over the optimum:

{small}

Well-conditioned: A of condition {well}; ill-conditioned: {ill}.

## Layers of the shipped Llama

    .venv-bench/bin/benchopt run benchmarks/solvers --no-cache --no-plot -d llama

`q_proj` (256 x 256) and `down_proj` (256 x 640) of the second block, default objective with 16 factors, 32
windows of 256 tokens. Each cell is F(V) / F(0), the gap `(F(V) - bound) / F(V)` by `lower_bound`, and seconds.
The bound is loose where inputs are correlated, so that a gap is no evidence against a solver; differences
between solvers are real.

{llama}

## A synthetic layer

    .venv-bench/bin/benchopt run benchmarks/solvers --no-cache --no-plot -d synthetic

256 x 512 in float32, eigenvalues of A from 1 down to 1e-3, 8 factors; cells as above:

{synthetic}

## What to choose when

{advice}
"""

ADVICE = """\
- **ADMM** for layers: on those here only Swaps ended lower, by about 3 % at most.
- **Swaps(ADMM)** for the last per cents: best on every layer, for 4 to 18 times ADMM's time. On small
  ill-conditioned rows it gains much more: it solves nine in ten, ADMM alone about four.
- **Exact** for rows of this small size: proven, and faster than ADMM or Swaps(ADMM). Its time grows exponentially
  with the columns, see its page.
- **OBS** where many sparsities of one layer are asked for, since one trace serves all unstructured patterns. For one
  pattern ADMM is better, in times of the same order. Swaps(OBS) is near Swaps(ADMM) and quicker on small rows.
- **IHT** is behind ADMM on every layer and takes longer.
- **SparseGPT** where a tenth of a second a layer matters: its loss is 1.3 to 5.7 times that of ADMM.
- **Magnitude** and **Wanda** do not compensate. They are baselines.
- Where rows have factors, use them: the best solver that sees A alone loses a fifth more than ADMM on the Llama's
  layers, and several times as much on the synthetic one. Without factors the torch ALPS is close to ADMM on
  well-conditioned rows, and behind it on the others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results")
    parser.add_argument("page")
    arguments = parser.parse_args()
    results = pd.read_csv(arguments.results)
    results["solver"] = [label(name) for name in results["solver_name"]]
    kind = results["dataset_name"].str.extract(r"^(\w+)")[0]
    small, llama, synthetic = (results[kind == name] for name in ("small", "llama", "synthetic"))
    ill = small["p_dataset_condition"] >= 1e4
    llama_tables = [
        f"`{name}`:\n\n{layers(part)}" for name, part in llama.groupby("p_dataset_layer", sort=False)
    ]
    page = PAGE.format(
        machine=machine(results),
        llmcompressor=version("llmcompressor"),
        rows=100 * small["p_dataset_pattern"].nunique(),
        small=small_rows(small, ill),
        well=conditions(small[~ill]),
        ill=conditions(small[ill]),
        llama="\n\n".join(llama_tables),
        synthetic=layers(synthetic),
        advice=ADVICE,
    )
    Path(arguments.page).write_text(page, "utf-8")


def label(name: str) -> str:
    """A solver's name as moonshot has it, with a dagger for those that see A alone."""
    return name.replace("[", "(").replace("]", ")") + (" †" if name in BLIND else "")


def machine(results: pd.DataFrame) -> str:
    row = results.iloc[0]
    return (
        f"{row['system-processor']}, {row['system-cpus']} cores ({row['env-OMP_NUM_THREADS']:.0f} threads), Python "
        f"{platform.python_version()}, torch {version('torch')}, numba {version('numba')}"
    )


def conditions(small: pd.DataFrame) -> str:
    return ", ".join(f"{c:.0e}".replace("e+0", "e") for c in sorted(small["p_dataset_condition"].unique()))


def small_rows(small: pd.DataFrame, ill: pd.Series) -> str:
    """Shares and excess, patterns and conditions pooled: every data set has as many rows. Best excess first."""
    columns = [f"{'ill' if i else 'well'}, {n or 'no'} factors" for n in (0, 3) for i in (False, True)]
    column = [
        columns[2 * (n > 0) + i] for n, i in zip(small["p_dataset_factors"], ill.astype(int), strict=True)
    ]
    means = small.groupby(["solver", pd.Series(column, small.index)])[
        ["objective_solved", "objective_excess"]
    ].mean()
    cells = [
        f"{solved:.1%}, {abs(excess):.2g}".replace("%", " %")
        for solved, excess in means.itertuples(index=False)
    ]
    table = pd.Series(cells, means.index).unstack()[columns]
    order = means["objective_excess"].unstack()[columns[3]].sort_values().index
    return markdown(table.loc[order])


def layers(frame: pd.DataFrame) -> str:
    """Value, gap and seconds of each solver, a column for each pattern; best at the first pattern first."""
    cells = [
        f"{value:.4f}, {gap:.0%}, {seconds:.2f}".replace("%", " %")
        for value, gap, seconds in frame[["objective_value", "objective_gap", "time"]].itertuples(index=False)
    ]
    index = pd.MultiIndex.from_frame(frame[["solver", "p_dataset_pattern"]])
    patterns = list(frame["p_dataset_pattern"].unique())
    table = pd.Series(cells, index).unstack()[patterns]
    first = frame[frame["p_dataset_pattern"] == patterns[0]].set_index("solver")["objective_value"]
    return markdown(table.loc[first.sort_values().index])


def markdown(table: pd.DataFrame) -> str:
    lines = ["| solver | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(row) + " |" for name, row in zip(table.index, table.values, strict=True)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
