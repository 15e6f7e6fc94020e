"""`make demo`: the studies that it runs are made again on every machine, so no result of theirs is committed."""

import re
from pathlib import Path

from research.results.overview import NOT_COMMITTED, overview_table
from research.results.study_file import read_study

REPOSITORY = Path(__file__).parents[2]
RECIPE = (REPOSITORY / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
STUDIES = re.findall(r"experiments/(\w+)", RECIPE)


def test_every_study_of_the_demo_is_left_out_of_the_table_of_verdicts(tmp_path: Path) -> None:
    """A reader who ran the demo and reports on a study finds the README as it was."""
    assert STUDIES == ["demo", "demo_traces", "demo_methods"] and set(STUDIES) == set(NOT_COMMITTED)
    for name in STUDIES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "verdict.json").write_text("{}")
    assert overview_table(tmp_path).count("\n") == 1, "a head and no row"


def test_what_the_demo_writes_is_ignored_and_its_studies_are_not() -> None:
    lines = (REPOSITORY / ".gitignore").read_text().splitlines()
    for name in STUDIES:
        everything, study = f"experiments/{name}/*", f"!experiments/{name}/study.yaml"
        assert lines.index(everything) < lines.index(study), name


def test_the_demo_ends_with_every_method_in_one_table_and_one_figure() -> None:
    study = read_study(REPOSITORY / "experiments" / STUDIES[-1])
    assert list(study.arms) == ["base", "hard_labels", "sft_trace", "soft_target", "on_policy", "grpo"]
    assert [spec.against for spec in study.curves] == ["flops"]
    limits = [
        o for name, arm in study.arms.items() for o in arm.overrides if o.startswith("budget.") and name != "base"
    ]
    assert limits == [] and any(o.startswith("budget.flops=") for o in study.base), (
        "one budget for all that go on from the base"
    )
