"""Draw how near each solver comes to the best answer, and how long it takes: a panel for each layer, on the same axes.

python benchmarks/solvers/plot.py RESULTS.csv FIGURE.png

The patterns of a layer are pooled, by geometric means. Small rows are in the page's table alone.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK, OURS, PEERS = "#333333", "#1f5fa8", "#d19a4e"
PEER = ("llmcompressor", "reference")  # what the names of solvers that are not moonshot's begin with


def points(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{layer: a row for each solver, with seconds and loss, the loss in units of the lowest for each pattern}."""
    layers = results[~results["dataset_name"].str.startswith("small")]
    name = layers["p_dataset_layer"].fillna("synthetic, 256 x 512")
    lowest = layers.groupby([name, "p_dataset_pattern"])["objective_value"].transform("min")
    frame = pd.DataFrame(
        {
            "layer": name,
            "solver": layers["solver_name"],
            "seconds": np.log(layers["time"]),
            "loss": np.log(layers["objective_value"] / lowest),
        }
    )
    means = np.exp(frame.groupby(["layer", "solver"]).mean())
    return {layer: means.loc[layer] for layer in dict.fromkeys(name)}


def draw(panels: dict[str, pd.DataFrame], path: Path) -> None:
    """A panel beside the other, all with the same axes, each mark with its name."""
    figure = Figure(figsize=(7, 2.5 * len(panels)), dpi=200, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (layer, solvers) in zip(axes, panels.items(), strict=True):
        for name, (seconds, loss) in solvers.iterrows():
            peer = name.startswith(PEER)
            axis.scatter(
                seconds, loss, s=34, color=PEERS if peer else OURS, marker="D" if peer else "o", zorder=3
            )
        axis.set(xscale="log", yscale="log")
        axis.set_title(layer, fontsize=10, weight="bold", color=INK, loc="left")
        axis.set_ylabel("loss / lowest loss", fontsize=9, color=INK)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_locator(NullLocator())
        axis.tick_params(colors=INK, labelsize=8.5, length=0)
        axis.grid(color="#e6e6e6", linewidth=0.8)
        axis.spines[:].set_visible(False)
    axes[-1].set_xlabel("seconds, log scale", fontsize=9, color=INK)
    axes[0].annotate("moonshot", (0.86, 1.04), xycoords="axes fraction", color=OURS, fontsize=10, ha="right")
    axes[0].annotate("peers", (1, 1.04), xycoords="axes fraction", color=PEERS, fontsize=10, ha="right")
    x, y = (np.concatenate([panel[column] for panel in panels.values()]) for column in ("seconds", "loss"))
    axes[0].set_xlim(min(x) / 1.5, max(x) * 3)
    axes[0].set_ylim(0.85, max(y) * 1.3)
    figure.draw_without_rendering()  # marks have their places from now on
    for axis, solvers in zip(axes, panels.values(), strict=True):
        name_marks(axis, solvers)
    figure.savefig(path)


def name_marks(axis: Axes, solvers: pd.DataFrame) -> None:
    """Write each solver's name where there is room for it beside its mark: right, left, above or below."""
    places = (
        (7, 0, "left", "center"),
        (-7, 0, "right", "center"),
        (0, 6, "center", "bottom"),
        (0, -6, "center", "top"),
    )
    renderer = FigureCanvasAgg(axis.figure).get_renderer()
    marks = axis.transData.transform(solvers[["seconds", "loss"]].to_numpy())
    taken = [((x - 8, y - 8), (x + 8, y + 8)) for x, y in marks]
    for name, (seconds, loss) in solvers.iterrows():
        best = None
        for dx, dy, ha, va in places:
            text = axis.annotate(
                label(name),
                (seconds, loss),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8,
                color=PEERS if name.startswith(PEER) else OURS,
            )
            (x0, y0), (x1, y1) = text.get_window_extent(renderer).get_points()
            hidden = sum(x0 < r and l < x1 and y0 < t and b < y1 for (l, b), (r, t) in taken)
            hidden += not axis.bbox.x0 <= x0 <= x1 <= axis.bbox.x1
            if best is None or hidden < best[0]:
                if best is not None:
                    best[1].remove()
                best = hidden, text, ((x0, y0), (x1, y1))
            else:
                text.remove()
        taken.append(best[2])


def label(name: str) -> str:
    return (
        name.replace("[", "(").replace("]", ")").removeprefix("reference ").replace("llmcompressor", "llm-c.")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results")
    parser.add_argument("figure", type=Path)
    arguments = parser.parse_args()
    draw(points(pd.read_csv(arguments.results)), arguments.figure)


if __name__ == "__main__":
    main()
