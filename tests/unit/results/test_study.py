"""study.yaml: what it means, and that every mistake in it is named with its file, its key and what is valid."""

from pathlib import Path

import pytest

from research.results.fields import StudyError
from research.results.study import cells, fill_placeholders, requirements, stages
from research.results.study_file import STUDY_KEYS, read_study

FACTORS_TEXT = """
study: grid
claim: C07
question: Which temperature?
base: [experiment=mnist]
arms:
  hard: {overrides: [method=supervised], factors: [width], seeds: [0], note: no teacher}
  soft: [method=soft_target]
factors:
  width: {30: [student.width=30], 300: [student.width=300]}
  temperature: {1: [method.temperature=1], 2.5: [method.temperature=2.5], 8: [method.temperature=8]}
seeds: [0, 1]
metric: test/errors
lower_is_better: true
comparison: {kind: best_level, arm: soft, factor: temperature, group: width, low_group: 30, high_group: 300}
presets:
  smoke: {base: [trainer=smoke], seeds: [5], arms: [soft], levels: {temperature: [2.5]}}
"""


def test_study_keys_are_frozen() -> None:
    assert STUDY_KEYS == (
        "study", "claim", "question", "base", "requires", "arms", "factors", "seeds", "metric", "lower_is_better",
        "comparison", "secondary", "published", "budget", "presets", "curves", "command",
    )  # fmt: skip


def test_cells_of_a_plain_study(workshop) -> None:
    study = workshop.study()
    found = cells(study)
    assert [cell.key for cell in found] == [f"{arm}/seed={seed}" for arm in ("hard", "soft") for seed in range(6)]
    assert found[0].overrides == ("experiment=digits", "method=supervised", "seed={seed}")
    assert found[8].filled({"teacher": Path("runs/t")}) == [
        "experiment=digits", "method=soft_target", "teacher=runs/t", "seed=2",
    ]  # fmt: skip
    assert [(r.name, r.command, r.overrides) for r in requirements(study)] == [
        ("teacher", "train", ("experiment=digits_teacher",))
    ]


def test_cells_are_the_full_cross_product_of_arms_and_their_factors(workshop) -> None:
    study = workshop.study(FACTORS_TEXT, "grid")
    found = cells(study)
    assert len(found) == 2 * 1 + 2 * 3 * 2
    assert found[0].key == "hard/width=30/seed=0" and found[0].factors == {"width": "30"}
    assert found[2].key == "soft/temperature=1,width=30/seed=0"
    assert found[2].overrides == (
        "experiment=mnist", "method=soft_target", "student.width=30", "method.temperature=1", "seed={seed}",
    )  # fmt: skip
    assert len({cell.key for cell in found}) == len(found)
    assert {cell.factors.get("temperature") for cell in found} == {None, "1", "2.5", "8"}


def test_presets_change_seeds_arms_levels_and_overrides(workshop) -> None:
    smoke = cells(workshop.study(FACTORS_TEXT, "grid"), "smoke")
    assert [cell.key for cell in smoke] == [f"soft/temperature=2.5,width={width}/seed=5" for width in (30, 300)]
    assert "trainer=smoke" in smoke[0].overrides
    with pytest.raises(StudyError, match=r"no preset 'smok'; did you mean 'smoke'"):
        cells(workshop.study(FACTORS_TEXT, "grid"), "smok")


def test_placeholders_leave_other_braces_alone() -> None:
    given = ["a={seed}", "b={x: 1}", "c=${data.root}/{seed}", "d=[{requires.t-1}]"]
    assert fill_placeholders(given, {"seed": "4", "requires.t-1": "runs/t"}) == [
        "a=4", "b={x: 1}", "c=${data.root}/4", "d=[runs/t]",
    ]  # fmt: skip
    with pytest.raises(StudyError, match=r"'a=\{sed\}'.*\{sed\}; did you mean 'seed'"):
        fill_placeholders(["a={sed}"], {"seed": "4"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1, 2, 3, 4, 5]", "seds: [0, 1]", r"unknown key 'seds'; did you mean 'seeds'"),
        ("seeds: [0, 1, 2, 3, 4, 5]", "seeds: []", r"seeds is \[\]; expected a non-empty list of distinct integers"),
        ("seeds: [0, 1, 2, 3, 4, 5]", "seeds: [1, 1]", r"seeds is \[1, 1\]"),
        ("seeds: [0, 1, 2, 3, 4, 5]", "seeds: [0, true]", r"seeds is \[0, True\]"),
        ("seeds: [0, 1, 2, 3, 4, 5]", "", r"seeds is missing"),
        ("claim: C04", "", r"claim is missing; expected a non-empty text"),
        ("study: digits", "study: digit", r"study is 'digit'; expected the folder's name, 'digits'"),
        ("metric: test/errors", "metric: errors", r"metric is 'errors'; expected split/name"),
        (
            "lower_is_better: true",
            "lower_is_better: yes please",
            r"lower_is_better is 'yes please'; expected true or false",
        ),
        ("kind: difference", "kind: diference", r"comparison.kind is 'diference'.*did you mean 'difference'"),
        ("baseline: hard", "baseline: hrad", r"comparison.baseline names 'hrad'.*did you mean 'hard'"),
        ("baseline: hard, treatment: soft}", "baseline: hard}", r"comparison.treatment is missing"),
        ("baseline: hard, treat", "margin: 3, baseline: hard, treat", r"unknown key 'comparison.margin'"),
        ("best: teacher}", "best: {arm: hard, requires: teacher}}", r"secondary.gap_closed.best .*exactly one of"),
        ("best: teacher}", "best: {}}", r"secondary.gap_closed.best"),
        ("best: teacher}", "best: true}", r"secondary.gap_closed.best is True"),
        ("best: teacher}", "best: teacher, threshold: .nan}", r"threshold is nan; expected a finite number"),
        ("best: teacher}", "best: teacher, where: {width: 3}}", r"unknown key 'secondary.gap_closed.where.width'"),
        ("command: train", "command: trian", r"requires.teacher.command is 'trian'.*did you mean 'train'"),
        ("[method=supervised]", "method=supervised", r"arms.hard is 'method=supervised'; expected a mapping"),
        (
            "[method=supervised]",
            "[method=supervised, 3]",
            r"arms.hard is \['method=supervised', 3\]; expected a list of texts",
        ),
        ("[method=supervised]", "{override: [a=1]}", r"unknown key 'arms.hard.override'; did you mean 'overrides'"),
        ("[method=supervised]", "{overrides: [a=1], factors: [width]}", r"arms.hard.factors"),
        ("  hard: [", "  on: [", r"arms.True: the name True cannot be used.*quote words"),
        ("  hard: [", "  a/b: [", r"the name 'a/b' cannot be used"),
        ("  soft: [", "  teacher: [", r"'teacher'"),
        (
            "{requires.teacher}",
            "{requires.techer}",
            r"unknown placeholder \{requires.techer\}; did you mean 'requires.teacher'",
        ),
        ("[experiment=digits_teacher]", '["seed={seed}"]', r"unknown placeholder \{seed\}"),
        ("  soft: [", "  hard: [", r"not a readable YAML file: .*'hard' is given twice"),
        ("seeds: [0", "seeds: [0]]", r"not a readable YAML file"),
        ("smoke: {base", "smoke: {bases", r"unknown key 'presets.smoke.bases'; did you mean 'base'"),
        ("seeds: [7]", "arms: [sof]", r"presets.smoke.arms .*did you mean 'soft'"),
        ("seeds: [7]", "levels: {width: [1]}", r"unknown key 'presets.smoke.levels.width'"),
        ("budget: {minutes: 1}", "budget: 3", r"budget is 3; expected a mapping"),
    ],
)
def test_a_broken_study_file_is_refused_by_name(workshop, study_text: str, old: str, new: str, message: str) -> None:
    assert old in study_text
    with pytest.raises(StudyError, match=message) as caught:
        workshop.study(study_text.replace(old, new, 1))
    assert "study.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("low_group: 30", "low_group: 40", r"comparison.low_group is 40; .*valid: 30, 300"),
        ("group: width, low", "group: temperature, low", r"comparison"),
        ("factor: temperature, group", "factor: temprature, group", r"did you mean 'temperature'"),
        ("temperature: {1: [method.temperature=1]", "temperature: {true: [a=1]", r"no level label"),
        ("[method.temperature=8]", "8", r"factors.temperature.8 is 8; expected a list of texts"),
        ("temperature: [2.5]", "temperature: [2]", r"presets.smoke.levels.temperature .*valid: 1, 2.5, 8"),
        ("kind: best_level, arm: soft, factor: temperature, group: width, low_group: 30, high_group: 300",
         "kind: difference, baseline: hard, treatment: soft, where: {width: 31}", r"comparison.where.width is 31"),
        ("kind: best_level, arm: soft, factor: temperature, group: width, low_group: 30, high_group: 300",
         "kind: equivalence, baseline: hard, treatment: soft, margin: 0", r"margin is 0; expected a margin above 0"),
        ("kind: best_level, arm: soft, factor: temperature, group: width, low_group: 30, high_group: 300",
         "kind: trend, arm: soft, factor: width, expected: up", r"expected is 'up'"),
    ],
)  # fmt: skip
def test_broken_factors_and_levels_are_refused_by_name(workshop, old: str, new: str, message: str) -> None:
    assert old in FACTORS_TEXT
    with pytest.raises(StudyError, match=message) as caught:
        workshop.study(FACTORS_TEXT.replace(old, new, 1), "grid")
    assert "study.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("baseline: hard, low_group: 30, high_group: 31", r"comparison.high_group is 31"),
        ("baseline: hard, low_group: 30, high_group: 30", r"high_group is 30; .*'width' other than low_group"),
        ("baseline: 3, low_group: 30, high_group: 300", r"baseline is 3; .*an arm whose 'width' is left open"),
        ("baseline: hard, low_group: 30, high_group: 300, where: {width: 30}", r"an arm whose 'width' is left open"),
        ("baseline: hard, low_group: 30", r"comparison.high_group is "),
    ],
)
def test_interactions_that_compare_nothing_are_refused(workshop, given: str, message: str) -> None:
    declared = FACTORS_TEXT.partition("comparison: ")[2].partition("\n")[0]
    asked = f"{{kind: interaction, treatment: soft, group: width, {given}}}"
    with pytest.raises(StudyError, match=message):
        workshop.study(FACTORS_TEXT.replace(declared, asked), "grid")


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"study\.yaml: no such file"):
        read_study(tmp_path)
    (tmp_path / "study.yaml").write_text("- a\n")
    with pytest.raises(StudyError, match="expected a mapping"):
        read_study(tmp_path)


CHAIN = """
study: chain
claim: C31
question: Does it pay to go on?
arms:
  start: [experiment=a]
  longer: ["init_from='{arms.start}'"]
  longest: ["init_from='{arms.longer}'", "teacher.path='{arms.start}'"]
  apart: [experiment=b]
seeds: [0, 3]
metric: test/errors
lower_is_better: true
comparison: {kind: difference, baseline: start, treatment: longest}
"""


def test_an_arm_goes_on_from_another_arm_s_run_of_the_same_seed(workshop) -> None:
    found = cells(workshop.study(CHAIN, "chain"))
    last = next(cell for cell in found if cell.arm == "longest" and cell.seed == 3)
    assert last.needs == {"start", "longer"}
    assert last.filled({}, "/runs") == [
        "init_from='/runs/longer/seed=3'", "teacher.path='/runs/start/seed=3'", "seed=3",
    ]  # fmt: skip


def test_stages_run_what_is_gone_on_from_first(workshop) -> None:
    found = stages(cells(workshop.study(CHAIN, "chain")))
    assert [[cell.key for cell in stage] for stage in found] == [
        ["start/seed=0", "start/seed=3", "apart/seed=0", "apart/seed=3"],
        ["longer/seed=0", "longer/seed=3"],
        ["longest/seed=0", "longest/seed=3"],
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{arms.start}'\"]\n  longest", "{arms.strat}'\"]\n  longest", "names no arm; did you mean 'start'"),
        ("start: [experiment=a]", "start: [\"init_from='{arms.apart}'\"]", "apart is declared later"),
        (
            "apart: [experiment=b]",
            "apart: {overrides: [\"init_from='{arms.start}'\"], seeds: [7]}",
            "no run with seed 7",
        ),
    ],
)
def test_an_arm_that_cannot_be_gone_on_from_is_refused(workshop, old: str, new: str, told: str) -> None:
    assert old in CHAIN
    with pytest.raises(StudyError, match=told):
        workshop.study(CHAIN.replace(old, new), "chain")
