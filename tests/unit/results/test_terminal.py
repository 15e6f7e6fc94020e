"""What a study says on the terminal and in the project's table of verdicts."""

import json
from pathlib import Path

import pytest
from scipy import stats

from research.results.collect import collect
from research.results.comparison import Comparison
from research.results.fields import StudyError
from research.results.overview import BEGIN, END, overview_table, write_overview
from research.results.readme import p_text
from research.results.report import build_report
from research.results.terminal import study_table, verdict_line

HARD, SOFT = [60, 62, 64, 58, 61, 63], [30, 31, 29, 33, 28, 32]


def _built(workshop) -> Path:
    study = workshop.study()
    errors = {"hard": HARD, "soft": SOFT}
    workshop.fill(study, lambda cell: errors[cell.arm][cell.seed], teacher=20)
    collect(study, workshop.runs)
    folder = study.path.parent
    build_report(folder)
    return folder


def test_terminal_table_has_student_t_intervals_per_arm(workshop) -> None:
    lines = study_table(_built(workshop)).splitlines()
    low, high = stats.t.interval(0.95, 5, loc=sum(HARD) / 6, scale=stats.sem(HARD))
    hard = next(line for line in lines if line.startswith("hard"))
    assert f"{sum(HARD) / 6:.4g} [{low:.4g}, {high:.4g}]" in hard
    assert hard.split()[1] == "6" and hard.split()[-1] == "2.5"
    assert next(line for line in lines if line.startswith("teacher")).split()[1:3] == ["1", "20"]


def test_a_metric_that_no_run_has_is_left_out(workshop) -> None:
    lines = study_table(_built(workshop)).splitlines()
    assert "errors" in lines[0] and "NLL" in lines[0]
    assert "agreement" not in lines[0], "a column that no run fills is left out"


def test_verdict_line_is_that_of_the_verdict_file(workshop) -> None:
    folder = _built(workshop)
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["verdict"] == "HOLDS"
    assert verdict_line(folder).startswith("HOLDS (C04): errors of soft")


def test_a_study_without_a_report_is_told_so(workshop) -> None:
    study = workshop.study()
    (study.path.parent / "README.md").write_text("nothing yet\n")
    with pytest.raises(StudyError, match="run `distill report` first"):
        verdict_line(study.path.parent)


def test_overview_lists_every_verdict_between_its_markers(workshop, tmp_path: Path) -> None:
    folder = _built(workshop)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert write_overview(readme, folder.parent)
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| study |") and text.endswith(f"{END}\nafter\n") and "old" not in text
    comparison = json.loads((folder / "verdict.json").read_text())["comparison"]
    row = next(line for line in overview_table(folder.parent).splitlines() if "[digits]" in line)
    told = json.loads((folder / "verdict.json").read_text())
    for level, shown in ((0.95, row), (None, row), (0.9, row.replace(" | 12 |", " (90 %) | 12 |"))):
        told["comparison"] = (
            {**comparison, "level": level} if level else {k: comparison[k] for k in comparison if k != "level"}
        )
        (folder / "verdict.json").write_text(json.dumps(told))
        assert shown in overview_table(folder.parent)
    assert f"| {comparison['estimate']:.4g}" in row and "| **HOLDS** |" in row and row.endswith("| 12 |")


def test_a_single_study_stands_on_the_front_with_its_arms_and_its_verdict(workshop, tmp_path: Path) -> None:
    folder = _built(workshop)
    readme = tmp_path / "README.md"
    mark = "<!-- table {}:{} -->"
    parts = [f"{mark.format(name, 'begin')}\nold\n{mark.format(name, 'end')}" for name in (folder.name, "unknown")]
    readme.write_text("\n".join(["before", *parts, "after\n"]))
    assert write_overview(readme, folder.parent)
    text = readme.read_text()
    rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert [line for line in text.splitlines() if line.startswith("| ")] == rows and rows[1].startswith("| hard | 6 | ")
    assert f"{folder.name}/README.md): **HOLDS** (C04): errors of soft" in text
    assert "unknown has no results yet" in text and "old" not in text and text.endswith("after\n")
    assert write_overview(readme, folder.parent) and readme.read_text() == text, "written again, the same"


def test_overview_leaves_a_readme_without_markers_and_refuses_a_lone_one(workshop, tmp_path: Path) -> None:
    folder = _built(workshop)
    readme = tmp_path / "README.md"
    readme.write_text("no table here\n")
    assert not write_overview(readme, folder.parent)
    assert readme.read_text() == "no table here\n"
    readme.write_text(f"{END} {BEGIN}\n")
    with pytest.raises(StudyError, match="expected one"):
        write_overview(readme, folder.parent)


def test_a_share_of_no_resample_is_not_printed_as_zero() -> None:
    found = Comparison(3.0, 3.0, 19.0, 0.0, "share of seed bootstraps", 5, None, "temperature", ())
    assert p_text(found) == "p < 0.0001" and p_text(found, "share against it") == "share against it < 0.0001"
