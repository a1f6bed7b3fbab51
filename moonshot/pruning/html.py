"""A report as one HTML page that needs nothing else: no scripts, no fonts, nothing from a network."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moonshot.models.targets import listed
from moonshot.pruning.chart import chart, kinds, legend
from moonshot.pruning.markup import bar, cell, number, table, text
from moonshot.pruning.report import LayerReport, Report
from moonshot.pruning.style import STYLE
from moonshot.pruning.whole_file import write_whole

_OPEN = 60  # layers in a table that is shown at once
_NAMES = 20  # in a list of layers that have the same said of them, at most


def save_html(report: Report, path: str | Path) -> None:
    """Write a report as a page to look at, with all figures of all layers; there is the whole file or none.

    Raises OSError where it cannot be written.
    """
    write_whole(path, html(report))


def html(report: Report) -> str:
    """The page."""
    pattern = report.recipe.get("pattern", "")
    title = f"{report.recipe.get('model', 'A model')}, pruned to {pattern}"
    sections = [
        f"<h1>{text(title)}</h1>",
        _figures(report),
        _before_and_after(report),
        _list("Worth knowing", _warnings(report), "warnings"),
        _plots(report),
        _refit(report),
        _trials(report),
        _list("Skipped", _by_reason(report.skipped)),
        _list("Left alone", _by_reason(report.left_alone)),
        _list("Samples left out", _by_reason(report.unused)),
        _recipe(report),
        _layers(report.layers),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _figures(report: Report) -> str:
    worst = max(report.layers.values(), key=lambda layer: layer.relative, default=None)
    figures = {
        "of the pruned layers' weights are zero": f"{100 * report.sparsity:.2f} %",
        "of the whole model is zero": f"{100 * report.model_sparsity:.2f} %",
        "layers pruned": f"{len(report.layers)}",
        "wall-clock time": _time(report.seconds),
        "memory at most": f"{report.peak_memory / 2**20:,.0f} MiB",
    }
    if worst is not None:
        figures[f"largest error, in {worst.name}"] = f"{worst.relative:.4f}"
    items = "".join(
        f"<div><b>{text(value)}</b><span>{text(what)}</span></div>" for what, value in figures.items()
    )
    return f'<div class="figures">{items}</div>'


def _before_and_after(report: Report) -> str:
    measured = {"before": report.before, "after": report.after}
    rows = [[cell(when), cell(value)] for when, value in measured.items() if value]
    return f"<section><h2>Before and after</h2>{table(['', ''], rows)}</section>" if rows else ""


def _warnings(report: Report) -> Iterator[str]:
    """What a reader should know before trusting the figures."""
    yield from _by_reason({layer.name: layer.note for layer in report.layers.values() if layer.note})
    asked = float(report.recipe.get("dampening_frac", 0))
    damped = [layer for layer in report.layers.values() if layer.damping > 1.001 * asked]
    if damped:
        most = max(damped, key=lambda layer: layer.damping)
        yield (
            f"{_count(len(damped), 'layer')} needed more damping than was asked for, {asked:g}; the most, "
            f"{most.damping:g}, in {most.name}"
        )
    for status in dict.fromkeys(layer.status for layer in report.layers.values()):
        found = [layer.name for layer in report.layers.values() if layer.status == status]
        if status not in ("completed", "optimal", "converged"):
            yield f"the solver ended with {status!r} in {len(found)} of {len(report.layers)} layers"
    if report.skipped:
        yield f"skipped, and dense: {_count(len(report.skipped), 'layer')}"
    if report.unused:
        yield f"left out: {_count(len(report.unused), 'calibration sample')}"
    if broken := report.recipe.get("broken_images"):
        yield f"could not be read: {_count(int(broken), 'image')}"
    if survivors := sum(layer.zero_survivors for layer in report.layers.values()):
        yield f"zero beyond what the patterns ask for: {_count(survivors, 'weight')}"
    same = [part.name for part in report.parts.values() if not part.aside_after < part.aside_before]
    if same:
        yield f"the refit gained nothing on the samples set aside in {len(same)} of {len(report.parts)} parts"
    if report.resumed:
        yield f"taken from an earlier run's checkpoint: {_count(report.resumed, 'layer')}"


def _plots(report: Report) -> str:
    if not report.layers:
        return ""
    layers, kind_of = report.layers, kinds(list(report.layers))
    errors = {name: layer.relative for name, layer in layers.items()}
    zeros = {name: 100 * layer.sparsity for name, layer in layers.items()}
    gaps = {name: 100 * layer.gap for name, layer in layers.items() if layer.gap is not None}
    plots = [
        ("Error", "the objective, where 1 is a layer of zeros; log scale", chart(errors, kind_of, log=True))
    ]
    if max(zeros.values()) - min(zeros.values()) < 0.1:
        plots.append(("Zeros", f"{max(zeros.values()):.2f} % of every layer's weights", ""))
    else:
        plots.append(("Zeros", "% of the layer's weights", chart(zeros, kind_of, log=False, top=100.0)))
    if gaps:
        here = {name: kind_of[name] for name in gaps}
        about = "% of the objective that a better answer could save at most, proved"
        plots.append(("Gap", about, chart(gaps, here, log=False, top=100.0)))
    figures = (
        f"<figure><figcaption><b>{name}</b> {about}</figcaption>{plot}</figure>" for name, about, plot in plots
    )
    order = "<p>Layers from left to right as they are in the model; below are the numbers in their names.</p>"
    return f"<section><h2>Layer by layer</h2>{legend(kind_of)}{''.join(figures)}{order}</section>"


def _refit(report: Report) -> str:
    if not report.parts:
        return ""
    largest = max(part.aside_before for part in report.parts.values()) or 1.0
    rows = [
        [
            cell(part.name),
            number(f"{part.before:.5f}"),
            number(f"{part.after:.5f}"),
            bar(f"{part.aside_before:.5f}", part.aside_before / largest),
            bar(f"{part.aside_after:.5f}", part.aside_after / largest),
            number(part.steps),
            number(f"{part.seconds:.1f}"),
        ]
        for part in report.parts.values()
    ]
    head = ["part", "fitted: before", "after", "set aside: before", "after", "steps", "seconds"]
    about = (
        "<p>The squared error of each part's output, relative to the dense part's, on the samples that were fitted and "
        "on those set aside.</p>"
    )
    return f"<section><h2>Refit</h2>{about}{table(head, rows)}</section>"


def _trials(report: Report) -> str:
    if not report.trials:
        return ""
    rows = [
        [cell(t.name), number(f"{t.loss:.4f}"), number(f"{t.gain:+.4f} ± {t.error:.4f}")] for t in report.trials
    ]
    return f"<section><h2>What was tried</h2>{table(['name', 'held-out loss', 'gain'], rows)}</section>"


def _recipe(report: Report) -> str:
    recipe: Mapping[str, object] = report.recipe
    command = f"<pre>{text(recipe['command'])}</pre>" if recipe.get("command") else ""
    rows = [[cell(name.replace("_", " ")), cell(value)] for name, value in recipe.items() if name != "command"]
    rows.append([cell("versions"), cell(", ".join(f"{name} {v}" for name, v in report.versions.items()))])
    return f"<section><h2>What was done</h2>{command}{table(['', ''], rows)}</section>"


def _layers(layers: Mapping[str, LayerReport]) -> str:
    if not layers:
        return ""
    largest = max(layer.relative for layer in layers.values()) or 1.0
    bounded = any(layer.gap is not None for layer in layers.values())
    terms = list(dict.fromkeys(term for layer in layers.values() for term in layer.terms))
    rows = [
        [
            cell(layer.name),
            number(f"{layer.shape[0]} x {layer.shape[1]}"),
            number(layer.pattern),
            bar(f"{100 * layer.sparsity:.2f}", layer.sparsity),
            bar(f"{layer.relative:.5f}", layer.relative / largest),
            *([number("" if layer.gap is None else f"{100 * layer.gap:.1f}")] if bounded else []),
            *(number(f"{layer.terms[term]:.5f}" if term in layer.terms else "") for term in terms),
            number(f"{layer.damping:g}"),
            number(f"{layer.seconds:.2f}"),
            cell(layer.status),
        ]
        for layer in layers.values()
    ]
    head = ["layer", "shape", "pattern", "zeros, %", "error", *(["gap, %"] if bounded else []), *terms]
    body = table([*head, "damping", "seconds", "status"], rows)
    opened = " open" if len(layers) <= _OPEN else ""
    return f"<section><details{opened}><summary><h2>All layers</h2></summary>{body}</details></section>"


def _list(title: str, items: Iterable[str], kind: str = "") -> str:
    found = [f"<li>{text(item)}</li>" for item in items]
    return f'<section class="{kind}"><h2>{title}</h2><ul>{"".join(found)}</ul></section>' if found else ""


def _by_reason(reasons: Mapping[str, str]) -> Iterator[str]:
    """Each reason once, after the names that have it."""
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        yield f"{listed(names, most=_NAMES)}: {reason}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
