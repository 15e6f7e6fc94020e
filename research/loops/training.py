"""One training run from built parts to its record: fit, save the student, evaluate once, account for the cost."""

import datetime as dt
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from research.data.base import AbstractClassData
from research.errors import NonFiniteLoss, Preempted
from research.evaluation.evaluate import Evaluation, evaluate
from research.evaluation.bias import evaluate_with_bias
from research.loops.fit import (
    CHECKPOINTS,
    EXIT_CODES,
    FitOutcome,
    StopOnInterrupt,
    checkpoint_callbacks,
    fit,
    resume_path,
)
from research.methods.base import AbstractMethod
from research.models.flops import flops_per_row
from research.models.weights import count_parameters, save_network, weights_sha256
from research.results.items import write_items
from research.results.record import RunRecord, collect_versions, git_revision, hardware, write_record
from research.teachers.base import AbstractTeacher
from research.teachers.load import NETWORK_FOLDER

RECORD_FILE = "run.json"


@dataclass
class TrainingRun:
    """What one run needs beyond its trainer.

    config      resolved plain config, for the record; `experiment`, `command`, `overrides` likewise
    reference   the network that fidelity is measured against; None: the method's own teacher where it is live
    variants    name -> a datamodule whose test split is scored under `test_<name>`
    """

    run_dir: Path
    data: AbstractClassData
    method: AbstractMethod
    architecture: dict[str, Any]
    reference: AbstractTeacher | None
    variants: Mapping[str, AbstractClassData]
    config: dict[str, Any]
    command: str
    overrides: list[str]

    def __post_init__(self) -> None:
        self.started_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.started = time.perf_counter()

    # -- the steps ----------------------------------------------------------------------------------------------------

    def callbacks(self, interrupt: StopOnInterrupt) -> list[Callback]:
        if self.config["trainer"].get("fast_dev_run"):
            return [interrupt]
        has_val = self.data.selection.holdout > 0
        return [*checkpoint_callbacks(self.run_dir / CHECKPOINTS, self.config["monitor"], has_val), interrupt]

    def run(self, trainer: L.Trainer, interrupt: StopOnInterrupt) -> RunRecord:
        """Fit, evaluate and write `run.json`, whatever the outcome; raises after writing where the run did not complete."""
        resume = resume_path(self.config["ckpt_path"], self.run_dir)
        try:
            outcome = fit(trainer, self.method, self.data, interrupt, resume)
        except Exception as error:
            self._write(FitOutcome("failed", f"{type(error).__name__}: {error}", 0.0), {}, {}, None)
            raise
        if outcome.status != "completed":
            self._write(outcome, {}, {}, None)
            if outcome.status == "preempted":
                code = EXIT_CODES["SIGTERM" if str(outcome.reason).startswith("SIGTERM") else "SIGINT"]
                raise Preempted(f"{outcome.reason} (run folder {self.run_dir})", code) from None
            raise NonFiniteLoss(str(outcome.reason)) from None
        self._take_weights()
        student_sha256 = save_network(self.run_dir / NETWORK_FOLDER, self.method.student, self.architecture)
        metrics, artifacts = self._evaluate()
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                metrics[name] = float(value)
        record = self._write(outcome, metrics, artifacts, student_sha256)
        if not self.config["keep_checkpoints"]:
            shutil.rmtree(self.run_dir / CHECKPOINTS, ignore_errors=True)
        return record

    def _take_weights(self) -> None:
        """The weights that are evaluated and kept: the last step's, or the best on validation where asked."""
        best = self.run_dir / CHECKPOINTS / "best.ckpt"
        if self.config["evaluation"]["weights"] == "best" and best.exists():
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            self.method.load_state_dict(state)

    def _evaluate(self) -> tuple[dict[str, float], dict[str, str]]:
        options, student = self.config["evaluation"], self.method.student
        reference = self.reference or self._live_teacher()
        temperature = float(getattr(self.method, "temperature", 1.0))
        metrics: dict[str, float] = {}
        artifacts: dict[str, str] = {"student": NETWORK_FOLDER}
        scored = [(split, self.data, split) for split in options["splits"]]
        scored += [(f"test_{name}", data, "test") for name, data in self.variants.items()]
        for name, data, split in scored:
            result = evaluate(
                student,
                data.loader(split, batch_size=options["batch_size"]),
                split=name,
                num_classes=data.num_classes,
                teacher=reference,
                temperature=temperature,
            )
            metrics |= result.metrics
            artifacts[f"items/{name}"] = self._write_items(name, result)
        if options["bias_classes"]:
            metrics |= evaluate_with_bias(student, self.data, reference, options["bias_classes"], options["batch_size"])
        return metrics, artifacts

    def _live_teacher(self) -> AbstractTeacher | None:
        teacher = self.method.teacher
        return teacher if teacher is not None and teacher.identity.kind in ("frozen", "ensemble") and not (
            "transform" in teacher.identity.details
        ) else None

    def _write_items(self, name: str, result: Evaluation) -> str:
        path = self.run_dir / f"items_{name}.parquet"
        write_items(path, result.items)
        return path.name

    # -- the record ---------------------------------------------------------------------------------------------------

    def _write(
        self, outcome: FitOutcome, metrics: dict[str, float], artifacts: dict[str, str], student_sha256: str | None
    ) -> RunRecord:
        teacher = self.method.teacher
        accelerator = torch.cuda.get_device_name() if self.method.device.type == "cuda" else None
        record = RunRecord(
            command=self.command,
            experiment=self.config["name"],
            status=outcome.status,
            reason=outcome.reason,
            seed=self.config["seed"],
            config=self.config,
            overrides=self.overrides,
            metrics=metrics,
            started_at=self.started_at,
            wall_s=time.perf_counter() - self.started,
            versions=collect_versions(),
            revision=git_revision(Path(__file__).parent),
            hardware=hardware(torch.get_num_threads(), accelerator),
            ledger=self._ledger(outcome),
            data={
                "name": type(self.data).__name__,
                "fingerprint": self.data.fingerprint("train") if outcome.status == "completed" else None,
                "summary": self.data.summary() if outcome.status == "completed" else {},
            },
            student={
                "architecture": self.architecture,
                "parameters": count_parameters(self.method.student),
                "sha256": student_sha256 or weights_sha256(self.method.student),
            },
            teacher=asdict(teacher.identity) if teacher is not None else None,
            artifacts=artifacts,
        )
        write_record(self.run_dir / RECORD_FILE, record)
        return record

    def _ledger(self, outcome: FitOutcome) -> dict[str, dict[str, float | None]]:
        """FLOPs by torch's counter, tokens (here rows) and seconds of every part; the teacher's training is amortised
        by the reader, so it stands here whole, and None where no record says what it cost."""
        method, teacher = self.method, self.method.teacher
        rows = float(method.rows_seen)
        nothing: dict[str, float | None] = {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}
        update = flops_per_row(method.student, self.data.input_shape, backward=True)
        ledger = {
            "student_update": {
                "flops": update * rows,
                "tokens": rows,
                "seconds": outcome.seconds - method.teacher_seconds,
            },
            "rollout": nothing,
            "teacher_scoring": nothing,
            "teacher_training": nothing,
        }
        if teacher is not None and method.needs_teacher:
            ledger["teacher_scoring"] = {
                "flops": teacher.flops_per_row() * rows,
                "tokens": rows,
                "seconds": method.teacher_seconds,
            }
            ledger["teacher_training"] = {
                "flops": teacher.identity.training_flops,
                "tokens": None,
                "seconds": None,
            }
        return ledger
