"""``figure.svg`` and ``figure.png``: the same plot gives the same bytes, and an unchanged figure is not drawn again."""

import hashlib
import io
import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.results.plot import Plot
from research.results.record import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Paint = Callable[["Figure", Plot], None]
STYLE_VERSION = 2  # raise it when the drawing changes: committed figures are then drawn anew
# Okabe and Ito's colours, which colour-blind readers can tell apart
_COLOURS = {"reference": "#D55E00", "treatment": "#0072B2", "other": "#6B6B6B"}
_FURTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")  # after the two of _COLOURS
LINE_COLOURS = (_COLOURS["treatment"], _COLOURS["reference"], *_FURTHER_COLOURS)
_VERDICT_COLOURS = {"HOLDS": "#007A5A", "FAILS": "#D55E00", "INCONCLUSIVE": "#6B6B6B"}
_INK, FAINT = "#222222", "#8A8A8A"
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "figure", "svg.fonttype": "path",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "xtick.color": _INK,
    "ytick.color": _INK, "axes.labelcolor": _INK, "text.color": _INK, "figure.facecolor": "white",
    "savefig.facecolor": "white", "axes.linewidth": 0.8, "path.simplify": False,
}  # fmt: skip
_SEAL = re.compile(rb"inputs=([0-9a-f]{64}) png=([0-9a-f]{64}) svg=([0-9a-f]{64})")
_BLANK = b"0" * 64


def write_figure(
    folder: Path, plot: Plot, name: str = "figure", paint: Paint | None = None, size: tuple[float, float] | None = None
) -> dict[str, Path]:
    """Draws both files, unless those in ``folder`` show the same numbers in the same style and are untouched.

    paint, size  who draws a plot of a kind that is not known here, and how large it is in inches
    """
    paths = {f"{name}.{ending}": folder / f"{name}.{ending}" for ending in ("svg", "png")}
    svg_path, png_path = paths.values()
    if not _is_current(svg_path, png_path, inputs_hash(plot)):
        svg, png = draw(plot, paint, size)
        write_atomic(png_path, png)
        write_atomic(svg_path, svg)
    return paths


def inputs_hash(plot: Plot) -> str:
    """sha256 of what is drawn and of the style it is drawn in."""
    return hashlib.sha256(json.dumps([STYLE_VERSION, plot], sort_keys=True).encode()).hexdigest()


def _is_current(svg_path: Path, png_path: Path, inputs: str) -> bool:
    if not (svg_path.is_file() and png_path.is_file()):
        return False
    svg, png = svg_path.read_bytes(), png_path.read_bytes()
    seal = _SEAL.search(svg)
    if seal is None or seal[1].decode() != inputs or seal[2].decode() != hashlib.sha256(png).hexdigest():
        return False
    return seal[3].decode() == hashlib.sha256(svg.replace(seal[3], _BLANK, 1)).hexdigest()


def draw(plot: Plot, paint: Paint | None = None, size: tuple[float, float] | None = None) -> tuple[bytes, bytes]:
    """The SVG, sealed with the hashes of its inputs, of the PNG and of itself, and the PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():  # from the defaults, so that a reader's own settings do not change the bytes
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        figure = Figure(figsize=size or _size(plot))
        FigureCanvasAgg(figure)
        (paint or (_draw_strip if plot["kind"] == "strip" else _draw_lines))(figure, plot)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        picture = png.getvalue()
        seal = f"inputs={inputs_hash(plot)} png={hashlib.sha256(picture).hexdigest()} svg={_BLANK.decode()}"
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Description": seal})
    text = svg.getvalue()
    own = hashlib.sha256(text).hexdigest().encode()
    return text.replace(b"svg=" + _BLANK, b"svg=" + own, 1), picture


def _size(plot: Plot) -> tuple[float, float]:
    if plot["kind"] == "strip":
        return 9.0, 2.15 + 0.46 * len(plot["rows"])
    columns = min(3, len(plot["panels"]))
    return max(9.0, 3.9 * columns), 1.45 + 3.3 * math.ceil(len(plot["panels"]) / columns)


def _headline(figure: "Figure", plot: Plot) -> float:
    """The question and the finding at the top left; returns the height, in inches, left below them."""
    width, height = figure.get_size_inches()
    top = float(height) - 0.18
    question = textwrap.wrap(plot["question"], int(width * 9.4))
    figure.text(0.16 / width, top / height, "\n".join(question), size=12.5, weight="bold", va="top")
    top -= len(question) * 12.5 * 1.32 / 72 + 0.07
    word: dict[str, Any] = {"size": 9.5, "weight": "bold", "color": _VERDICT_COLOURS[plot["verdict"]], "va": "top"}
    figure.text(0.16 / width, top / height, plot["verdict"], **word)
    indent = 0.3 + 0.108 * len(plot["verdict"])
    sentence = textwrap.wrap(plot["sentence"], int((width - indent) * 14.0))
    figure.text(indent / width, top / height, "\n".join(sentence), size=9.5, color="#444444", va="top")
    return top - len(sentence) * 9.5 * 1.32 / 72 - 0.06


def _place(figure: "Figure", left: float, bottom: float, right: float, top: float) -> "Axes":
    """Axes between the given margins, in inches from the left and bottom edge (``right`` from the right edge)."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, (width - left - right) / width, (top - bottom) / height))


def _draw_strip(figure: "Figure", plot: Plot) -> None:
    rows = plot["rows"]
    labels = max((len(row["label"]) for row in rows), default=0)
    top = _headline(figure, plot)
    above = 0.14 + 0.2 * min(len(plot["references"]), 1) + 0.16 * (len(plot["references"]) > 1)
    axes = _place(figure, 0.45 + 0.078 * labels, 0.58, 1.75, top - above)
    for y, row in enumerate(rows):
        if row["summary"] is None:
            axes.text(0.01, y, "not measured", transform=axes.get_yaxis_transform(), color=FAINT, va="center", size=9)
        else:
            _strip_row(axes, y, row)
        if row["published"] is not None:
            axes.plot(row["published"], y, marker="D", ms=6.5, mfc="none", mec=_INK, mew=1.2, ls="none", zorder=5)
    for reference in plot["references"]:
        axes.axvline(reference["value"], color=FAINT, lw=1, ls=(0, (4, 3)), zorder=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.06)
    _name_references(axes, plot["references"])
    shown = any(row["published"] is not None for row in rows)
    told = "dot = one seed, bar = 95 % interval of the mean" + (", diamond = published" if shown else "")
    axes.set_xlabel(f"{plot['metric']} ({'; '.join(filter(None, (plot['better'], told)))})", size=9)


def _strip_row(axes: "Axes", y: int, row: dict[str, Any]) -> None:
    summary, colour = row["summary"], _COLOURS[row["role"]]
    n = summary["n"]
    # seeds are fanned out in their own order, so that equal values stay visible
    heights = [y + 0.2 * ((i + 0.5) / n - 0.5) for i in range(n)]
    if summary["low"] is not None:
        axes.plot(
            [summary["low"], summary["high"]], [y, y], color=colour, lw=7, alpha=0.22, solid_capstyle="butt", zorder=1
        )
    axes.plot(summary["values"], heights, "o", ms=5, mfc=colour, mec="white", mew=0.6, alpha=0.85, zorder=2)
    axes.plot([summary["mean"]] * 2, [y - 0.27, y + 0.27], color=colour, lw=2.2, zorder=4)
    text = _number(summary["mean"])
    if summary["low"] is not None:
        text += f"  [{_number(summary['low'])}, {_number(summary['high'])}]"
    axes.text(1.015, y, text, transform=axes.get_yaxis_transform(), color=colour, va="center", size=9.5)


def _name_references(axes: "Axes", references: list[dict[str, Any]]) -> None:
    """Labels above the axes: two that would overlap stand above each other, more share one, and so do equal values."""
    by_value: dict[float, list[str]] = {}
    for reference in references:
        by_value.setdefault(reference["value"], []).append(reference["label"])
    labels = [(value, f"{', '.join(names)} {_number(value)}") for value, names in sorted(by_value.items())]
    for near in _overlapping(axes, labels):
        if len(near) > 2:
            middle = (near[0][0] + near[-1][0]) / 2
            near = [(middle, f"{len(near)} lines, {near[0][1]} to {near[-1][1]}")]
        for row, (value, text) in enumerate(near):
            axes.annotate(
                text,
                (value, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 4 + 11.5 * row),
                textcoords="offset points",
                ha="center",
                va="bottom",
                size=8.5,
                color="#555555",
            )


def _overlapping(axes: "Axes", labels: list[tuple[float, str]]) -> list[list[tuple[float, str]]]:
    """The labels, by their place, in runs of which each would touch the one before."""
    low, high = axes.get_xlim()
    figure = axes.get_figure()
    inches = axes.get_position().width * float(figure.get_size_inches()[0]) if figure else 1.0  # type: ignore[union-attr]
    runs: list[list[tuple[float, str]]] = []
    end = -math.inf
    for value, text in labels:
        middle, half = (value - low) / (high - low) * inches, 0.036 * len(text)
        if not runs or middle - half > end:
            runs.append([])
        runs[-1].append((value, text))
        end = max(end, middle + half) if len(runs[-1]) > 1 else middle + half
    return runs


def _draw_lines(figure: "Figure", plot: Plot) -> None:
    width, _ = figure.get_size_inches()
    panels, top = plot["panels"], _headline(figure, plot)
    columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    column_width, row_height = (width - 0.2) / columns, (top - 0.1) / num_rows
    names = list(dict.fromkeys(line["label"] for panel in panels for line in panel["lines"]))
    by_role = {line["label"]: line["role"] for panel in panels for line in panel["lines"]}
    spare = iter(_FURTHER_COLOURS * (1 + len(names) // len(_FURTHER_COLOURS)))
    colours = {name: _COLOURS[by_role[name]] if by_role[name] != "other" else next(spare) for name in names}
    longest = max(len(name) for name in [*names, *(reference["label"] for reference in plot["references"])])
    for number, panel in enumerate(panels):
        column, row = number % columns, number // columns
        left, bottom = 0.1 + column * column_width + 0.86, (num_rows - 1 - row) * row_height + 0.62
        right = width - (0.1 + (column + 1) * column_width) + (0.16 + 0.078 * longest)
        axes = _place(figure, left, bottom, right, bottom + row_height - 0.98)
        _draw_panel(axes, plot, panel, colours)
        axes.set_title(panel["title"], size=10, loc="left", weight="bold", color="#444444")
        axes.set_xlabel(plot["axis"].replace("_", " "), size=9)
        if column == 0:
            axes.set_ylabel(plot["metric"] + (f"\n({plot['better']})" if plot["better"] else ""), size=9)
    figure.text(
        0.16 / width, 0.012, "dot = one seed; band = 95 % interval of the mean", size=8, color=FAINT, va="bottom"
    )


def _draw_panel(axes: "Axes", plot: Plot, panel: dict[str, Any], colours: dict[str, str]) -> None:
    points = [point for line in panel["lines"] for point in line["points"] if point["x"] is not None]
    levels = sorted({point["x"] for point in points})
    if levels and levels[0] > 0 and levels[-1] / levels[0] >= 8:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(levels, _tick_labels(levels, axes.get_xscale() == "log"), size=8.5)
    ends = []
    for line in panel["lines"]:
        if not line["points"]:
            continue
        colour = colours[line["label"]]
        drawn = line["points"]
        if drawn[0]["x"] is None:  # an arm that was not crossed with this factor: one level line
            drawn = [{**drawn[0], "x": level} for level in (levels[0], levels[-1])] if levels else []
        _draw_line(axes, drawn, colour, dashed=line["points"][0]["x"] is None)
        ends.append((drawn[-1]["summary"]["mean"], line["label"], colour) if drawn else (0.0, "", colour))
    for reference in plot["references"]:
        axes.axhline(reference["value"], color=FAINT, lw=1, ls=(0, (4, 3)), zorder=0)
        ends.append((reference["value"], reference["label"], "#555555"))
    axes.margins(x=0.05, y=0.08)
    axes.grid(axis="y", color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    label_ends(axes, ends)


def _tick_labels(levels: list[float], log: bool) -> list[str]:
    """Level labels, left out where they would run into the one before."""
    place = [math.log(level) if log else level for level in levels]
    labels, last = [], -math.inf
    for position, level in zip(place, levels, strict=True):
        free = position - last >= 0.085 * (place[-1] - place[0])
        labels.append(f"{level:g}" if free else "")
        last = position if free else last
    return labels


def _draw_line(axes: "Axes", points: list[dict[str, Any]], colour: str, dashed: bool) -> None:
    xs = [point["x"] for point in points]
    summaries = [point["summary"] for point in points]
    banded = [(x, s["low"], s["high"]) for x, s in zip(xs, summaries, strict=True) if s["low"] is not None]
    if banded:
        x, low, high = zip(*banded, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0, zorder=1)
    axes.plot(xs, [s["mean"] for s in summaries], color=colour, lw=2, ls="--" if dashed else "-", zorder=3)
    if not dashed:
        for x, summary in zip(xs, summaries, strict=True):
            axes.plot(
                [x] * summary["n"],
                summary["values"],
                "o",
                ms=3.6,
                mfc=colour,
                mec="white",
                mew=0.4,
                alpha=0.8,
                zorder=2,
            )


def label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Names at the right end of their lines, pushed apart where they would overlap."""
    axes.tick_params(axis="y", labelsize=8.5)
    figure = axes.get_figure()
    if figure is None or not ends:
        return
    low, high = axes.get_ylim()
    points = axes.get_position().height * figure.get_size_inches()[1] * 72  # type: ignore[union-attr]
    gap = 11.5 * (high - low) / points
    ends = sorted(ends)
    places = [value for value, _, _ in ends]
    for _ in range(200):  # each step parts every overlapping pair by half of what is lacking
        for i in range(len(places) - 1):
            lacking = max(0.0, gap - (places[i + 1] - places[i]))
            places[i], places[i + 1] = places[i] - lacking / 2, places[i + 1] + lacking / 2
    for place, (_, name, colour) in zip(places, ends, strict=True):
        axes.text(1.03, place, name, transform=axes.get_yaxis_transform(), color=colour, va="center", size=9)
    axes.set_ylim(low, high)


def _number(value: float) -> str:
    """Three to four significant digits, without an exponent where it can be avoided."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 4
        return f"{value:.{digits}f}" if value != round(value) or abs(value) < 1 else f"{value:.0f}"
    return f"{value:.3g}"
