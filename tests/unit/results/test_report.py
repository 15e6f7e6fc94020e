"""From run directories to committed files to a verdict: content, byte-for-byte rebuild, and what goes wrong."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from research.results.collect import ITEMS_FILE, RECORDS_FILE, collect, portable, read_committed
from research.results.comparison import Comparison
from research.results.comparison_spec import ComparisonSpec, OperandSpec
from research.results.fields import StudyError
from research.results.items import read_study_items
from research.results.readme import BEGIN, END, with_results
from research.results.report import VERDICT_KEYS, build_report, judge, revision_of, study_command
from research.results.study import cells
from research.results.study_file import read_study

OUTPUTS = ("README.md", "figure.png", "figure.svg", "report.sha256", "results.csv", "verdict.json")


def _built(workshop, errors=None, **options) -> tuple[Path, dict]:
    study = workshop.study()
    workshop.fill(study, errors or {"hard": 40, "soft": 15}, **options)
    collect(study, workshop.runs)
    build_report(study.path.parent)
    return study.path.parent, json.loads((study.path.parent / "verdict.json").read_text())


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_verdict_file_has_the_frozen_schema_and_the_right_numbers(workshop) -> None:
    _, verdict = _built(workshop)
    assert tuple(verdict) == VERDICT_KEYS
    assert (verdict["study"], verdict["claim"], verdict["verdict"], verdict["metric"]) == (
        "digits", "C04", "HOLDS", "test/errors",
    )  # fmt: skip
    hard = [40.0, 41.0, 42.0, 40.0, 41.0, 42.0]
    assert verdict["arms"]["hard"] == {"mean": 41.0, "sd": pytest.approx(np.std(hard, ddof=1)), "n": 6, "values": hard}
    comparison = verdict["comparison"]
    assert list(comparison)[:5] == ["estimate", "low", "high", "p_value", "test"]
    assert (comparison["estimate"], comparison["p_value"], comparison["n"]) == (25.0, 0.03125, 6)
    assert 0 < comparison["low"] < 25 < comparison["high"] and "seeds and items" in comparison["test"]
    assert verdict["requires"]["teacher"]["values"] == [4.0]
    share = verdict["secondary"]["gap_closed"]
    assert share["estimate"] == pytest.approx(25 / 37) and share["p_holm"] == share["p_value"] == 1 / 64
    assert verdict["seconds"] == pytest.approx(13 * 2.5) and verdict["revision"] == "abc" and verdict["missing"] == []
    assert verdict["command"] == "distill study experiments/digits"


def test_report_is_rebuilt_byte_for_byte(workshop) -> None:
    """From the committed files alone: run directories gone, outputs deleted, another folder."""
    folder, _ = _built(workshop)
    first = _contents(folder)
    assert set(first) == {*OUTPUTS, RECORDS_FILE, ITEMS_FILE, "study.yaml"}
    build_report(folder)
    assert _contents(folder) == first
    elsewhere = folder.parent / "elsewhere" / "experiments" / "digits"
    elsewhere.mkdir(parents=True)
    for name in ("study.yaml", RECORDS_FILE, ITEMS_FILE, "README.md"):
        (elsewhere / name).write_bytes(first[name])
    build_report(elsewhere)
    assert _contents(elsewhere) == first


def test_the_command_names_the_folder_that_the_study_lies_in(workshop) -> None:
    study = workshop.study()
    assert study_command(study) == "distill study experiments/digits"
    study.path.parents[1].rename(study.path.parents[2] / "studies")
    moved = read_study(study.path.parents[2] / "studies" / "digits")
    assert study_command(moved, "smoke") == "distill study studies/digits preset=smoke"


def test_collecting_twice_gives_the_same_bytes_and_no_machine_paths(workshop) -> None:
    folder, _ = _built(workshop)
    first = _contents(folder)
    collect(read_study(folder), workshop.runs)
    assert _contents(folder) == first
    text = first[RECORDS_FILE].decode()
    assert str(workshop.root) not in text and "/somewhere" not in text
    line = json.loads(text.splitlines()[7])
    assert line["cell"] == {"arm": "soft", "factors": {}, "seed": 0, "key": "soft/seed=0"}
    assert line["record"]["overrides"] == ["teacher={requires.teacher}", "data.root=<path>/mnist"]
    assert "config" not in line["record"] and line["record"]["metrics"]["test/errors"] == 15.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=/home/me/data/x.bin", "a=<path>/x.bin"),
        ("test/errors", "test/errors"),
        ("https://host/a/b", "https://host/a/b"),
        ("[/a/b, '/c/d']", "[<path>/b, '<path>/d']"),
        ("/runs/study/soft/seed=0", "{runs}/soft/seed=0"),
        ("relative/path", "relative/path"),
        ("/runs/study-2/a", "<path>/a"),
        ({"k": ["/x/y", 3, None]}, {"k": ["<path>/y", 3, None]}),
    ],
)
def test_absolute_paths_become_portable(given, expected) -> None:
    assert portable(given, {"/runs/study": "{runs}"}) == expected


def test_items_of_all_runs_are_packed(workshop) -> None:
    folder, _ = _built(workshop)
    items = read_study_items(folder / ITEMS_FILE)
    assert set(items.predictions) == {"requires/teacher", *(cell.key for cell in cells(read_study(folder)))}
    assert int(items.wrong("soft/seed=2").sum()) == 17


def test_without_items_the_interval_is_over_seeds_alone(workshop) -> None:
    _built(workshop)
    folder, verdict = _built(workshop, with_items=False)
    assert not (folder / ITEMS_FILE).exists()
    assert "seeds only" in verdict["comparison"]["test"] and verdict["verdict"] == "HOLDS"


def test_failed_preempted_and_absent_runs_are_counted_by_reason(workshop) -> None:
    study = workshop.study()
    workshop.fill(study, {"hard": 40, "soft": 15})
    workshop.run("soft/seed=1", 1, 15, status="failed", reason=f"non-finite loss, see {workshop.runs}/soft/seed=1/log")
    workshop.run("soft/seed=2", 2, 15, status="preempted", reason="SIGTERM")
    (workshop.runs / "soft/seed=3/run.json").unlink()
    (workshop.runs / "soft/seed=4/run.json").write_text("{")
    for path in (workshop.runs / "soft/seed=5").iterdir():
        path.unlink()
    (workshop.runs / "soft/seed=5").rmdir()
    found = collect(study, workshop.runs)
    assert len(found.completed) == 8
    assert found.missing["soft/seed=1"] == "failed: non-finite loss, see {runs}/soft/seed=1/log"
    assert found.count_by_reason() == {
        "failed": 1, "not run": 1, "preempted": 1, "stopped before its record was written": 1, "unreadable record": 1,
    }  # fmt: skip
    build_report(study.path.parent)
    verdict = json.loads((study.path.parent / "verdict.json").read_text())
    assert verdict["verdict"] == "INCONCLUSIVE" and "5 of the compared runs did not complete" in verdict["reason"]
    assert [entry["cell"] for entry in verdict["missing"]] == [f"soft/seed={seed}" for seed in range(1, 6)]
    assert verdict["arms"]["soft"]["n"] == 1 and verdict["arms"]["soft"]["sd"] is None
    readme = (study.path.parent / "README.md").read_text()
    assert "Missing runs (5)" in readme and "preempted: SIGTERM" in readme
    with (study.path.parent / "results.csv").open() as stream:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(stream)}
    assert len(rows) == 13 and rows["soft", "2"]["status"] == "preempted: SIGTERM"
    assert rows["soft", "2"]["test/errors"] == "" and rows["soft", "0"]["test/errors"] == "15"


def test_failed_runs_never_lend_their_numbers(workshop) -> None:
    """A failed run with a splendid metric changes nothing but the list of missing runs."""
    study = workshop.study()
    workshop.fill(study, {"hard": 40, "soft": 41})
    workshop.run("soft/seed=0", 0, 0, status="failed", reason="loss not finite")
    collect(study, workshop.runs)
    build_report(study.path.parent)
    verdict = json.loads((study.path.parent / "verdict.json").read_text())
    assert 0.0 not in verdict["arms"]["soft"]["values"] and verdict["comparison"]["estimate"] == -1.0


def test_p121_five_seeds_are_inconclusive_and_the_report_says_why(workshop, study_text: str) -> None:
    study = workshop.study(study_text.replace("[0, 1, 2, 3, 4, 5]", "[0, 1, 2, 3, 4]"))
    workshop.fill(study, {"hard": 40, "soft": 15})
    collect(study, workshop.runs)
    build_report(study.path.parent)
    verdict = json.loads((study.path.parent / "verdict.json").read_text())
    assert verdict["verdict"] == "INCONCLUSIVE" and verdict["comparison"]["smallest_p"] == 0.0625
    readme = (study.path.parent / "README.md").read_text()
    assert "p = 0.0625 (smallest possible 0.0625), 5 paired seeds" in readme and "at least 6" in readme


def test_a_claim_that_does_not_show_fails(workshop) -> None:
    _, verdict = _built(workshop, {"hard": 15, "soft": 60})
    assert verdict["verdict"] == "FAILS" and verdict["comparison"]["high"] < 0


def test_secondary_differences_are_judged_by_their_holm_p(workshop, study_text: str) -> None:
    """Six seeds won by each of two secondary contrasts: p = .031 each, .0625 as a family."""
    extra = "  other_way: {kind: difference, baseline: hard, treatment: soft, metric: test/nll}\n"
    again = "  once_more: {kind: difference, baseline: hard, treatment: soft}\n"
    study = workshop.study(study_text.replace("published:", f"{extra}{again}published:"))
    workshop.fill(study, {"hard": 40, "soft": 15})
    collect(study, workshop.runs)
    build_report(study.path.parent)
    verdict = json.loads((study.path.parent / "verdict.json").read_text())
    assert verdict["verdict"] == "HOLDS"
    for name in ("other_way", "once_more"):
        entry = verdict["secondary"][name]
        assert (entry["p_value"], entry["p_holm"]) == (0.03125, 0.0625)
        assert (entry["verdict"], entry["reason"]) == ("INCONCLUSIVE", "Holm p is not below .05")
    assert verdict["secondary"]["gap_closed"]["p_holm"] == pytest.approx(3 / 64)


@pytest.mark.parametrize(
    ("share", "holm", "verdict"),
    [(0.01, 0.02, "HOLDS"), (0.03, 0.06, "INCONCLUSIVE"), (0.5, 1.0, "INCONCLUSIVE"), (0.97, 1.0, "FAILS")],
)
def test_a_correction_takes_from_what_holds_and_adds_nothing_to_what_fails(
    share: float, holm: float, verdict: str
) -> None:
    """Of an order, p is the share of resamples that contradict it: half of them refute nothing, however corrected."""
    operands = (("arm", OperandSpec("soft")),)
    spec = ComparisonSpec("best_level", "test/errors", True, operands, factor="temperature", group="width")
    found = Comparison(3.0, 1.0, 5.0, share, "share of seed bootstraps", 5, None, "temperature", ())
    assert judge(spec, found, holm)[0] == verdict


def test_results_of_a_preset_stay_apart(workshop) -> None:
    folder, _ = _built(workshop)
    before = _contents(folder)
    study = read_study(folder)
    for cell in cells(study, "smoke"):
        workshop.run(cell.key, cell.seed, 9)
    collect(study, workshop.runs, preset="smoke")
    paths = build_report(folder, preset="smoke")
    assert {path.parent for path in paths.values()} == {folder / "smoke"} and _contents(folder) == before
    verdict = json.loads((folder / "smoke" / "verdict.json").read_text())
    assert verdict["command"].endswith("preset=smoke") and verdict["arms"]["soft"]["n"] == 1
    assert verdict["verdict"] == "INCONCLUSIVE" and verdict["comparison"]["low"] is None


def test_requirements_may_live_elsewhere(workshop) -> None:
    study = workshop.study()
    workshop.fill(study, {"hard": 40, "soft": 15})
    (workshop.runs / "requires/teacher").rename(workshop.root / "shared_teacher")
    assert "requires/teacher" in collect(study, workshop.runs).missing
    found = collect(study, workshop.runs, requirement_dirs={"teacher": workshop.root / "shared_teacher"})
    assert not found.missing
    build_report(study.path.parent)


def test_table_blanks_unmeasured_costs_p122(workshop) -> None:
    study = workshop.study()
    workshop.fill(study, {"hard": 40, "soft": 15})
    parts = ("student_update", "teacher_scoring", "rollout", "prompt_prefill", "teacher_training")
    ledger = {part: {"flops": 2e12, "tokens": 3.0, "seconds": 1.0} for part in parts}
    workshop.run("soft/seed=0", 0, 15, ledger={**ledger, "teacher_scoring": {"flops": None, "tokens": 3.0}})
    workshop.run("hard/seed=0", 0, 40, ledger={part: ledger[part] for part in parts[:4]})
    workshop.run("soft/seed=2", 2, 15, ledger={part: ledger[part] for part in parts if part != "prompt_prefill"})
    old = {part: ledger[part] for part in parts if part != "prompt_prefill"}
    workshop.run("hard/seed=2", 2, 40, ledger=old, schema=1)
    collect(study, workshop.runs)
    build_report(study.path.parent)
    with (study.path.parent / "results.csv").open() as stream:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(stream)}
    soft, hard, full = rows["soft", "0"], rows["hard", "0"], rows["soft", "1"]
    assert (soft["teacher_scoring_flops"], soft["run_flops"], soft["charged_flops"]) == ("", "", "")
    assert (soft["run_tokens"], soft["run_seconds"]) == ("12", "")
    assert (hard["run_flops"], hard["charged_flops"], full["charged_flops"]) == ("8e+12", "", "5e+12")
    without, early = rows["soft", "2"], rows["hard", "2"]
    assert (without["prompt_prefill_flops"], without["run_flops"], without["charged_flops"]) == ("", "", "")
    # before prompts had a part of their own they were counted in the rollout
    assert (early["prompt_prefill_flops"], early["run_flops"], early["charged_flops"]) == ("", "6e+12", "8e+12")
    lines = (study.path.parent / "README.md").read_text().splitlines()
    cells_of = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines if line[:2] == "| "
    }
    assert cells_of["soft"][7:9] == ["", ""] and cells_of["hard"][7] != "" and cells_of["hard"][8] == ""


def test_csv_columns_keep_their_order(workshop) -> None:
    folder, _ = _built(workshop)
    header = (folder / "results.csv").read_text().splitlines()[0].split(",")
    assert header[:6] == ["role", "arm", "seed", "status", "test/errors", "test/nll"]
    assert header[6:9] == ["student_update_flops", "student_update_tokens", "student_update_seconds"]
    assert header[-1] == "seconds" and len(header) == len(set(header)) == 6 + 15 + 6 + 1


def test_a_study_of_old_records_has_the_columns_it_had(workshop) -> None:
    study = workshop.study()
    workshop.fill(study, {"hard": 40, "soft": 15})
    parts = ("student_update", "teacher_scoring", "rollout", "teacher_training")
    ledger = {part: {"flops": 2e12, "tokens": 3.0, "seconds": 1.0} for part in parts}
    for cell in cells(study):
        workshop.run(cell.key, cell.seed, 20, ledger=ledger, schema=1)
    workshop.run("requires/teacher", 0, 4, ledger=ledger, schema=1)
    collect(study, workshop.runs)
    build_report(study.path.parent)
    header = (study.path.parent / "results.csv").read_text().splitlines()[0].split(",")
    assert len(header) == 6 + 12 + 6 + 1 and not [name for name in header if "prefill" in name]


def test_readme_keeps_what_people_wrote(workshop) -> None:
    study = workshop.study()
    readme = study.path.parent / "README.md"
    readme.write_text(f"# My words\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    _built(workshop)
    text = readme.read_text()
    assert text.startswith("# My words\n") and text.endswith(f"{END}\n\nafter\n") and "old" not in text
    assert "**HOLDS** (C04): errors of soft 25 below hard" in text and "| hard | 6 | 41 |" in text


@pytest.mark.parametrize("text", [f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}"])
def test_broken_markers_are_refused(text: str) -> None:
    with pytest.raises(StudyError, match=r"README\.md: expected one"):
        with_results(text, "block", Path("README.md"))


def test_a_readme_without_markers_gets_them_at_its_end() -> None:
    assert with_results("# Title\n", "block", Path("README.md")) == f"# Title\n\n{BEGIN}\nblock\n{END}\n"


def test_committed_records_are_checked(workshop) -> None:
    study = workshop.study()
    with pytest.raises(StudyError, match=r"records\.jsonl: no such file; run the study first"):
        build_report(study.path.parent)
    workshop.fill(study, {"hard": 40, "soft": 15})
    collect(study, workshop.runs)
    path = study.path.parent / RECORDS_FILE
    lines = path.read_text().splitlines(keepends=True)
    for broken, message in (
        ([*lines[:3], "{\n", *lines[4:]], "line 4 is not a run's record"),
        ([*lines, lines[2]], "line 14 is 'hard/seed=1', which study.yaml does not declare or which stands there twice"),
        ([lines[0].replace("requires/teacher", "requires/pupil"), *lines[1:]], "line 1 is 'requires/pupil'"),
        (['{"cell": {"key": "hard/seed=0"}, "record": {}}\n'], "line 1"),
    ):
        path.write_text("".join(broken))
        with pytest.raises(StudyError, match=message):
            read_committed(study)


def test_a_run_with_another_seed_is_refused(workshop) -> None:
    study = workshop.study()
    workshop.fill(study, {"hard": 40, "soft": 15})
    workshop.run("soft/seed=1", 9, 15)
    with pytest.raises(StudyError, match="seed 9; the cell soft/seed=1 is seed 1"):
        collect(study, workshop.runs)


def test_revision_names_every_state_the_runs_were_made_at() -> None:
    revisions = ({"commit": "b", "dirty": True}, {"commit": "a", "dirty": False}, {"commit": None, "dirty": None}, None)
    assert revision_of({"revision": revision} for revision in revisions) == "a, b+dirty, unknown"


def test_study_dataclasses_cannot_be_changed(workshop) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        workshop.study().claim = "C05"


@pytest.mark.parametrize("name", ["figure.svg", "results.csv", "verdict.json"])
def test_a_result_that_was_changed_or_lost_is_made_again(workshop, name: str) -> None:
    folder, _ = _built(workshop)
    before = _contents(folder)
    (folder / name).write_text("changed by hand")
    build_report(folder)
    assert _contents(folder) == before
    (folder / name).unlink()
    build_report(folder)
    assert _contents(folder) == before


def test_a_report_of_the_same_files_is_not_made_again_and_of_other_records_is(workshop) -> None:
    folder, verdict = _built(workshop)
    (folder / "items.parquet").chmod(0o644)
    stamp = (folder / "report.sha256").read_text()
    build_report(folder)
    assert (folder / "report.sha256").read_text() == stamp
    records = folder / "records.jsonl"
    records.write_text(
        "".join(line for line in records.read_text().splitlines(keepends=True) if '"soft/seed=5"' not in line)
    )
    build_report(folder)
    assert (folder / "report.sha256").read_text() != stamp
    after = json.loads((folder / "verdict.json").read_text())
    assert after["arms"]["soft"]["n"] == verdict["arms"]["soft"]["n"] - 1


def test_an_arm_that_was_not_measured_so_is_blank_and_one_that_was_in_part_is_refused(workshop, study_text) -> None:
    """As an arm that others go on from, or one whose variant has another name; a typing error is still told."""
    study = workshop.study(study_text.replace("\narms:\n", "\narms:\n  begun: []\n"))
    workshop.fill(study, {"hard": 40, "soft": 15, "begun": 30})
    for cell in (cell for cell in cells(study) if cell.arm == "begun"):
        _without_metric(workshop.runs / cell.key)
    collect(study, workshop.runs)
    build_report(study.path.parent)
    line = next(text for text in (study.path.parent / "README.md").read_text().splitlines() if "| begun |" in text)
    assert line.split("|")[2:6] == [" 6 ", "  ", "  ", "  "]

    first = next(cell for cell in cells(study) if cell.arm == "soft")
    _without_metric(workshop.runs / first.key)
    collect(study, workshop.runs)
    with pytest.raises(StudyError, match=f"{first.key}: its record has no metric"):
        build_report(study.path.parent)


def _without_metric(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    del record["metrics"]["test/errors"]
    (folder / "run.json").write_text(json.dumps(record))


# -- a comparison that counts only where another one holds ------------------------------------------------------------


@pytest.mark.parametrize(("least", "verdict"), [(5.0, "HOLDS"), (40.0, "INCONCLUSIVE")])
def test_a_comparison_counts_only_where_its_condition_holds(
    least: float, verdict: str, workshop, study_text: str
) -> None:
    """Soft gains about 30 errors over hard: a condition of 5 holds, one of 40 does not."""
    condition = f"learns: {{kind: difference, baseline: hard, treatment: soft, threshold: {least}}}"
    text = study_text.replace("treatment: soft}", "treatment: soft, only_if: learns}", 1)
    text = text.replace("secondary:", f"secondary:\n  {condition}")
    study = workshop.study(text)
    workshop.fill(study, {"hard": 60, "soft": 30})
    collect(study, workshop.runs)
    build_report(study.path.parent)
    told = json.loads((study.path.parent / "verdict.json").read_text())
    assert told["verdict"] == verdict and told["comparison"]["estimate"] == pytest.approx(30.0)
    readme = (study.path.parent / "README.md").read_text()
    assert ("it counts only where learns holds, and that does not." in readme) == (verdict == "INCONCLUSIVE")


def test_a_condition_is_judged_by_itself_and_the_report_says_so(workshop, study_text: str) -> None:
    """Among many comparisons Holm's correction keeps it from a verdict of its own; as a condition it still holds."""
    same = "{kind: difference, baseline: hard, treatment: soft, threshold: 5.0}"
    text = study_text.replace("treatment: soft}", "treatment: soft, only_if: learns}", 1)
    text = text.replace("secondary:", f"secondary:\n  learns: {same}" + "".join(f"\n  m{n}: {same}" for n in range(9)))
    study = workshop.study(text)
    workshop.fill(study, {"hard": 60, "soft": 30})
    collect(study, workshop.runs)
    build_report(study.path.parent)
    told = json.loads((study.path.parent / "verdict.json").read_text())
    assert (told["verdict"], told["secondary"]["learns"]["verdict"]) == ("HOLDS", "INCONCLUSIVE")
    lines = (study.path.parent / "README.md").read_text().splitlines()
    by_itself = [line.split(":")[0] for line in lines if "judged by itself, and holds." in line]
    assert by_itself == ["* learns"]


def test_a_condition_must_be_another_secondary_comparison(workshop, study_text: str) -> None:
    text = study_text.replace("treatment: soft}", "treatment: soft, only_if: gap_close}", 1)
    with pytest.raises(StudyError, match=r"comparison.only_if is 'gap_close'; .*gap_closed"):
        workshop.study(text)
    text = study_text.replace("best: teacher}", "best: teacher, only_if: gap_closed}", 1)
    with pytest.raises(StudyError, match=r"secondary.gap_closed.only_if is 'gap_closed'"):
        workshop.study(text)


# -- a requirement scored on other items ------------------------------------------------------------------------------


def test_a_requirement_on_other_items_counts_where_it_is_compared_and_nowhere_else(
    workshop, study_text: str, caplog: pytest.LogCaptureFixture
) -> None:
    compared = workshop.study(study_text)
    workshop.fill(compared, {"hard": 60, "soft": 30})
    workshop.num_items = 200
    workshop.run("requires/teacher", 0, 4)
    with pytest.raises((StudyError, ValueError), match="same items"):
        collect(compared, workshop.runs)
    alone = workshop.study(study_text[: study_text.index("secondary:")] + study_text[study_text.index("published:") :])
    collect(alone, workshop.runs)
    items = read_study_items(alone.path.parent / ITEMS_FILE)
    assert "requires/teacher" not in items.predictions and len(items.index_I) == 300
    assert [line.message for line in caplog.records if "requires/teacher was scored on other items" in line.message]
    build_report(alone.path.parent)
    assert json.loads((alone.path.parent / "verdict.json").read_text())["verdict"] == "HOLDS"
