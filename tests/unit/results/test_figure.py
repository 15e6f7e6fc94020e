"""The figure: equal numbers give equal bytes, unchanged figures are kept, changed or touched ones are drawn again."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.results.collect import collect
from research.results.figure import _draw_strip, draw, write_figure
from research.results.panel import Panel
from research.results.plot import Plot, plot_of
from research.results.report import build_report
from research.results.study import cells

STUDY_TEXT = """
study: digits
claim: C04
question: Do soft targets help?
arms: {hard: [method=supervised], soft: [method=soft_target]}
seeds: [0, 1, 2, 3, 4, 5]
metric: test/errors
lower_is_better: true
comparison: {kind: difference, baseline: hard, treatment: soft}
published: {source: a paper, arms: {hard: 14, soft: 7}}
"""
GRID_TEXT = """
study: grid
claim: C07
question: Which temperature does a narrow student want?
arms:
  hard: {overrides: [method=supervised], factors: [width]}
  soft: [method=soft_target]
factors:
  width: {30: [w=30], 300: [w=300]}
  temperature: {1: [t=1], 2: [t=2], 8: [t=8], 40: [t=40]}
seeds: [0, 1, 2]
metric: test/errors
lower_is_better: true
comparison: {kind: best_level, arm: soft, factor: temperature, group: width, low_group: 30, high_group: 300}
"""


def _strip(workshop) -> Plot:
    study = workshop.study()
    values = {
        cell.key: {"metrics": {"test/errors": 10.0 + cell.seed}} for cell in cells(study) if cell.key != "soft/seed=5"
    }
    values["requires/teacher"] = {"metrics": {"test/errors": 4.0}}
    return plot_of(study, Panel(cells(study), values), "INCONCLUSIVE", "soft differs by 3.")


def _lines(workshop) -> Plot:
    study = workshop.study(GRID_TEXT, "grid")
    values = {cell.key: {"metrics": {"test/errors": 10.0 + cell.seed + len(cell.key)}} for cell in cells(study)}
    return plot_of(study, Panel(cells(study), values), "HOLDS", "the order holds.")


def test_plot_shows_every_run_in_its_place(workshop) -> None:
    plot = _strip(workshop)
    assert plot["kind"] == "strip" and plot["references"] == [{"label": "teacher", "value": 4.0}]
    assert [(row["label"], row["role"], row["published"]) for row in plot["rows"]] == [
        ("hard", "reference", 14.0), ("soft", "treatment", 7.0),
    ]  # fmt: skip
    assert plot["rows"][1]["summary"]["values"] == (10.0, 11.0, 12.0, 13.0, 14.0)
    lines = _lines(workshop)
    assert (lines["kind"], lines["axis"]) == ("lines", "temperature")
    assert [panel["title"] for panel in lines["panels"]] == ["width 30", "width 300"]
    hard, soft = lines["panels"][0]["lines"]
    assert [point["x"] for point in soft["points"]] == [1.0, 2.0, 8.0, 40.0]
    assert [point["x"] for point in hard["points"]] == [None] and len(hard["points"][0]["summary"]["values"]) == 3


def test_the_metric_of_the_verdict_is_drawn(workshop) -> None:
    """Not the study's own, where the primary comparison has another; nor what was published of that."""
    text = STUDY_TEXT.replace("treatment: soft}", "treatment: soft, metric: test/accuracy, lower_is_better: false}")
    study = workshop.study(text)
    values = {cell.key: {"metrics": {"test/errors": 5.0, "test/accuracy": 0.5}} for cell in cells(study)}
    plot = plot_of(study, Panel(cells(study), values), "INCONCLUSIVE", "they are equal.")
    assert (plot["metric"], plot["better"]) == ("test accuracy", "higher is better")
    assert {value for row in plot["rows"] for value in row["summary"]["values"]} == {0.5}
    assert [row["published"] for row in plot["rows"]] == [None, None]


def test_labels_of_references_do_not_lie_on_each_other(workshop) -> None:
    plot = _strip(workshop)
    for names, expected in (
        ({"a": 3.0, "b": 16.0}, ["a 3", "b 16"]),
        ({"teacher": 12.0, "other teacher": 12.3}, ["teacher 12", "other teacher 12.3"]),
        ({f"m{i}": 12 + 0.1 * i for i in range(10)}, ["10 lines, m0 12 to m9 12.9"]),
    ):
        plot["references"] = [{"label": label, "value": value} for label, value in names.items()]
        figure = Figure(figsize=(9.0, 3.0))
        canvas = FigureCanvasAgg(figure)
        _draw_strip(figure, plot)
        labels = [text for text in figure.axes[0].texts if any(text.get_text().startswith(n) for n in expected)]
        assert sorted(text.get_text() for text in labels) == sorted(expected)
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in labels]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("make", [_strip, _lines])
def test_drawing_is_the_same_byte_for_byte(workshop, make) -> None:
    plot = make(workshop)
    svg, png = draw(plot)
    assert draw(copy.deepcopy(plot)) == (svg, png)
    assert png.startswith(b"\x89PNG") and b"<svg" in svg and b"Date" not in png[:400]
    assert b"dc:date" not in svg


def test_a_reader_s_own_matplotlib_settings_do_not_change_the_bytes(workshop) -> None:
    import matplotlib

    plot = _strip(workshop)
    before = draw(plot)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.hashsalt": "other"}):
        assert draw(plot) == before
        assert matplotlib.rcParams["font.size"] == 20


@pytest.mark.parametrize("change", ["number", "svg", "png", "delete"])
def test_only_a_changed_or_touched_figure_is_drawn_again(workshop, tmp_path: Path, change: str) -> None:
    plot = _strip(workshop)
    paths = write_figure(tmp_path, plot)
    first = {name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for name, path in paths.items()}
    write_figure(tmp_path, plot)
    assert first == {name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for name, p in paths.items()}
    if change == "number":
        plot["rows"][0]["summary"]["values"] = (1.0, *plot["rows"][0]["summary"]["values"][1:])
        write_figure(tmp_path, plot)
        assert all(path.read_bytes() != first[name][0] for name, path in paths.items())
        return
    target = paths["figure.png" if change == "png" else "figure.svg"]
    if change == "delete":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes().replace(b"path", b"Path") + b"\n")
    write_figure(tmp_path, plot)
    assert {name: path.read_bytes() for name, path in paths.items()} == {name: item[0] for name, item in first.items()}


def test_an_arm_without_runs_and_a_study_without_any_can_be_drawn(workshop) -> None:
    study = workshop.study()
    nothing = plot_of(study, Panel(cells(study), {}), "INCONCLUSIVE", "nothing to compare.")
    assert all(row["summary"] is None for row in nothing["rows"])
    assert draw(nothing)[1].startswith(b"\x89PNG")
    grid = workshop.study(GRID_TEXT, "grid")
    few = {"hard/width=30/seed=0": {"metrics": {"test/errors": 3.0}}}
    assert draw(plot_of(grid, Panel(cells(grid), few), "INCONCLUSIVE", "too little."))[1].startswith(b"\x89PNG")


def test_an_unchanged_report_imports_nothing_heavy(workshop) -> None:
    """No torch, Lightning, pandas or scipy ever; no matplotlib where no figure has to be drawn."""
    study = workshop.study()
    workshop.fill(study, {"hard": 40, "soft": 15})
    collect(study, workshop.runs)
    build_report(study.path.parent)
    script = (
        "import sys; from research.results.report import build_report; build_report(sys.argv[1]); "
        "print([m for m in ('torch', 'lightning', 'pandas', 'scipy', 'matplotlib', 'hydra') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(study.path.parent)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_reading_a_study_imports_neither_numpy_nor_pyarrow() -> None:
    script = (
        "import sys, research.results.study_file, research.results.record; "
        "print([m for m in ('numpy', 'pyarrow', 'matplotlib', 'scipy', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
