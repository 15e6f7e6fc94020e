"""The lines of a run's ledger against numbers by hand: nothing is counted twice, nothing unknown becomes 0."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from research.generation.cost import GenerationCost
from research.loops.ledger import ledger_of, nothing, summed, with_traces
from research.methods.base import Training
from research.methods.soft_target import SoftTarget
from research.models.build import build_network
from research.results.record import LEDGER_FIELDS, LEDGER_PARTS, RunRecord, write_record
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
MLP: dict[str, Any] = {"_target_": "research.models.classifiers.Mlp", "hidden": [12]}


@pytest.fixture
def method() -> SoftTarget:
    """After a run of 100 seconds: 5 in the teacher, 30 in rollouts (8 of them over prompts), 15 in validations."""
    teacher = FrozenTeacher(LoadedNetwork(build_network(MLP, **FACTS), (64,), 10, "network", 700.0, 70.0))
    training = Training(build_network(MLP, **FACTS), partial(torch.optim.SGD, lr=0.1), None, {})
    made = SoftTarget(training, teacher, temperature=2.0)
    made.rows_seen, made.tokens_seen, made.update_flops = 4, 40, 1000.0
    made.teacher_rows, made.teacher_tokens, made.teacher_flops, made.teacher_seconds = 3, 33, 300.0, 5.0
    made.validation_seconds = 15.0
    made.rollout_cost = GenerationCost(12, 20, 90.0, 30.0, 0, 40.0, 8.0)
    return made


def test_every_part_in_flops_tokens_and_seconds(method: SoftTarget) -> None:
    ledger = ledger_of(method, 100.0, is_text=True)
    assert ledger == {
        "student_update": {"flops": 1000.0, "tokens": 40.0, "seconds": 50.0},
        "prompt_prefill": {"flops": 40.0, "tokens": 12.0, "seconds": 8.0},
        "rollout": {"flops": 50.0, "tokens": 20.0, "seconds": 22.0},
        "teacher_scoring": {"flops": 300.0, "tokens": 33.0, "seconds": 5.0},
        "teacher_training": {"flops": 700.0, "tokens": 70.0, "seconds": None},
    }
    assert set(ledger) == set(LEDGER_PARTS)
    assert ledger_of(method, 100.0, is_text=False)["teacher_scoring"]["tokens"] == 3.0


def test_the_parts_are_what_a_budget_counts(method: SoftTarget) -> None:
    ledger, spent = ledger_of(method, 100.0, is_text=True), method.spent()
    of_run = ("student_update", "prompt_prefill", "rollout", "teacher_scoring")
    assert sum(ledger[part]["flops"] or 0 for part in of_run) == spent.flops
    assert sum(ledger[part]["tokens"] or 0 for part in of_run) == spent.tokens


def test_p122_what_is_not_known_is_none(method: SoftTarget) -> None:
    method.rollout_cost = GenerationCost(12, 20, None, 30.0, 0, None, None)
    method.teacher_flops = float("nan")
    ledger = ledger_of(method, 100.0, is_text=True)
    assert ledger["rollout"] == {"flops": None, "tokens": 20.0, "seconds": None}
    assert ledger["prompt_prefill"] == {"flops": None, "tokens": 12.0, "seconds": None}
    assert ledger["teacher_scoring"]["flops"] is None


def test_a_sum_knows_what_all_its_terms_know(method: SoftTarget) -> None:
    one = ledger_of(method, 100.0, is_text=True)
    without = {part: line for part, line in one.items() if part != "prompt_prefill"}
    both = summed([one, one])
    assert both["student_update"] == {"flops": 2000.0, "tokens": 80.0, "seconds": 100.0}
    assert both["teacher_training"] == {"flops": 1400.0, "tokens": 140.0, "seconds": None}
    assert summed([one, without])["prompt_prefill"] == dict.fromkeys(nothing())
    assert summed([]) == {part: nothing() for part in LEDGER_PARTS}


def _store(folder: Path, weights: str | None, writing: float, training: float | None) -> Path:
    folder.mkdir()
    line = dict.fromkeys(LEDGER_FIELDS, 0.0)
    ledger = {part: dict(line) for part in LEDGER_PARTS}
    ledger["teacher_scoring"] = {"flops": writing, "tokens": 7.0, "seconds": 2.0}
    ledger["teacher_training"] = dict.fromkeys(LEDGER_FIELDS, training)
    teacher = None if weights is None else {"kind": "local", "weights_sha256": weights}
    made = RunRecord(
        command="distill traces", experiment="x", status="completed", seed=0, config={}, metrics={},
        started_at="2026-01-01T00:00:00Z", wall_s=1.0, ledger=ledger, teacher=teacher,
    )  # fmt: skip
    write_record(folder / "run.json", made)
    return folder


def test_stored_traces_cost_their_writing_and_each_of_their_teachers_once(method: SoftTarget, tmp_path: Path) -> None:
    ledger, live = ledger_of(method, 100.0, is_text=True), method.teacher.identity
    first, again = _store(tmp_path / "1", "abc", 11.0, 500.0), _store(tmp_path / "2", "abc", 13.0, 500.0)
    mine, gold = _store(tmp_path / "3", live.sha256, 17.0, 700.0), _store(tmp_path / "4", None, 0.0, 0.0)
    charged = with_traces(ledger, [first, again, mine, gold, first], [live.sha256])
    assert charged["teacher_training"]["flops"] == 700 + (11 + 500) + 13 + 17, "the live teacher is trained once"
    assert {part: line for part, line in charged.items() if part != "teacher_training"} == {
        part: line for part, line in ledger.items() if part != "teacher_training"
    }
    alone = with_traces({part: nothing() for part in LEDGER_PARTS}, [first])
    assert alone["teacher_training"] == {"flops": 511.0, "tokens": 507.0, "seconds": 502.0}


def test_what_a_store_without_a_record_had_cost_is_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = {part: nothing() for part in LEDGER_PARTS}
    assert with_traces(free, [tmp_path])["teacher_training"] == dict.fromkeys(LEDGER_FIELDS)
    (tmp_path / "run.json").write_text("{}")
    assert with_traces(free, [tmp_path])["teacher_training"] == dict.fromkeys(LEDGER_FIELDS)
    assert [f"{tmp_path} had cost is not known" in line.message for line in caplog.records] == [True, True]
    unknown = _store(tmp_path / "unknown", "abc", 1.0, None)
    assert with_traces(free, [unknown])["teacher_training"]["flops"] is None
