"""A self-teaching run from a composed config: the loop, with Lightning's fit as its fine-tuning."""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from research.config import build, build_trainer, plain
from research.data.traces import TraceData
from research.data.train_traces import reference_trace
from research.errors import ConfigError
from research.generation.in_process import LocalGenerator
from research.loops.fit import LAST, FitOutcome, KeepLast, StopOnInterrupt, fit
from research.loops.kept_traces import ORIGINS
from research.loops.ledger import Ledger, added, ledger_of, nothing
from research.loops.own_traces import Hints, OwnTraces
from research.loops.scoring import Scores, write_and_grade
from research.loops.self_taught import TRACES_FOLDER, Schedule, SelfTaught
from research.loops.self_taught_plan import SelfTaughtPlan
from research.methods.base import AbstractMethod
from research.records import Sampling, Trace
from research.results.record import write_atomic
from research.seeding import seed_for
from research.sweeps.process import refuse_further_processes
from research.tasks.grading import Grader
from research.traces.store import TraceStore

log = logging.getLogger(__name__)
SPENT_FILE = "spent.json"
COUNTERS = (
    "rows_seen", "tokens_seen", "update_flops", "teacher_rows", "teacher_tokens", "teacher_flops", "teacher_seconds",
)  # fmt: skip
FOLDER = "self_taught"


class SelfTaughtLoop:
    """The ``loop`` of a training run: iterations of writing, grading and fine-tuning, each with its own record.

    metrics   see :func:`iteration_metrics`
    """

    def __init__(self, cfg: DictConfig, data: TraceData, plan: SelfTaughtPlan) -> None:
        refuse_further_processes(cfg, "loop=self_taught runs its iterations")
        if data.num_validation == 0:
            raise ConfigError("loop=self_taught measures every iteration on validation problems; data.num_val is 0")
        if cfg.evaluation.weights == "best":
            log.warning(
                "evaluation.weights=best: loop=self_taught validates a student after its fit, never within it, so "
                "every iteration takes its last weights, and the run those of its last iteration"
            )
        self._cfg, self._data, self._plan = cfg, data, plan
        self._interrupt: StopOnInterrupt | None = None
        self.metrics: dict[str, float] = {}
        self.ledger: Ledger = {}
        self.scores: Scores | None = None

    def run(self, method: AbstractMethod, interrupt: StopOnInterrupt, run_dir: Path) -> FitOutcome:
        """Run, or go on with, the loop in ``run_dir/self_taught``; the last student's weights end in ``method``."""
        started, self._interrupt = time.perf_counter(), interrupt
        folder = run_dir / FOLDER
        result = self._loop(method.student).run(folder)
        method.student.load_state_dict(result.student.state_dict())
        spent = self._spent(folder)
        for counts in spent:
            for name in COUNTERS:
                setattr(method, name, getattr(method, name) + counts.get(name, 0))
        self._account(folder, result.records)
        seconds = time.perf_counter() - started
        updates = ledger_of(method, seconds, is_text=True)["student_update"]
        self.ledger["student_update"] = {**updates, "seconds": _sum(counts.get("seconds") for counts in spent)}
        return FitOutcome("completed", None, seconds)

    def _loop(self, base: nn.Module) -> SelfTaught:
        plan, data = self._plan, self._data
        problems = data.problems("train")
        needed = plan.num_problems + plan.num_anchors
        if needed > len(problems):
            raise ConfigError(
                f"loop.num_problems + loop.num_anchors is {needed}, the data have {len(problems)} train problems; "
                "raise data.num_train"
            )
        codec = data.codec
        limit = plan.max_new_tokens or data.max_tokens
        collector = OwnTraces(
            codec,
            Grader(data.task, codec.template, codec.layout),
            problems[plan.num_anchors : needed],
            sampling=Sampling(plan.num_samples, plan.sampling_temperature, plan.top_p, limit),
            hints=Hints(plan.hint_probability, plan.hint_format),
        )
        return SelfTaught(
            base,
            collector,
            Schedule(plan.iterations, plan.first_steps, plan.growth, plan.restart, int(self._cfg.seed)),
            generator_for=lambda network: LocalGenerator(
                network, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id
            ),
            fit_student=self._fit_student,
            evaluate=self._accuracy,
            anchors=[reference_trace(problem) for problem in problems[: plan.num_anchors]],
            identity={name: plain(self._cfg[name]) for name in ("method", "optimizer", "scheduler")},
        )

    def _fit_student(
        self, traces: Sequence[Trace], steps: int, init_weights: Mapping[str, Tensor], folder: Path
    ) -> nn.Module:
        """``steps`` optimizer steps by Lightning; goes on from the folder's own checkpoint where one is left."""
        if self._interrupt is None:
            raise RuntimeError("the loop has not been started; call run")
        iteration = int(folder.parent.name.rpartition("_")[2])
        seed = seed_for(int(self._cfg.seed), "self_taught_fit", iteration)
        method, data = build(self._cfg).method, self._data.with_traces(traces, seed)
        method.student.load_state_dict(dict(init_weights))
        options = {**plain(self._cfg.trainer), "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
        quiet = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        callbacks = [KeepLast(folder), self._interrupt]
        trainer = build_trainer(
            {**options, "enable_progress_bar": False}, default_root_dir=str(folder), callbacks=callbacks, **quiet
        )
        torch.manual_seed(seed_for(seed, "training"))
        last = folder / LAST
        outcome = fit(trainer, method, data, self._interrupt, str(last) if last.exists() else None)
        outcome.raise_if_stopped(folder)
        spent = {name: getattr(method, name) for name in COUNTERS}
        whole = ledger_of(method, method.earlier_seconds + outcome.seconds, is_text=True)
        spent["seconds"] = whole["student_update"]["seconds"]
        write_atomic(folder / SPENT_FILE, json.dumps(spent).encode())
        last.unlink(missing_ok=True)
        return method.student

    def _accuracy(self, network: nn.Module) -> dict[str, float]:
        limit = self._plan.max_new_tokens or self._data.max_tokens
        sampling = Sampling(max_new_tokens=limit)
        found = write_and_grade(network, self._data, self._data, "val", sampling, "val").metrics
        chosen = ("val/accuracy", "val/process_valid_pass_at_1", "val/step_validity")
        by_level = [name for name in found if name.startswith("val/accuracy_level_")]
        return {name: found[name] for name in (*chosen, *by_level) if name in found}

    def _spent(self, folder: Path) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(folder.glob(f"iteration_*/fit/{SPENT_FILE}"))]

    def _account(self, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """The ledger of what was written, and the metrics of every iteration."""
        self.ledger |= {"rollout": nothing(), "prompt_prefill": nothing()}
        for path in sorted(folder.glob(f"iteration_*/{TRACES_FOLDER}")):
            manifest = TraceStore(path).manifest
            written = {**manifest.cost, "tokens": float(manifest.tally.tokens)}
            for name, prefill in manifest.prefill.items():
                rest = written[name] if name == "tokens" else added(written[name], _negative(prefill))
                self._add("prompt_prefill", name, prefill)
                self._add("rollout", name, rest)
        self.metrics = iteration_metrics(records)

    def _add(self, part: str, name: str, value: float | None) -> None:
        self.ledger[part][name] = added(self.ledger[part][name], value)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _sum(values: Iterable[float | None]) -> float | None:
    total: float | None = 0.0
    for value in values:
        total = added(total, value)
    return total


def iteration_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``self_taught/<name>_<iteration>`` of every iteration's record, ITERATION_KEYS; the base's number is 00.

    accuracy, process_valid_pass_at_1, step_validity   of the iteration's student, on validation problems
    documents                   traces that it was trained on, anchors included
    kept_<origin>               of them its writer's own, generated without and rationalised with a hint
    false_positives_<origin>    share of these whose chain has a wrong step, where steps could be checked; absent where
                                there was none to check
    """
    metrics: dict[str, float] = {}
    for record in records:
        found = {name.removeprefix("val/"): value for name, value in (record["metrics"] or {}).items()}
        found |= {f"kept_{origin}": (record["fates"] or {}).get(origin) for origin in ORIGINS}
        for origin, checked in (record["false_positives"] or {}).items():
            found[f"false_positives_{origin}"] = checked["rate"]
        found["documents"] = record["documents"]
        number = f"{record['iteration']:02d}"
        metrics |= {f"self_taught/{name}_{number}": float(value) for name, value in found.items() if value is not None}
    return metrics
