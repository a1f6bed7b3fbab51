"""Draw time against gap, a panel for each data set.

python benchmarks/solvers/plot.py RESULTS.csv FIGURE.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot


def panels(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{title: results}: small rows by condition with patterns and factors pooled, layers as they are."""
    small = results["dataset_name"].str.startswith("small")
    title = results["dataset_name"].where(~small, "")
    title[small] = [f"small rows, condition {c:.0e}" for c in results.loc[small, "p_dataset_condition"]]
    return dict(list(results.groupby(title, sort=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results")
    parser.add_argument("figure")
    arguments = parser.parse_args()
    drawn = panels(pd.read_csv(arguments.results))
    columns = 4
    rows = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows + 1), squeeze=False, layout="constrained"
    )
    names = sorted({name for results in drawn.values() for name in results["solver_name"]})
    colours = pyplot.get_cmap("tab20").colors
    for axis, (title, results) in zip(axes.flat, drawn.items(), strict=False):
        means = results.groupby("solver_name")[["time", "objective_gap"]].mean()
        for name, row in means.iterrows():
            gap = max(row["objective_gap"], 1e-4)  # what is proven optimal stands on the axis
            style = {"color": colours[names.index(name) % 20], "marker": "ovs^"[names.index(name) % 4]}
            axis.scatter(row["time"], gap, label=name, s=45, **style)
        axis.set(xscale="log", yscale="log", title=title, xlabel="seconds", ylabel="gap")
        axis.title.set_fontsize(9)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    handles = {h.get_label(): h for axis in axes.flat for h in axis.collections}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.savefig(arguments.figure, dpi=90)


if __name__ == "__main__":
    main()
