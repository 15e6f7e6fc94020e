"""Two phases from one config: each a run of its own, the second from the first's student, killed in either."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from research.models.weights import weights_sha256
from research.results.curves import read_curve
from research.results.record import LEDGER_PARTS, RunRecord, read_record
from research.teachers.load import load_network
from research.text.tokenizer import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
PHASES = (
    "loop.phases=[{name: answers, overrides: ['data.trace_format=answer_only', 'trainer.max_steps=12']}, "
    "{name: chains, overrides: ['optimizer.lr=0.002', 'trainer.max_steps=10', 'seed=8']}]"
)
RUN = (
    "experiment=sum8_trace", "task.num_terms=3", "student.hidden_size=32", "student.num_layers=2",
    "student.dropout=0.1", "data.num_train=320", "data.num_val=16", "data.num_test=20", "data.batch_size=32",
    "trainer.max_epochs=2", "trainer.enable_progress_bar=false", "evaluation.max_new_tokens=16", "logger=none",
    "threads=1", "seed=5", "checkpoint_steps=2", "loop=strong_to_weak", PHASES,
)  # fmt: skip
FOLDERS = ("1_answers", "2_chains")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    return all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


@pytest.fixture(scope="module")
def whole(distill: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    done = distill("train", *RUN, "hydra.run.dir=run", cwd=folder)
    assert done.code == 0 and done.err == "", done.err
    return folder / "run"


def phase_records(run: Path) -> list[RunRecord]:
    return [read_record(run / "phases" / name / "run.json") for name in FOLDERS]


def test_each_phase_is_a_run_and_the_last_is_the_result(whole: Path) -> None:
    record, (first, second) = read_record(whole / "run.json"), phase_records(whole)
    assert [one.status for one in (record, first, second)] == ["completed"] * 3
    assert [one.seed for one in (record, first, second)] == [5, 5, 8]
    assert first.config["data"]["trace_format"] == "answer_only" and second.config["optimizer"]["lr"] == 0.002
    assert record.student["sha256"] == second.student["sha256"] != first.student["sha256"]
    assert same(whole, whole / "phases" / FOLDERS[1])
    for name in FOLDERS:
        assert (whole / "phases" / name / "checkpoints" / "last.ckpt").exists()
    assert {name: record.metrics[name] for name in second.metrics} == second.metrics
    assert {name: record.metrics[f"phase_answers/{name}"] for name in first.metrics} == first.metrics
    assert (whole / record.artifacts["items/test"]).samefile(whole / "phases" / FOLDERS[1] / "items_test.parquet")


def test_the_second_begins_where_the_first_ended(whole: Path, distill: Callable[..., Any], tmp_path: Path) -> None:
    """The phase by hand: a plain run of its overrides, from the folder of the first."""
    begins = f"init_from='{whole}/phases/{FOLDERS[0]}'"
    by_hand = (*RUN[:-2], "optimizer.lr=0.002", "trainer.max_steps=10", "seed=8", begins, "hydra.run.dir=run")
    flags = [flag for flag in by_hand if flag != "seed=5"]
    assert distill("train", *flags, cwd=tmp_path).code == 0
    assert same(whole, tmp_path / "run")


def test_p122_the_ledger_is_the_sum_of_the_phases(whole: Path) -> None:
    record, (first, second) = read_record(whole / "run.json"), phase_records(whole)
    for part in LEDGER_PARTS:
        for name, value in record.ledger[part].items():
            assert value == pytest.approx(first.ledger[part][name] + second.ledger[part][name])
    assert record.ledger["student_update"]["flops"] > first.ledger["student_update"]["flops"] > 0


def test_the_phases_are_one_curve(whole: Path) -> None:
    """A validation after step 10 and the end at 12, then 10 steps more."""
    record = read_record(whole / "run.json")
    rows = read_curve(whole / record.artifacts["curve"])
    assert [row["step"] for row in rows] == [10, 12, 22]
    assert rows[-1]["spent_tokens"] == record.ledger["student_update"]["tokens"]
    assert rows[-1]["spent_flops"] == record.ledger["student_update"]["flops"]
    assert rows[-1]["val/nll"] == record.metrics["val/nll"]


def test_a_finished_phase_is_not_repeated(whole: Path, distill: Callable[..., Any]) -> None:
    before = {name: (whole / "phases" / name / "run.json").stat().st_mtime_ns for name in FOLDERS}
    metrics = read_record(whole / "run.json").metrics
    done = distill("train", *RUN, "ckpt_path=last", "hydra.run.dir=run", cwd=whole.parent)
    assert done.code == 0, done.err
    assert before == {name: (whole / "phases" / name / "run.json").stat().st_mtime_ns for name in FOLDERS}
    assert read_record(whole / "run.json").metrics == metrics
    other = [flag.replace("trainer.max_steps=12", "trainer.max_steps=13") for flag in RUN]
    error = distill("train", *other, "ckpt_path=last", "hydra.run.dir=run", cwd=whole.parent).error
    assert "holds a finished phase of another run (trainer.max_steps=12 then, trainer.max_steps=13 now)" in error
    assert read_record(whole / "run.json").metrics == metrics, "what is refused leaves everything as it was"


def test_a_phase_that_was_cut_does_not_go_on_from_another_start(
    whole: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    """The second was killed, and the first is made anew: what the second had begun belongs to the old one."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "phases" / FOLDERS[0])
    for folder in (run, run / "phases" / FOLDERS[1]):
        (folder / "run.json").unlink()
    last = run / "phases" / FOLDERS[1] / "checkpoints" / "last.ckpt"
    os.utime(last, (last.stat().st_mtime - 60,) * 2)
    error = distill("train", *RUN, "ckpt_path=last", "hydra.run.dir=run", cwd=tmp_path).error
    assert f"{FOLDERS[1]} is older than the run of the phase that it begins with" in error and "remove it" in error


def test_every_phase_takes_the_best_of_its_own_weights(distill: Callable[..., Any], tmp_path: Path) -> None:
    """One validation after step 10 of 12: those are the first phase's best, and what the second begins with.

    The second ends before a validation, and is the only one that says so.
    """
    phases = PHASES.replace("trainer.max_steps=10", "trainer.max_steps=4")
    done = distill("train", *RUN[:-1], phases, "evaluation.weights=best", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    run, (first, second) = tmp_path / "run", (tmp_path / "run" / "phases" / name for name in FOLDERS)
    kept = {name: first / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")}
    assert [torch.load(path, weights_only=True)["global_step"] for path in kept.values()] == [10, 12]
    facts = {"vocab_size": len(build_tokenizer(str(first / "student"))), "tokenizer_sha256": None}
    best, last = (weights_sha256(load_network(path, **facts).network) for path in kept.values())
    assert read_record(first / "run.json").student["sha256"] == best != last
    assert not (second / "checkpoints" / "best.ckpt").exists() and same(run, second)
    (told,) = done.err.splitlines()
    assert "the run ended before its first validation, so the last weights are taken" in told
    assert told in next(run.glob("*.log")).read_text().partition("phase chains: ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_p81_a_run_killed_in_either_phase_goes_on(
    folder: str, whole: Path, distill: Callable[..., Any], begin: Callable[..., Any], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    last = cut / "phases" / folder / "checkpoints" / "last.ckpt"
    begin("train", *RUN, f"hydra.run.dir={cut}", cwd=tmp_path).kill_when(last.exists)
    assert not (cut / "phases" / folder / "run.json").exists() and not (cut / "run.json").exists()
    done = distill("train", *RUN, "ckpt_path=last", f"hydra.run.dir={cut}", cwd=tmp_path)
    assert done.code == 0, done.err
    assert same(whole, cut) and read_record(cut / "run.json").metrics == read_record(whole / "run.json").metrics
    ledgers = [read_record(run / "run.json").ledger for run in (cut, whole)]
    assert [{part: line["flops"] for part, line in ledger.items()} for ledger in ledgers[:1]] == [
        {part: line["flops"] for part, line in ledgers[1].items()}
    ]


@pytest.mark.slow
def test_two_modes_then_the_student_s_own_words_in_both_killed_in_the_second_phase(
    distill: Callable[..., Any], begin: Callable[..., Any], tmp_path: Path
) -> None:
    """The published recipe from its committed file, small: killed on policy, it ends as one that was not."""
    small = (
        "trainer.max_steps=16", "data.num_train=320", "data.num_val=16", "data.num_test=20", "logger=none", "threads=1",
        "trainer.enable_progress_bar=false", "student.hidden_size=32", "student.num_layers=2",
    )  # fmt: skip
    assert distill("train", "experiment=sum3_teacher", "data.modes=two", *small, f"hydra.run.dir={tmp_path}/teacher",
                   cwd=tmp_path).code == 0  # fmt: skip
    run = (
        "train", "experiment=sum3_strong_to_weak", *small, f"teacher.path={tmp_path}/teacher", "checkpoint_steps=2",
        "ckpt_path=last",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = distill(*run, f"hydra.run.dir={whole}", cwd=tmp_path)
    assert done.code == 0, done.err
    last = cut / "phases" / "2_on_policy" / "checkpoints" / "last.ckpt"
    begin(*run, f"hydra.run.dir={cut}", cwd=tmp_path).kill_when(last.exists)
    assert not (cut / "phases" / "2_on_policy" / "run.json").exists()
    done = distill(*run, f"hydra.run.dir={cut}", cwd=tmp_path)
    assert done.code == 0, done.err
    assert same(whole, cut)
    first, second = (read_record(run / "run.json") for run in (whole, cut))
    assert first.metrics == second.metrics and first.ledger["rollout"]["flops"] == second.ledger["rollout"]["flops"] > 0
    assert {"test_think/obedience", "test_no_think/obedience"} <= first.metrics.keys()


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[]", "expected at least one phase"),
        ("[{name: a}, {name: a}]", "each name once"),
        ("[{name: a, steps: 3}]", r"loop.phases[0] is"),
        ("[{name: 1a}]", "it names a folder and metrics"),
        ("[{name: a, overrides: ['loop=self_taught']}]", "which the loop sets itself"),
        ("[{name: a, overrides: ['+init_from=x']}]", "which the loop sets itself"),
        ("[{name: a}, {name: b, overrides: ['optimiser.lr=1']}]", "b does not compose"),
    ],
)
def test_phases_that_cannot_be_meant_are_refused_before_the_first(
    phases: str, message: str, distill: Callable[..., Any], tmp_path: Path
) -> None:
    done = distill("train", *RUN[:-1], f"loop.phases={phases}", "hydra.run.dir=run", cwd=tmp_path)
    assert message in done.error and not (tmp_path / "run" / "phases").exists()


def test_a_phase_that_fails_is_named_in_its_record_and_the_run_s(distill: Callable[..., Any], tmp_path: Path) -> None:
    phases = "loop.phases=[{name: a, overrides: ['trainer.max_steps=1']}, {name: b, overrides: ['optimizer.lr=1e30']}]"
    done = distill("train", *RUN[:-1], phases, "trainer.max_steps=4", "hydra.run.dir=run", cwd=tmp_path)
    assert "not finite" in done.error
    found = {path.parent.name: json.loads(path.read_text())["status"] for path in tmp_path.rglob("run.json")}
    assert found == {"run": "failed", "1_a": "completed", "2_b": "failed"}


def test_traces_first_and_the_students_own_words_then(whole: Path, distill: Callable[..., Any], tmp_path: Path) -> None:
    """The real recipe, small: on-policy KL to a frozen teacher, within a budget, from the first phase's student."""
    words = (
        "{name: words, overrides: ['data=prompts', 'data.num_prompts=8', 'method=on_policy', "
        "'method.max_new_tokens=8', "
        f"'teacher=frozen', \"teacher.path='{whole}'\", 'trainer.max_epochs=-1', 'budget.tokens=3000']}}"
    )
    phases = f"loop.phases=[{{name: traces, overrides: ['trainer.max_steps=4']}}, {words}]"
    done = distill("train", *RUN[:-1], "preflight=skip", phases, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    record = read_record(tmp_path / "run" / "run.json")
    traces, words_record = (
        read_record(tmp_path / "run" / "phases" / name / "run.json") for name in ("1_traces", "2_words")
    )
    assert words_record.config["init_from"] == str(tmp_path / "run" / "phases" / "1_traces")
    for part in ("prompt_prefill", "rollout", "teacher_scoring"):
        line = record.ledger[part]
        assert line["flops"] > 0 and line["tokens"] > 0 and line["seconds"] > 0 and traces.ledger[part]["flops"] == 0
    of_run = ("student_update", "prompt_prefill", "rollout", "teacher_scoring")
    spent = sum(words_record.ledger[part]["tokens"] for part in of_run)
    assert record.metrics["budget/tokens"] == spent >= 3000 > spent * (1 - 1 / record.metrics["budget/steps"])
    assert str(words_record.reason).startswith("budget.tokens is 3000")
