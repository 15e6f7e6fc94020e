"""Which cells are finished, which are another study's, and what order requirements run in."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from research.errors import ConfigError
from research.results.record import RunRecord, write_record
from research.results.study import Requirement, requirements
from research.sweeps.study_runner import (
    QUIET,
    QUIET_TRAIN,
    Job,
    StudyRunner,
    _set_aside_other_run,
    changed_values,
    quoted,
)


def job(folder: Path, *overrides: str, command: str = "train") -> Job:
    return Job("cell", command, overrides, folder)


def record_of(folder: Path, overrides: list[str], status: str = "completed") -> None:
    reason = None if status == "completed" else "because"
    record = RunRecord("distill train", "x", status, 0, {}, {}, "now", 1.0, reason=reason, overrides=overrides)
    write_record(folder / "run.json", record)


def test_the_overrides_that_running_studies_were_started_with() -> None:
    """Finished cells are recognised by their overrides: changing these makes every study run again."""
    assert QUIET == ("hydra/hydra_logging=disabled", "hydra/job_logging=quiet")
    assert QUIET_TRAIN == (
        "trainer.enable_progress_bar=false",
        "logger=none",
        "keep_checkpoints=false",
        "ckpt_path=last",
    )


def test_a_cell_is_finished_with_a_completed_record_of_its_own_overrides(tmp_path: Path) -> None:
    assert not job(tmp_path, "a=1").is_finished()
    record_of(tmp_path, ["a=1", "b=2"])
    assert job(tmp_path, "a=1", "b=2").is_finished()


@pytest.mark.parametrize(
    "changed",
    [("a=1", "b=3"), ("a=1", "b=2", "c=3"), ("a=1",), ("b=2", "a=1"), ()],
    ids=["another value", "one more", "one less", "another order", "none"],
)
def test_a_changed_arm_is_not_finished(tmp_path: Path, changed: tuple[str, ...]) -> None:
    """An arm that lost an override is another arm; so is one whose overrides win in another order."""
    record_of(tmp_path, ["a=1", "b=2"])
    assert not job(tmp_path, *changed).is_finished()


@pytest.mark.parametrize("status", ["failed", "preempted"])
def test_a_run_that_did_not_complete_is_not_finished(tmp_path: Path, status: str) -> None:
    record_of(tmp_path, ["a=1"], status)
    assert not job(tmp_path, "a=1").is_finished()


def test_a_finished_run_of_another_definition_is_kept_aside(tmp_path: Path) -> None:
    for number, old in enumerate(("a=1", "a=2")):
        record_of(tmp_path / "seed=0", [old])
        _set_aside_other_run(job(tmp_path / "seed=0", "a=3"))
        assert not (tmp_path / "seed=0").exists()
        kept = json.loads((tmp_path / f"seed=0.other-{number}" / "run.json").read_text())
        assert kept["overrides"] == [old]


def test_a_killed_run_of_another_definition_is_not_gone_on_from(tmp_path: Path) -> None:
    """It has no record yet, but a checkpoint, and `ckpt_path=last` would take it up under the new overrides."""
    folder = tmp_path / "seed=0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"old")
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(["a=1"]), folder / ".hydra" / "overrides.yaml")
    _set_aside_other_run(job(folder, "a=1"))
    assert (folder / "checkpoints" / "last.ckpt").exists(), "the same overrides: go on from it"
    _set_aside_other_run(job(folder, "a=2"))
    assert not folder.exists()
    assert (tmp_path / "seed=0.other-0" / "checkpoints" / "last.ckpt").exists()


def test_a_cache_is_finished_when_its_manifest_says_so(tmp_path: Path) -> None:
    assert not job(tmp_path, command="cache").is_finished()


STUDY = """
study: tiny
claim: C04
question: Does it run?
base: [threads=1]
requires:
  one: {command: train, overrides: [seed=1]}
  two: {command: train, overrides: [seed=2]}
  store: {command: cache, overrides: ["teacher.path='{requires.one}'"]}
  late: {command: train, overrides: ["teacher.path='{requires.store}'"]}
arms:
  a: []
  b: [optimizer.lr=0.1]
seeds: [0, 1]
metric: test/errors
lower_is_better: true
comparison: {kind: difference, baseline: a, treatment: b}
"""


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., StudyRunner]:
    def made(text: str = STUDY, **options: Any) -> StudyRunner:
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / "study.yaml").write_text(text)
        return StudyRunner(tmp_path / "tiny", runs_dir=tmp_path / "runs", shared_dir=tmp_path / "shared", **options)

    return made


def test_requirements_run_in_order_and_together_where_they_can(runner: Callable[..., StudyRunner]) -> None:
    made, batches = runner(), []
    waiting = requirements(made.study)
    while waiting:
        batch, waiting = made._ready(waiting)
        batches.append([item.name for item in batch])
    assert batches == [["one", "two"], ["store"], ["late"]]


def test_a_requirement_that_needs_itself_is_refused(runner: Callable[..., StudyRunner]) -> None:
    circle = Requirement("one", "train", ("ckpt_path='{requires.one}'",))
    with pytest.raises(ConfigError, match=r"requires\.one needs itself or a later one"):
        runner()._ready([circle])


def test_equal_requirements_share_a_folder_and_unequal_ones_do_not(runner: Callable[..., StudyRunner]) -> None:
    made = runner()
    same, other = Requirement("t", "train", ("seed=1",)), Requirement("t", "train", ("seed=2",))
    assert made._requirement_job(same).folder == runner()._requirement_job(same).folder
    assert made._requirement_job(same).folder != made._requirement_job(other).folder
    assert made._requirement_job(same).folder.parent == made.shared_dir


def test_extra_overrides_go_to_every_train_run(runner: Callable[..., StudyRunner]) -> None:
    made = runner(extra=["trainer=smoke"])
    one, _, store, _ = (made._requirement_job(item).overrides for item in requirements(made.study))
    assert "trainer=smoke" in one and "trainer=smoke" not in store, "a cache has no trainer"


def test_a_requirement_of_an_unknown_kind_is_refused(runner: Callable[..., StudyRunner]) -> None:
    with pytest.raises(ConfigError, match=r"scored is a run of 'evaluate'; expected one of train, cache"):
        runner()._requirement_job(Requirement("scored", "evaluate", ()))


@pytest.mark.parametrize("text", ["/a/b", "/a b/c=d", "/it's/here", r"back\slash", r"a\'b", "end\\", "a,b{c}", "${x}"])
def test_quoted_texts_come_back_as_they_were(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


def test_values_that_a_file_changed_are_named() -> None:
    recorded = {"trainer": {"max_epochs": 5, "precision": "bf16-mixed"}, "seed": 0, "gone": 1}
    composed = {"trainer": {"max_epochs": 12, "precision": "bf16-mixed"}, "seed": 0, "new": 2}
    assert changed_values(recorded, composed) == ["trainer.max_epochs"]
    assert changed_values(recorded, recorded) == []
    assert changed_values({"bound": "inf", "pair": [1.0, "inf"]}, {"bound": math.inf, "pair": [1.0, math.inf]}) == []
    assert changed_values({"bound": "inf"}, {"bound": 2.0}) == ["bound"]
    assert changed_values({"dir": "outputs/a"}, {"dir": "${paths.output_dir}/a"}) == []
