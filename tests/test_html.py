"""The report as a page: every figure of every layer, nothing from outside as markup, the whole file or none."""

import errno
import math
import os
import re
from html.parser import HTMLParser

import pytest

from moonshot.files import plan as planning
from moonshot.files.folder import Opened
from moonshot.pruning.chart import COLOURS, chart, kinds
from moonshot.pruning.html import html, save_html
from moonshot.pruning.report import LayerReport, PartReport, Report, Trial
from tests.models import DEMO
from tests.test_cli import prune_arguments, run

NASTY = "</title><script>alert('x')</script>\x1b[2J\udcff"


class Reader(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "line"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def layer(name, **changes):
    about = dict(
        shape=(8, 4), pattern="50%", sparsity=0.5, relative=0.02, terms={"Reconstruction": 0.02}, damping=0.01
    )
    return LayerReport(name=name, **about | dict(status="completed", seconds=0.25) | changes)


def report(*layers, **changes):
    recipe = {"model": "some model", "pattern": "50%", "dampening_frac": 0.01, "command": "moonshot prune x"}
    about = dict(recipe=recipe, versions={"moonshot": "1"}, seconds=75.0, peak_memory=2**30)
    return Report(**about | changes, layers={each.name: each for each in layers})


def test_a_page_says_all_that_a_report_has():
    found = report(
        layer("a.0.up", gap=0.125),
        layer("a.0.down", relative=0.4321, sparsity=0.75, gap=0.25, damping=0.04, status="iteration limit"),
        layer("a.1.up", note="the loss does not depend on it"),
        parts={"a.0": PartReport("a.0", 0.5, 0.4, 0.61, 0.52, 144, 3.0)},
        trials=[Trial("even", 2.5, 0.0, 0.0), Trial("measured", 2.25, 0.25, 0.01)],
        skipped={"a.1.down": "it has three inputs"},
        left_alone={"head": "on top of the base model"},
        unused={"batch 0, sample 3": "no target"},
        before="perplexity 7.12",
        after="perplexity 8.12",
    )
    reader = Reader(html(found))
    said = " ".join(reader.words)
    for words in (
        "some model, pruned to 50%",
        "0.43210",
        "iteration limit",
        "the loss does not depend on it",
        "12.5",
        "0.04",
        "0.61000",
        "144",
        "+0.2500",
        "it has three inputs",
        "on top of the base model",
        "no target",
        "perplexity 7.12",
        "perplexity 8.12",
        "moonshot prune x",
        "75.0 s",
        "1,024 MiB",
        "1 layer needed more damping",
        "largest error, in a.0.down",
    ):
        assert words in said, words
    dots = [attributes for tag, attributes in reader.tags if tag == "circle"]
    assert len(dots) == 3 + 3 + 2  # errors, zeros, and the two gaps
    assert reader.open == [] and not any(tag in {"script", "link", "img"} for tag, _ in reader.tags)
    assert "://" not in html(found) and "url(" not in html(found)  # nothing is fetched


def test_nothing_from_outside_is_markup():
    found = report(
        layer(NASTY, pattern=NASTY, status=NASTY, note=NASTY, terms={NASTY: 0.1}),
        layer(NASTY + ".b"),
        parts={NASTY: PartReport(NASTY, 1, 1, 1, 1, 1, 1)},
        trials=[Trial(NASTY, 1, 0, 0)],
        skipped={NASTY: NASTY},
        left_alone={NASTY: NASTY},
        unused={NASTY: NASTY},
        before=NASTY,
        after=NASTY,
        versions={NASTY: NASTY},
        recipe={"model": NASTY, "pattern": NASTY, "command": NASTY, NASTY: NASTY},
    )
    page = html(found)
    tags = {tag for tag, _ in Reader(page).tags}
    assert "script" not in tags and "\x1b" not in page and "\\x1b[2J\\udcff" in page
    page.encode("utf-8")


@pytest.mark.parametrize("value", [0.0, 1e-12, math.inf, math.nan, 3.0])
def test_dots_stay_inside_whatever_the_values(value):
    values = {f"l.{k}.{'ab'[k % 2]}": value for k in range(4)} | {"l.4.a": 0.02}
    for log in (True, False):
        picture = chart(values, kinds(list(values)), log=log)
        places = [float(place) for place in re.findall(r'c[xy]="([^%]*)%"', picture)]
        assert len(places) == 10 and all(0 <= place <= 100 for place in places)
    html(report(*(layer(name, relative=value) for name in values)))


def test_heights_are_in_the_order_of_the_values_and_ticks_where_they_say():
    values = {"a": 0.001, "b": 0.01, "c": 0.1}
    picture = chart(values, kinds(list(values)), log=True)
    bottom, middle, top = (float(y) for y in re.findall(r'cy="([^%]*)%"', picture))
    assert bottom > middle > top and middle == pytest.approx((bottom + top) / 2, abs=0.02)
    ticks = dict(re.findall(r'y="([^%]*)%" dx="-8" dy="4">([^<]*)<', picture))
    assert {float(y): float(tick) for y, tick in ticks.items()}[middle] == 0.01


def test_layers_of_a_kind_share_a_colour_and_the_rarest_kinds_one():
    names = (
        [f"layers.{k}.mlp.up_proj" for k in range(3)]
        + ["layers.0.q", "3"]
        + [f"only.{k}.x{k}" for k in range(9)]
    )
    found = kinds(names)
    assert {found[name] for name in names[:3]} == {"up_proj"}
    assert len(set(found.values())) <= COLOURS and "other" in found.values()


def test_a_report_of_no_layers_is_a_page():
    assert "<h1>" in html(Report(recipe={}, versions={}))


def test_the_whole_file_or_none(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_html(report(layer("a")), path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    save_html(report(layer("a")), path)
    assert path.read_text().startswith("<!doctype html>") and path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("inside", [False, True])
def test_prune_writes_it_and_measures_before_and_after(monkeypatch, tmp_path, capsys, inside):
    place = tmp_path / "pruned" / "about" / "report.html" if inside else tmp_path / "report.html"
    arguments = prune_arguments(
        tmp_path, targets="*.0.*", solver="magnitude", objective="reconstruction", html=place
    )
    assert run(monkeypatch, "prune", DEMO / "model", *arguments) == 0
    said = " ".join(Reader(place.read_text()).words)
    before, after = (
        float(value) for value in re.findall(r"perplexity ([0-9.]+) \(context 64, 4 windows\)", said)
    )
    assert before < after and "model.layers.0.mlp.up_proj" in said
    assert f"report: {place}" in capsys.readouterr().out
    again = prune_arguments(tmp_path, targets="*.0.*", solver="magnitude", objective="reconstruction")
    assert (
        run(monkeypatch, "prune", DEMO / "model", *again, "--overwrite") == 0
    )  # all in the folder is moonshot's


@pytest.mark.parametrize("option", ["html", "save", "checkpoint"])
def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_done(
    monkeypatch, tmp_path, capsys, option
):
    """Also by --dry-run."""
    folder, temporary = tmp_path / "reports", planning.TemporaryFile
    folder.mkdir()

    def read_only(dir):
        if dir == folder:
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary(dir=dir)

    monkeypatch.setattr(planning, "TemporaryFile", read_only)
    arguments = prune_arguments(tmp_path, **{option: folder if option == "checkpoint" else folder / "a.html"})
    monkeypatch.setattr("moonshot.app.prune.Source", None)
    for more in ([], ["--dry-run"]):
        assert run(monkeypatch, "prune", DEMO / "model", *arguments, *more) == 1
        assert f"no file can be made in {folder}: [Errno 30] Read-only file system; choose another folder" in (
            capsys.readouterr().err
        )
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_folder_that_is_gone_is_said_after_the_model_is_saved(monkeypatch, tmp_path, capsys):
    (tmp_path / "reports").mkdir()
    arguments = prune_arguments(
        tmp_path, targets="*.0.*", solver="magnitude", html=tmp_path / "reports" / "a.html"
    )

    save = Opened.save

    def saved(self, *rest):
        folder = save(self, *rest)
        (tmp_path / "reports").rmdir()
        return folder

    monkeypatch.setattr(Opened, "save", saved)
    assert run(monkeypatch, "prune", DEMO / "model", *arguments) == 1
    assert f"({tmp_path / 'pruned'} is saved)" in capsys.readouterr().err
