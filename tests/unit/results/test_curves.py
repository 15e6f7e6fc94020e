"""Curves of a study: rows that are read back to the last bit, means by hand, and figures rebuilt from them alone."""

import csv
import dataclasses
import math
from pathlib import Path

import pytest

from research.results.collect import collect
from research.results.curves import (
    curve_plot,
    joined_curves,
    read_curve,
    read_study_curves,
    write_curve,
)
from research.results.fields import StudyError
from research.results.report import build_report
from research.results.study import CurveSpec, cells

ROWS = [
    {"step": 5.0, "spent_flops": 1e9 / 3, "spent_tokens": 40.0, "spent_seconds": 0.1, "val/accuracy": 1 / 3},
    {"step": 9.0, "spent_flops": 2e9, "spent_tokens": 72.0, "spent_seconds": 0.7, "val/nll": math.inf},
]
CURVES = "\ncurves: [{metric: val/accuracy, against: flops}, {metric: val/accuracy, against: steps}]\n"


def test_a_curve_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    write_curve(tmp_path / "curve.csv", ROWS)
    found = read_curve(tmp_path / "curve.csv")
    assert found == [{**ROWS[0], "val/nll": None}, {**ROWS[1], "val/accuracy": None}]
    (tmp_path / "curve.csv").write_text("step,val/accuracy\nfive,1\n")
    with pytest.raises(StudyError, match="not a run's curve"):
        read_curve(tmp_path / "curve.csv")


def test_phases_go_on_where_the_one_before_ended() -> None:
    second = [{"step": 2.0, "spent_flops": None, "spent_tokens": 8.0, "spent_seconds": 0.5, "val/accuracy": 0.5}]
    joined = joined_curves([ROWS, second, second])
    assert [row["step"] for row in joined] == [5, 9, 11, 13]
    assert [row["spent_tokens"] for row in joined] == [40, 72, 80, 88]
    assert [row["spent_flops"] for row in joined[2:]] == [None, None], "what one did not count is not known of the sum"
    assert joined[0]["val/accuracy"] == 1 / 3 and ROWS[0]["step"] == 5


def rows_of(*points: tuple[float, float | None]) -> list[dict[str, float | None]]:
    return [{"step": i + 1.0, "spent_flops": x, "val/accuracy": y} for i, (x, y) in enumerate(points)]


def test_a_search_is_drawn_over_its_trials(workshop) -> None:
    study = dataclasses.replace(workshop.study(), command="sweep")
    groups = {"tpe": {0: [{"step": i + 1.0, "search/best": 9.0 - i} for i in range(3)]}}
    plot = curve_plot(study, CurveSpec("search/best", "steps"), groups)
    assert (plot["against"], plot["metric"]) == ("trials", "best value that the search found")
    assert plot["lines"][0]["seeds"] == [[[1.0, 9.0], [2.0, 8.0], [3.0, 7.0]]]


def test_means_are_taken_at_equal_cost(workshop) -> None:
    """Seed 0 is measured at 2, 4, 6 GFLOP, seed 1 at 3 and 5: their mean begins at 3 and ends at 5."""
    study = workshop.study()
    groups = {
        "soft": {
            0: rows_of((2e9, 0.0), (4e9, 0.4), (6e9, 0.6), (7e9, None)),
            1: rows_of((3e9, 0.1), (5e9, 0.7)),
        },
        "hard": {0: rows_of((1e9, 0.5))},
    }
    plot = curve_plot(study, CurveSpec("val/accuracy", "flops"), groups)
    soft, hard = plot["lines"]
    assert plot["against"] == "GFLOP" and (soft["label"], hard["label"]) == ("soft (n = 2)", "hard (n = 1)")
    assert soft["seeds"][0] == [[2.0, 0.0], [4.0, 0.4], [6.0, 0.6]]
    assert [point["x"] for point in soft["mean"]] == [3.0, 4.0, 5.0]
    assert [point["mean"] for point in soft["mean"]] == pytest.approx(
        [(0.2 + 0.1) / 2, (0.4 + 0.4) / 2, (0.5 + 0.7) / 2]
    )
    assert plot["metric"] == "val accuracy"
    half = 12.7062047 * abs(0.2 - 0.1) / 2  # t(1), SD / sqrt(2) of two values is half their distance
    assert soft["mean"][0]["high"] - soft["mean"][0]["mean"] == pytest.approx(half)
    assert hard["mean"] == [{"x": 1.0, "mean": 0.5, "low": None, "high": None}]


def filled(workshop, with_curves: bool = True):
    study = workshop.study(workshop_text(workshop))
    workshop.fill(study, {"hard": 40, "soft": 15})
    for cell in cells(study):
        folder = workshop.run(cell.key, cell.seed, 20, artifacts={"curve": "curve.csv"} if with_curves else {})
        slope = 0.1 + 0.01 * cell.seed + (0.05 if cell.arm == "soft" else 0)
        rows = [{"step": k, "spent_flops": k * 1e12, "spent_tokens": k * 10.0, "spent_seconds": k * 0.5,
                 "val/accuracy": slope * k, "val/nll": 1.0} for k in (1.0, 2.0, 3.0)]  # fmt: skip
        write_curve(folder / "curve.csv", rows)
    return study


def workshop_text(workshop) -> str:
    study = workshop.study()
    return study.path.read_text() + CURVES


def test_a_study_keeps_its_rows_and_its_figures_are_made_of_them_alone(workshop, tmp_path: Path) -> None:
    study = filled(workshop)
    folder = study.path.parent
    collect(study, workshop.runs)
    with (folder / "curves.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == ["arm", "seed", "step", "spent_flops", "spent_tokens", "spent_seconds", "val/accuracy"]
    assert len(lines) == 2 * 6 * 3 and float(lines[-1]["val/accuracy"]) == (0.1 + 0.05 + 0.05) * 3
    paths = build_report(folder)
    names = {"curve_val_accuracy_flops.svg", "curve_val_accuracy_flops.png", "curve_val_accuracy_steps.svg"}
    assert names <= set(paths) and all(paths[name].stat().st_size > 1000 for name in names)
    assert "![val/accuracy against flops](curve_val_accuracy_flops.svg)" in (folder / "README.md").read_text()
    before = {name: path.read_bytes() for name, path in paths.items()}
    workshop.runs.rename(tmp_path / "gone")
    for path in paths.values():
        path.unlink()
    build_report(folder)
    assert {name: path.read_bytes() for name, path in paths.items() if name != "README.md"} == {
        name: text for name, text in before.items() if name != "README.md"
    }
    groups = read_study_curves(folder / "curves.csv", study)
    assert list(groups) == ["hard", "soft"] and list(groups["soft"]) == [0, 1, 2, 3, 4, 5]


def test_changed_rows_are_drawn_again(workshop) -> None:
    study = filled(workshop)
    folder = study.path.parent
    collect(study, workshop.runs)
    before = build_report(folder)["curve_val_accuracy_flops.svg"].read_bytes()
    text = (folder / "curves.csv").read_text()
    (folder / "curves.csv").write_text(
        text.replace("soft,0,3,3000000000000,30,1.5,", "soft,0,3,3000000000000,30,1.5,1")
    )
    assert build_report(folder)["curve_val_accuracy_flops.svg"].read_bytes() != before


def test_a_run_without_the_metric_or_without_a_curve_is_named(workshop) -> None:
    study = filled(workshop)
    write_curve(workshop.runs / "soft/seed=3/curve.csv", [{"step": 1.0, "val/nll": 1.0, "val/accuracy": None}])
    with pytest.raises(StudyError, match=r"soft/seed=3 measured no 'val/accuracy'; valid: val/nll"):
        collect(study, workshop.runs)
    study = filled(workshop, with_curves=False)
    with pytest.raises(StudyError, match="hard/seed=0 left no curve; run it again"):
        collect(study, workshop.runs)
    (study.path.parent / "curves.csv").unlink(missing_ok=True)


def test_an_arm_that_was_never_measured_is_named_on_the_figure_and_one_that_no_arm_measured_is_refused(
    workshop,
) -> None:
    study = filled(workshop)
    unmeasured = [{"step": 1.0, "spent_flops": 1e9, "val/nll": 1.0}]
    for seed in study.seeds:
        write_curve(workshop.runs / f"hard/seed={seed}/curve.csv", unmeasured)
    collect(study, workshop.runs)
    groups = read_study_curves(study.path.parent / "curves.csv", study)
    assert groups["hard"][0][0]["spent_flops"] == 1e9 and groups["hard"][0][0]["val/accuracy"] is None
    plot = curve_plot(study, CurveSpec("val/accuracy", "flops"), groups)
    assert [line["label"] for line in plot["lines"]] == ["soft (n = 6)"] and plot["unmeasured"] == ["hard"]
    figure = build_report(study.path.parent)["curve_val_accuracy_flops.svg"].read_text()
    assert "not measured while it was trained: hard" in figure
    for seed in study.seeds:
        write_curve(workshop.runs / f"soft/seed={seed}/curve.csv", unmeasured)
    with pytest.raises(StudyError, match=r"hard/seed=0 measured no 'val/accuracy'; valid: val/nll"):
        collect(study, workshop.runs)


def test_records_without_rows_are_refused_by_the_report(workshop) -> None:
    study = filled(workshop)
    collect(study, workshop.runs)
    (study.path.parent / "curves.csv").unlink()
    with pytest.raises(StudyError, match=r"curves\.csv: no such file; .* draws curves"):
        build_report(study.path.parent)


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ("{metric: val/accuracy}", "a list of curves"),
        ("[{metric: accuracy, against: flops}]", r"curves\[0\]\.metric"),
        ("[{metric: val/accuracy, against: flop}]", "did you mean 'flops'"),
        ("[{metric: val/accuracy, against: flops, arm: a}]", r"unknown key 'curves\[0\]\.arm'"),
        ("[{metric: val/nll, against: flops}, {metric: val/nll, against: flops}]", "each curve once"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(workshop, curves: str, message: str) -> None:
    text = workshop.study().path.read_text()
    with pytest.raises(StudyError, match=message):
        workshop.study(f"{text}\ncurves: {curves}\n")
