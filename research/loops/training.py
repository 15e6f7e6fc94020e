"""One training run from built parts to its record: fit, save the student, evaluate once, account for the cost."""

import datetime as dt
import functools
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from research.data.traces import TraceData
from research.errors import ConfigError, Preempted
from research.loops.budget_stop import BudgetStop
from research.loops.curves import CurveWriter
from research.loops.early_stop import EarlyStop
from research.loops.fit import (
    BEST,
    CHECKPOINTS,
    FitOutcome,
    StopOnInterrupt,
    checkpoint_callbacks,
    fit,
    resume_path,
    stopped_by_signals,
)
from research.loops.ledger import Ledger, ledger_of, with_traces
from research.loops.scoring import DataModule, Scores, score_classes, score_exposure, score_text
from research.loops.validation_answers import ANSWER_METRICS, SAMPLED_METRIC, ValidationAnswers
from research.methods.base import AbstractMethod
from research.models.weights import count_parameters, save_network, save_tokenizer, weights_sha256, write_model_card
from research.results.curves import CURVE_FILE
from research.results.record import RunRecord, collect_versions, git_revision, hardware, write_record
from research.seeding import seed_for
from research.teachers.base import AbstractTeacher
from research.teachers.load import NETWORK_FOLDER
from research.traces.importing import QUARANTINE_FILE

log = logging.getLogger(__name__)
RECORD_FILE = "run.json"


class FitLoop(Protocol):
    """Several fits in the place of one; leaves the final weights in the method's student, and its counters summed.

    metrics   of the loop's own stages, beside those of the final student
    ledger    lines of the record's ledger that stand in the place of the method's own
    scores    of the final student, where the loop has them already; None: it is scored as after one fit
    """

    metrics: dict[str, float]
    ledger: Ledger
    scores: Scores | None

    def run(self, method: AbstractMethod, interrupt: StopOnInterrupt, run_dir: Path) -> FitOutcome: ...


@dataclass
class TrainingRun:
    """What one run needs beyond its trainer.

    config      resolved plain config, for the record; `experiment`, `command`, `overrides` likewise
    reference   the network that fidelity is measured against; None: the method's own teacher where it is live
    variants    name -> a datamodule whose test split is scored under `test_<name>`
    early_stop  what ends the fit by a metric of validation
    loop        what runs several fits where one would be; None: one call of Lightning's fit
    resume_is_asked   whether `ckpt_path=last` is the user's word; a study or a sweep gives it to every run
    """

    run_dir: Path
    data: DataModule
    method: AbstractMethod
    architecture: dict[str, Any]
    reference: AbstractTeacher | None
    variants: Mapping[str, DataModule]
    config: dict[str, Any]
    command: str
    overrides: list[str]
    loop: FitLoop | None = None
    early_stop: EarlyStop | None = None
    resume_is_asked: bool = True

    def __post_init__(self) -> None:
        self.started_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.started = time.perf_counter()
        self._accelerator: str | None = None
        self._budget_stop: BudgetStop | None = None
        self._curve: CurveWriter | None = None

    # -- the steps ----------------------------------------------------------------------------------------------------

    def callbacks(self, interrupt: StopOnInterrupt) -> list[Callback]:
        """Checkpoints and the answer to Ctrl-C. Raises ConfigError where nothing can be selected as asked."""
        options = self.config["trainer"]
        if options.get("fast_dev_run"):
            return [interrupt]
        has_val = self.data.has_val and options.get("limit_val_batches") != 0
        monitor, known = self.config["monitor"], self._measured()
        if has_val and monitor not in known:
            raise ConfigError(
                f"monitor is {monitor!r}; on the validation split this method measures {', '.join(known)}"
            )
        if not has_val and self.config["evaluation"]["weights"] == "best":
            raise ConfigError(
                "evaluation.weights=best selects on a validation split; there is none (data.holdout=0 or num_val=0)"
            )
        if self.early_stop is not None and not (has_val and self.early_stop.monitor in known):
            raise ConfigError(
                f"early_stopping.monitor is {self.early_stop.monitor!r}; "
                + (f"on the validation split this method measures {', '.join(known)}" if has_val else
                   "there is no validation split (data.holdout=0 or num_val=0)")
            )  # fmt: skip
        every = self.config.get("checkpoint_steps")
        saved = checkpoint_callbacks(self.run_dir / CHECKPOINTS, monitor, has_val, every)
        budget = self.method.budget
        self._budget_stop = None if budget is None else BudgetStop(budget)
        stop: list[Callback] = [one for one in (self._budget_stop, self.early_stop) if one is not None]
        self._curve = CurveWriter(self.run_dir)
        return [*stop, *self._validation_answers(has_val), self._curve, *saved, interrupt]

    def _measured(self) -> tuple[str, ...]:
        """What is measured on the validation split; of answers only where problems are answered there."""
        known, options = self.method.validation_metrics, self.config["evaluation"]
        if not isinstance(self.data, TraceData):
            return known
        if not options["val_problems"]:
            return tuple(name for name in known if name not in ANSWER_METRICS)
        return (*known, SAMPLED_METRIC) if options["val_samples"] else known

    def _validation_answers(self, has_val: bool) -> list[Callback]:
        """What answers validation problems while the student is trained, where the config asks for it."""
        options = self.config["evaluation"]
        if not options["val_problems"]:
            return []
        if not isinstance(self.data, TraceData) or not has_val:
            raise ConfigError(
                f"evaluation.val_problems is {options['val_problems']}, which needs text with validation problems "
                "(data=traces or data=prompts, data.num_val above 0)"
            )
        return [
            ValidationAnswers(
                self.data,
                num_problems=options["val_problems"],
                num_samples=options["val_samples"],
                max_new_tokens=options["max_new_tokens"] or self.data.max_tokens,
                seed=self.config["seed"],
            )
        ]

    def run(self, trainer: L.Trainer, interrupt: StopOnInterrupt) -> RunRecord:
        """Fit, evaluate and write `run.json`, whatever the outcome; raises after it where the run did not complete."""
        outcome: FitOutcome | None = None
        device = trainer.strategy.root_device  # asked before the fit: after it the student is back on the CPU
        self._accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        try:
            with stopped_by_signals(f"outside the fit (run folder {self.run_dir})"):
                # dropout follows the seed, whatever was drawn before in this process
                torch.manual_seed(seed_for(self.config["seed"], "training", trainer.global_rank))
                if isinstance(self.data, TraceData) and trainer.is_global_zero:
                    self.data.list_bad_rows(self.run_dir / QUARANTINE_FILE)
                if self.loop is None:
                    resume = resume_path(self.config["ckpt_path"], self.run_dir, is_asked=self.resume_is_asked)
                    outcome = fit(trainer, self.method, self.data, interrupt, resume)
                else:
                    outcome = self.loop.run(self.method, interrupt, self.run_dir)
                outcome.raise_if_stopped(self.run_dir)
                return self._finish(trainer, outcome)
        except Preempted as error:
            self._write(self._ended("preempted", outcome, str(error)), {}, {}, None)
            raise
        except Exception as error:
            self._write(self._ended("failed", outcome, f"{type(error).__name__}: {error}"), {}, {}, None)
            raise

    def _ended(self, status: str, outcome: FitOutcome | None, reason: str) -> FitOutcome:
        """The outcome of the whole run: the fit's own where that is what stopped, else what came after it or before."""
        if outcome is not None and outcome.status != "completed":
            return outcome
        seconds = outcome.seconds if outcome is not None else time.perf_counter() - self.started
        return FitOutcome(status, reason, seconds)

    def _finish(self, trainer: L.Trainer, outcome: FitOutcome) -> RunRecord:
        """What follows a completed fit: the student's folder, its metrics, the record."""
        _leave_other_ranks(trainer)
        self._take_weights()
        folder = self.run_dir / NETWORK_FOLDER
        student_sha256 = save_network(folder, self.method.student, self.architecture)
        if isinstance(self.data, TraceData):
            save_tokenizer(folder, self.data.codec.tokenizer)
        scores = None if self.loop is None else self.loop.scores
        scores = scores or self._score(trainer.strategy.root_device)
        metrics, artifacts = scores.metrics, {"student": NETWORK_FOLDER, **scores.artifacts}
        beside = {"curve": CURVE_FILE, "quarantine": QUARANTINE_FILE}
        artifacts |= {name: file for name, file in beside.items() if (self.run_dir / file).exists()}
        metrics |= {} if self._curve is None else self._curve.measured
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        for callback in trainer.checkpoint_callbacks:
            monitor, score = getattr(callback, "monitor", None), getattr(callback, "best_model_score", None)
            if monitor is not None and score is not None:
                metrics[f"{monitor}_best"] = float(score)
        metrics |= {} if self.loop is None else self.loop.metrics
        if self._budget_stop is not None:
            metrics |= self._budget_stop.metrics
        ends = [
            one.reason for one in (self._budget_stop, self.early_stop) if one is not None and one.reason is not None
        ]
        outcome = replace(outcome, reason=ends[0]) if ends else outcome
        record = self._write(outcome, metrics, artifacts, student_sha256)
        if isinstance(self.data, TraceData):
            write_model_card(folder, asdict(record))
        if not self.config["keep_checkpoints"]:
            shutil.rmtree(self.run_dir / CHECKPOINTS, ignore_errors=True)
        return record

    def _take_weights(self) -> None:
        """The weights that are evaluated and kept: the last step's, or the best on validation where asked.

        A loop left its own in the method: its fits have folders of their own, and each has taken its weights there.
        """
        best = self.run_dir / CHECKPOINTS / BEST
        is_asked = self.config["evaluation"]["weights"] == "best" and self.loop is None
        if not is_asked or self.config["trainer"].get("fast_dev_run"):
            return
        if best.exists():
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            self.method.load_state_dict(state)
        else:
            log.warning(
                "evaluation.weights=best: the run ended before its first validation, so the last weights are taken; "
                "train for longer, or validate sooner with a smaller trainer.limit_train_batches"
            )

    def _score(self, device: torch.device) -> Scores:
        """Every split and variant that the config asks for, with the final weights."""
        options, student = self.config["evaluation"], self.method.student.to(device)
        if isinstance(self.data, TraceData):
            seed = self.config["seed"]
            scores = score_text(student, self.data, self.variants, options, self.run_dir, seed)
            if options["exposure"]:
                teacher = self.reference or self._live_teacher()
                scores.add(score_exposure(student, teacher, self.data, options, self.run_dir, seed))
            return scores
        reference = self.reference or self._live_teacher()
        if reference is not None:
            reference.to(device)
        temperature = float(getattr(self.method, "temperature", 1.0))
        return score_classes(student, self.data, self.variants, options, self.run_dir, reference, temperature)

    def _live_teacher(self) -> AbstractTeacher | None:
        """The method's teacher where it can score any row, and is not a control made from one."""
        teacher = self.method.teacher
        if teacher is None or teacher.identity.kind not in ("frozen", "ensemble"):
            return None
        return None if "transform" in teacher.identity.details else teacher

    # -- the record ---------------------------------------------------------------------------------------------------

    def _write(
        self, outcome: FitOutcome, metrics: dict[str, float], artifacts: dict[str, str], student_sha256: str | None
    ) -> RunRecord:
        teacher = self.method.teacher
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
            versions=dict(_versions()),
            revision=dict(_revision()),
            hardware=hardware(torch.get_num_threads(), self._accelerator),
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

    def _ledger(self, outcome: FitOutcome) -> Ledger:
        """Over all fits of a resumed run; a loop that runs several says what is its own."""
        seconds = self.method.earlier_seconds + outcome.seconds
        ledger = ledger_of(self.method, seconds, is_text=isinstance(self.data, TraceData))
        if isinstance(self.data, TraceData) and self.data.store_folders and self.method.takes_stored_traces:
            teacher = self.method.teacher
            charged = [teacher.identity.sha256] if teacher is not None and self.method.teacher_rows else []
            ledger = with_traces(ledger, self.data.store_folders, charged)
        return ledger if self.loop is None else ledger | self.loop.ledger


# what is loaded in this process is what its first run found, however many trials it goes on to
_versions = functools.cache(collect_versions)
_revision = functools.cache(lambda: git_revision(Path(__file__).parent))


def _leave_other_ranks(trainer: L.Trainer) -> None:
    """After a fit on several devices the first rank evaluates and records alone; the others have done their part.

    Metrics would otherwise add up every rank's copy of the same test split.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        raise SystemExit(0)
