"""``curve_<metric>_<against>.svg`` and ``.png``: a line per arm over what it had cost by then."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from research.results.curves import CURVES_FILE, curve_name, curve_plot, read_study_curves
from research.results.figure import FAINT, LINE_COLOURS, label_ends, write_figure
from research.results.plot import Plot
from research.results.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (9.0, 4.6)


def curve_files(study: Study) -> list[str]:
    """The names of the figures that a study's curves are drawn in."""
    return [f"{curve_name(spec)}.{ending}" for spec in study.curves for ending in ("svg", "png")]


def write_curve_figures(folder: Path, study: Study) -> None:
    """Draws every curve that the study declares, from ``curves.csv`` in ``folder``; unchanged ones are kept.

    Raises StudyError where there is no such file.
    """
    if not study.curves:
        return
    groups = read_study_curves(folder / CURVES_FILE, study)
    for spec in study.curves:
        write_figure(folder, curve_plot(study, spec, groups), curve_name(spec), paint, SIZE)


def paint(figure: "Figure", plot: Plot) -> None:
    """Question and axes, each seed's own line thin, the mean over seeds thick with its interval as a band."""
    width, height = SIZE
    question = textwrap.wrap(plot["question"], int(width * 9.4))
    figure.text(0.16 / width, 1 - 0.18 / height, "\n".join(question), size=12.5, weight="bold", va="top")
    top = height - 0.18 - len(question) * 12.5 * 1.32 / 72 - 0.12
    labels = max((len(line["label"]) for line in plot["lines"]), default=0)
    right = 0.35 + 0.078 * labels
    axes = figure.add_axes((0.75 / width, 0.62 / height, (width - 0.75 - right) / width, (top - 0.62) / height))
    ends = []
    for number, line in enumerate(plot["lines"]):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        for points in line["seeds"]:
            axes.plot(*zip(*points, strict=True), color=colour, lw=0.7, alpha=0.45, zorder=2)
        mean = line["mean"]
        if not mean:
            continue
        places = [point["x"] for point in mean]
        if all(point["low"] is not None for point in mean):
            low, high = ([point[end] for point in mean] for end in ("low", "high"))
            axes.fill_between(places, low, high, color=colour, alpha=0.15, lw=0, zorder=1)
        marker = "o" if len(mean) == 1 else None  # a line of one point would not be seen
        axes.plot(places, [point["mean"] for point in mean], color=colour, lw=2, marker=marker, zorder=3)
        ends.append((mean[-1]["mean"], line["label"], colour))
    is_cost = not plot["against"].endswith(("steps", "trials"))
    axes.set_xlabel(f"spent, {plot['against']}" if is_cost else plot["against"], size=9)
    axes.set_ylabel(plot["metric"], size=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    label_ends(axes, ends)
    told = "thin line = one seed; band = 95 % interval of the mean"
    if plot["unmeasured"]:
        told = f"not measured while it was trained: {', '.join(plot['unmeasured'])}; {told}"
    figure.text(1 - 0.1 / width, 0.08 / height, told, size=8, color=FAINT, va="bottom", ha="right")
