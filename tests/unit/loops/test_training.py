"""One run, from its parts to its record: every way of ending leaves one, and its ledger can be checked by hand."""

import dataclasses
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from research.data.digits import Digits
from research.data.loader import TensorLoader
from research.errors import CheckpointError, ConfigError, NonFiniteLoss, Preempted
from research.loops.fit import FitOutcome, StopOnInterrupt
from research.loops.ledger import Ledger
from research.loops.scoring import Scores
from research.loops.training import TrainingRun
from research.methods.base import AbstractMethod, Training
from research.methods.soft_target import SoftTarget
from research.methods.supervised import Supervised
from research.models.build import build_network, describe
from research.models.weights import save_network, weights_sha256
from research.results.record import RunRecord, read_record
from research.teachers.base import AbstractTeacher
from research.teachers.cache import CachedTeacher, CacheFingerprint, CacheWriter
from research.teachers.load import ensemble, frozen, load_network
from research.teachers.transforms import PermutedWrongClasses

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
MLP: dict[str, Any] = {"_target_": "research.models.classifiers.Mlp", "hidden": [12], "dropout": 0.2}
FORWARD = 2 * (64 * 12 + 12 * 10)
UPDATE = 3 * FORWARD - 2 * 64 * 12  # no gradient in the first layer's inputs
ROWS, EPOCHS = 37, 3


def make_network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_network(MLP, **FACTS)


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    save_network(tmp_path / "teacher" / "student", make_network(5), describe(MLP, **FACTS))
    (tmp_path / "teacher" / "run.json").write_text('{"ledger": {"student_update": {"flops": 1000.0}}}')
    return tmp_path / "teacher"


def make_run(
    folder: Path, teacher: AbstractTeacher | None = None, data: Digits | None = None, lr: float = 0.01, **config: Any
) -> TrainingRun:
    training = Training(make_network(), partial(torch.optim.Adam, lr=lr), None, describe(MLP, **FACTS))
    method: AbstractMethod = Supervised(training) if teacher is None else SoftTarget(training, teacher, temperature=2.0)
    evaluation = {"splits": ["test"], "weights": "last", "batch_size": 100, "bias_classes": [], "val_problems": 0}
    plain: dict[str, Any] = {"name": "run", "seed": 3, "ckpt_path": None, "keep_checkpoints": True, "trainer": {}}
    return TrainingRun(
        run_dir=folder,
        data=data or Digits(batch_size=8, num_train=ROWS, holdout=20, seed=3),
        method=method,
        architecture=describe(MLP, **FACTS),
        reference=None,
        variants={},
        config={**plain, "monitor": "val/errors", **config, "evaluation": evaluation | config.get("evaluation", {})},
        command="distill train",
        overrides=[],
    )


def go(run: TrainingRun, *callbacks: L.Callback, **options: Any) -> RunRecord:
    interrupt = StopOnInterrupt()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    plain: dict[str, Any] = {"accelerator": "cpu", "max_epochs": EPOCHS, "num_sanity_val_steps": 0, **quiet, **options}
    run.run_dir.mkdir(parents=True, exist_ok=True)
    return run.run(L.Trainer(**plain, callbacks=[*run.callbacks(interrupt), *callbacks]), interrupt)


class Stop(L.Callback):
    """A signal or an error in one call of a hook."""

    def __init__(self, event: signal.Signals | Exception, step: int) -> None:
        self.event, self.step = event, step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            if isinstance(self.event, Exception):
                raise self.event
            os.kill(os.getpid(), self.event)


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_completed_run_leaves_its_student_and_its_record(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    record = go(run)
    written = read_record(tmp_path / "run" / "run.json")
    assert record == dataclasses.replace(written, config_hash="") and record.status == "completed"
    student = load_network(tmp_path / "run", **FACTS).network
    assert weights_sha256(student) == record.student["sha256"] == weights_sha256(run.method.student)
    assert record.student["parameters"] == 64 * 12 + 12 + 12 * 10 + 10
    assert record.data["summary"]["rows"] == {"train": ROWS, "val": 20, "test": 360}
    (test,) = run.data.loader("test", batch_size=360)
    wrong = int((student.eval()(test.inputs).argmax(-1) != test.label_B).sum())
    assert record.metrics["test/errors"] == wrong and 0 <= record.metrics["val/errors"] <= 20


def test_a_failing_step_is_recorded_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        go(make_run(tmp_path), Stop(RuntimeError("boom"), 4))
    record = read_record(tmp_path / "run.json")
    assert (record.status, record.reason) == ("failed", "RuntimeError: boom")
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_a_loss_that_is_not_finite_is_recorded_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.data.split_tensors("train")[0][run.data.train_dataloader().order(0)[20]] = torch.nan
    with pytest.raises(NonFiniteLoss):
        go(run)
    record = read_record(tmp_path / "run.json")
    assert record.status == "failed" and "not finite at step 2" in str(record.reason)
    assert "batch indices" in str(record.reason) and "Last good checkpoint: last.ckpt" in str(record.reason)
    assert record.ledger["student_update"]["tokens"] == 16.0


def test_an_evaluation_that_fails_is_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.data.split_tensors("test")[0][7] = torch.nan
    with pytest.raises(ValueError, match="the student's logits are not finite"):
        go(run)
    record = read_record(tmp_path / "run.json")
    assert record.status == "failed" and "the student's logits are not finite" in str(record.reason)
    assert record.ledger["student_update"]["tokens"] == EPOCHS * ROWS


class SignalsInTest(Digits):
    """Sends this process a signal when the test split is asked for."""

    number: signal.Signals | None = signal.SIGTERM

    def loader(self, split: Any, **options: Any) -> TensorLoader:
        if split == "test" and self.number is not None:
            os.kill(os.getpid(), self.number)
        return super().loader(split, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_p86_a_signal_in_the_evaluation_is_preempted_and_the_evaluation_is_made_on_resume(
    tmp_path: Path, number: signal.Signals
) -> None:
    data = SignalsInTest(batch_size=8, num_train=ROWS, holdout=20, seed=3)
    data.number = number
    with pytest.raises(Preempted) as told:
        go(make_run(tmp_path / "run", data=data))
    assert told.value.exit_code == 128 + number
    record = read_record(tmp_path / "run" / "run.json")
    assert record.status == "preempted" and f"{number.name} outside the fit" in str(record.reason)
    data.number = None
    resumed = go(make_run(tmp_path / "run", data=data, ckpt_path="last"))
    whole = go(make_run(tmp_path / "whole"))
    assert resumed.status == "completed" and resumed.student["sha256"] == whole.student["sha256"]
    assert resumed.metrics["test/errors"] == whole.metrics["test/errors"]
    assert resumed.ledger["student_update"]["tokens"] == EPOCHS * ROWS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_p86_p87_a_preempted_run_says_so_and_goes_on_in_its_own_folder(
    tmp_path: Path, teacher_folder: Path, number: signal.Signals
) -> None:
    def live() -> AbstractTeacher:
        return frozen(str(teacher_folder), **FACTS)

    with pytest.raises(Preempted) as told:
        go(make_run(tmp_path / "run", live()), Stop(number, 7))
    assert told.value.exit_code == 128 + number and str(tmp_path / "run") in str(told.value)
    record = read_record(tmp_path / "run" / "run.json")
    assert record.status == "preempted" and str(record.reason).startswith(f"{number.name} at step 8")
    part = record.ledger["student_update"]["tokens"]
    assert part == ROWS + 3 * 8
    torch.manual_seed(77)
    resumed, whole = (go(make_run(tmp_path / name, live(), ckpt_path="last")) for name in ("run", "whole"))
    assert resumed.status == "completed" and resumed.student["sha256"] == whole.student["sha256"]
    for part, quantities in whole.ledger.items():
        for quantity in ("flops", "tokens"):
            assert resumed.ledger[part][quantity] == quantities[quantity]
        assert (resumed.ledger[part]["seconds"] or 0) >= 0


def test_seconds_go_on_from_those_of_the_checkpoint(tmp_path: Path, teacher_folder: Path) -> None:
    teacher = frozen(str(teacher_folder), **FACTS)
    go(make_run(tmp_path / "run", teacher), max_epochs=1)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["spent"]["seconds"] > checkpoint["spent"]["teacher_seconds"] > 0
    checkpoint["spent"] |= {"seconds": 5000.0, "teacher_seconds": 2000.0, "validation_seconds": 1000.0}
    checkpoint["spent"]["rollout"] |= {"seconds": 500.0, "prompt_seconds": 100.0}
    torch.save(checkpoint, path)
    ledger = go(make_run(tmp_path / "run", teacher, ckpt_path="last")).ledger
    assert 1500 < ledger["student_update"]["seconds"] < 1600 and 2000 < ledger["teacher_scoring"]["seconds"] < 2100
    assert ledger["rollout"]["seconds"] == 400 and ledger["prompt_prefill"]["seconds"] == 100


def test_a_checkpoint_of_another_architecture_is_recorded_and_named(tmp_path: Path) -> None:
    go(make_run(tmp_path / "run"))
    other = make_run(tmp_path / "other", ckpt_path=str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    wider = build_network({**MLP, "hidden": [13]}, **FACTS)
    other.method.student = wider
    with pytest.raises(CheckpointError, match=r"body\.1\.weight: file has \(12, 64\), network needs \(13, 64\)"):
        go(other)
    assert read_record(tmp_path / "other" / "run.json").status == "failed"


# -- weights, seeds, options ------------------------------------------------------------------------------------------


def test_the_best_weights_are_taken_where_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path, lr=0.3, evaluation={"weights": "best"})  # a rate at which the last is not the best
    record = go(run, max_epochs=6)
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    student = load_network(tmp_path, **FACTS).network.state_dict()
    assert all(torch.equal(tensor, best[f"student.{name}"]) for name, tensor in student.items())
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(tensor, last[f"student.{name}"]) for name, tensor in student.items())
    (val,) = run.data.loader("val", batch_size=20)
    wrong = int((run.method.student.eval()(val.inputs).argmax(-1) != val.label_B).sum())
    assert wrong == record.metrics["val/errors_best"]


def test_a_run_without_a_validation_says_that_it_takes_the_last_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = go(make_run(tmp_path, evaluation={"weights": "best"}), max_steps=1, max_epochs=-1)
    assert record.status == "completed" and not (tmp_path / "checkpoints" / "best.ckpt").exists()
    (told,) = (line.message for line in caplog.records if line.name == "research.loops.training")
    assert "ended before its first validation, so the last weights are taken" in told


class Doubles:
    """A loop whose only fit multiplies the student's weights by two."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.ledger: Ledger = {}
        self.scores: Scores | None = None

    def run(self, method: AbstractMethod, interrupt: StopOnInterrupt, run_dir: Path) -> FitOutcome:
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.mul_(2)
        return FitOutcome("completed", None, 0.0)


def test_a_loop_s_own_weights_are_taken_where_the_best_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its fits have chosen theirs; neither the best of another run in the folder nor a warning has a place here."""
    go(make_run(tmp_path))
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()
    run = make_run(tmp_path, evaluation={"weights": "best"})
    before = {name: tensor.clone() for name, tensor in run.method.student.state_dict().items()}
    run.loop = Doubles()
    go(run)
    student = load_network(tmp_path, **FACTS).network.state_dict()
    assert all(torch.equal(tensor, 2 * before[name]) for name, tensor in student.items())
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    run = make_run(tmp_path, evaluation={"weights": "best"})
    run.loop = Doubles()
    go(run)
    assert [line.message for line in caplog.records if line.name == "research.loops.training"] == []


def test_checkpoints_are_thrown_away_where_asked(tmp_path: Path) -> None:
    go(make_run(tmp_path, keep_checkpoints=False))
    assert not (tmp_path / "checkpoints").exists() and (tmp_path / "student").exists()


def test_dropout_follows_the_seed_and_nothing_that_was_drawn_before(tmp_path: Path) -> None:
    hashes = []
    for number, (seed, drawn) in enumerate([(3, 0), (3, 5), (4, 0)]):
        run = make_run(tmp_path / str(number), seed=seed)
        torch.rand(drawn)
        hashes.append(go(run).student["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_cannot_be_selected_is_refused_before_the_fit(tmp_path: Path) -> None:
    interrupt = StopOnInterrupt()
    with pytest.raises(ConfigError, match=r"monitor is 'val/loss'; .* measures val/errors, val/nll"):
        make_run(tmp_path, monitor="val/loss").callbacks(interrupt)
    none = Digits(batch_size=8, num_train=ROWS, holdout=0)
    with pytest.raises(ConfigError, match="there is none"):
        make_run(tmp_path, data=none, evaluation={"weights": "best"}).callbacks(interrupt)
    assert make_run(tmp_path, data=none, monitor="val/loss").callbacks(interrupt)


def test_validation_can_be_left_out(tmp_path: Path) -> None:
    record = go(make_run(tmp_path, trainer={"limit_val_batches": 0}), limit_val_batches=0)
    kept = make_run(tmp_path, trainer={"limit_val_batches": 0}).callbacks(StopOnInterrupt())
    names = [type(callback).__name__ for callback in kept]
    assert names == ["CurveWriter", "KeepLast", "StopOnInterrupt"]  # nothing to select on
    assert not [name for name in record.metrics if name.startswith("val/")]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


# -- the ledger -------------------------------------------------------------------------------------------------------


def scored(record: RunRecord) -> dict[str, float | None]:
    return {quantity: record.ledger["teacher_scoring"][quantity] for quantity in ("flops", "tokens")}


def test_p122_the_ledger_of_hard_labels(tmp_path: Path) -> None:
    ledger = go(make_run(tmp_path)).ledger
    update = ledger["student_update"]
    assert update["tokens"] == EPOCHS * ROWS and update["flops"] == EPOCHS * ROWS * UPDATE and update["seconds"] > 0
    nothing = {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}
    for part in ("teacher_scoring", "teacher_training", "rollout", "prompt_prefill"):
        assert ledger[part] == nothing, part


def test_p122_the_ledger_of_a_live_teacher(tmp_path: Path, teacher_folder: Path) -> None:
    record = go(make_run(tmp_path / "run", frozen(str(teacher_folder), **FACTS)))
    assert scored(record) == {"tokens": EPOCHS * ROWS, "flops": EPOCHS * ROWS * FORWARD}
    assert record.ledger["teacher_training"] == {"flops": 1000.0, "tokens": None, "seconds": None}
    assert record.ledger["teacher_scoring"]["seconds"] > 0
    assert record.ledger["student_update"]["flops"] == EPOCHS * ROWS * UPDATE
    assert record.teacher["sha256"] == weights_sha256(make_network(5))


def test_p122_the_ledger_of_an_ensemble(tmp_path: Path, teacher_folder: Path) -> None:
    record = go(make_run(tmp_path / "run", ensemble([str(teacher_folder)] * 3, streamed=False, **FACTS)))
    assert scored(record) == {"tokens": EPOCHS * ROWS, "flops": 3 * EPOCHS * ROWS * FORWARD}
    assert record.ledger["teacher_training"]["flops"] == 3000.0


def test_p122_the_ledger_of_a_cache_holds_the_scoring_behind_it(tmp_path: Path, teacher_folder: Path) -> None:
    live, data = frozen(str(teacher_folder), **FACTS), Digits(holdout=0)
    source = data.source_fingerprint("train")
    mark = CacheFingerprint(live.identity.sha256, {}, source, "identity", 10, None, "float32")
    list(CacheWriter(tmp_path / "cache", mark, rows=1437).write(live, data, "train"))
    for teacher in (CachedTeacher(tmp_path / "cache"), PermutedWrongClasses(CachedTeacher(tmp_path / "cache"))):
        record = go(make_run(tmp_path / type(teacher).__name__, teacher))
        assert scored(record) == {"tokens": EPOCHS * ROWS, "flops": 1437 * FORWARD}
        assert record.ledger["teacher_training"]["flops"] == 1000.0


def test_a_teacher_that_no_term_needs_costs_nothing(tmp_path: Path, teacher_folder: Path) -> None:
    run = make_run(tmp_path / "run", frozen(str(teacher_folder), **FACTS))
    assert isinstance(run.method, SoftTarget)
    run.method.soft_weight, run.method.hard_weight = 0.0, 1.0
    assert scored(go(run)) == {"tokens": 0.0, "flops": 0.0}


def test_fidelity_is_measured_against_the_live_teacher_and_not_against_a_control(
    tmp_path: Path, teacher_folder: Path
) -> None:
    live = frozen(str(teacher_folder), **FACTS)
    assert "test/agreement_at_1" in go(make_run(tmp_path / "live", live)).metrics
    assert "test/agreement_at_1" not in go(make_run(tmp_path / "control", PermutedWrongClasses(live))).metrics
