"""Phases: which overrides hold for which, and what their ledgers add up to."""

from pathlib import Path
from typing import Any

import pytest

from research.errors import CheckpointError
from research.loops.strong_to_weak import StrongToWeakPlan, check_finished, ledger_of_phases, overrides_of
from research.results.record import LEDGER_PARTS, RunRecord, write_record

RUN = ["experiment=sum8_trace", "method=sft_trace", "+data.modes=two", "loop=strong_to_weak", "loop.phases=[..]",
       "seed=5", "init_from=BASE", "ckpt_path=last"]  # fmt: skip
PLAN = StrongToWeakPlan(
    [{"name": "traces"}, {"name": "words", "overrides": ["method=on_policy", "data.modes=null", "seed=6"]}]
)


def record(overrides: list[str], **changes: Any) -> RunRecord:
    plain: dict[str, Any] = {
        "command": "distill train",
        "experiment": "e",
        "status": "completed",
        "seed": 0,
        "config": {},
    }
    return RunRecord(metrics={}, started_at="", wall_s=1.0, overrides=overrides, **{**plain, **changes})


def test_a_phase_replaces_what_the_run_says() -> None:
    traces, words = PLAN.declared()
    assert overrides_of(traces, RUN, None, None) == [
        "experiment=sum8_trace", "method=sft_trace", "+data.modes=two", "seed=5", "init_from=BASE", "loop=none",
    ]  # fmt: skip
    assert overrides_of(words, RUN, "'phases/1_traces'", "last") == [
        "experiment=sum8_trace", "method=on_policy", "data.modes=null", "seed=6", "loop=none",
        "init_from='phases/1_traces'", "ckpt_path=last",
    ]  # fmt: skip


def test_a_finished_phase_may_lie_elsewhere_and_be_nothing_else(tmp_path: Any) -> None:
    _, words = PLAN.declared()
    check_finished(
        record(overrides_of(words, RUN, "elsewhere", "last")), overrides_of(words, RUN, "here", None), tmp_path,
        is_first=False,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"seed=6 then, seed=7 now"):
        changed = [text.replace("seed=6", "seed=7") for text in overrides_of(words, RUN, "here", None)]
        check_finished(record(overrides_of(words, RUN, "here", None)), changed, tmp_path, is_first=False)


def test_a_finished_first_phase_of_another_start_is_not_taken_for_this_run_s(tmp_path: Any) -> None:
    """`init_from=OTHER` in the same folder: the student of BASE is not handed on as that of OTHER."""
    traces, _ = PLAN.declared()
    done = record(overrides_of(traces, RUN, None, "last"))
    check_finished(done, overrides_of(traces, RUN, None, None), tmp_path, is_first=True)
    with pytest.raises(CheckpointError, match=r"init_from=BASE then, init_from=OTHER now"):
        other = [text.replace("BASE", "OTHER") for text in RUN]
        check_finished(done, overrides_of(traces, other, None, None), tmp_path, is_first=True)


def test_p122_a_teacher_of_two_phases_was_trained_once_and_its_traces_written_once(tmp_path: Path) -> None:
    def ledger(training: float) -> dict[str, Any]:
        lines = {part: {"flops": 10.0, "tokens": 1.0, "seconds": 0.5} for part in LEDGER_PARTS}
        return lines | {"teacher_training": {"flops": training, "tokens": training, "seconds": None}}

    def teacher(name: str, training: float) -> dict[str, Any]:
        return {"sha256": name, "training_flops": training, "training_tokens": training, "training_seconds": None}

    store = record([], ledger=ledger(700.0), teacher={"weights_sha256": "a"})
    write_record(tmp_path / "run.json", store)
    first = record([], ledger=ledger(710.0), config={"data": {"store": str(tmp_path)}})
    live = record([], ledger=ledger(700.0), teacher=teacher("a", 700.0), config={"data": {"store": str(tmp_path)}})
    other = record([], ledger=ledger(30.0), teacher=teacher("b", 30.0))
    total = ledger_of_phases([record([], ledger=ledger(0.0)), first, live, other])
    assert total["teacher_training"] == {"flops": 740.0, "tokens": 731.0, "seconds": None}
    assert total["rollout"] == {"flops": 40.0, "tokens": 4.0, "seconds": 2.0}
    alone = ledger_of_phases([record([], ledger=ledger(0.0)), first])
    assert alone["teacher_training"] == {"flops": 710.0, "tokens": 701.0, "seconds": None}
