"""STaR: a student learns from its own right solutions, with or without hints, from the base again in every iteration.

Zelikman et al. 2022, arXiv:2203.14465, algorithm 1. Teacher and student are one network; an answer key does the rest.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save
from torch import Tensor, nn

from research.errors import CheckpointError, ConfigError
from research.generation.base import AbstractGenerator
from research.loops.kept_traces import summary
from research.loops.own_traces import OwnTraces
from research.models.weights import check_state, weights_sha256
from research.records import Trace
from research.results.record import json_ready, write_atomic
from research.seeding import seed_for
from research.traces.store import TraceStore

PLAN_FILE, RECORDS_FILE = "plan.json", "iterations.jsonl"
TRACES_FOLDER, FIT_FOLDER, STUDENT_FILE = "traces", "fit", "student.safetensors"

# The frozen surface of a line of iterations.jsonl. What each key means stands in the docstring of :class:`SelfTaught`.
ITERATION_KEYS = (
    "iteration", "steps", "init", "init_sha256", "writer_sha256", "student_sha256", "num_problems", "fates",
    "first_try", "hinted_try", "false_positives", "writer_accuracy", "by_level", "documents", "tokens", "metrics",
    "stopped", "seconds",
)  # fmt: skip


class FitStudent(Protocol):
    """Fine-tunes a network: ``steps`` optimizer steps on ``traces``, from ``init_weights``.

    ``folder`` is its own: whatever an earlier, killed call with the same arguments left there it goes on from, so that
    the network it returns is the one an uninterrupted call returns.
    """

    def __call__(
        self, traces: Sequence[Trace], steps: int, init_weights: Mapping[str, Tensor], folder: Path
    ) -> nn.Module: ...


@dataclass(frozen=True)
class Schedule:
    """How often, how long and from where.

    iterations   loops of collecting and fine-tuning
    first_steps  optimizer steps of the first
    growth       factor on the steps from one iteration to the next: floor(first_steps * growth ** (iteration - 1)); 1.2
                 as published (40 steps in loop 1, 616 in loop 16), 1 for equal steps
    restart      True: every fine-tuning starts from the base's weights; False: from those of the iteration before
    seed         of sampling and of who gets a hint
    """

    iterations: int
    first_steps: int = 40
    growth: float = 1.2
    restart: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.first_steps < 1:
            raise ConfigError(
                f"iterations is {self.iterations} and first_steps is {self.first_steps}; expected at least 1 of each"
            )
        if not 1 <= self.growth < 10:
            raise ConfigError(f"growth is {self.growth}; expected a factor from 1 (equal steps) to below 10")

    def steps(self, iteration: int) -> int:
        """Optimizer steps of an iteration, counted from 1."""
        return int(self.first_steps * Fraction(repr(self.growth)) ** (iteration - 1))


@dataclass(frozen=True)
class SelfTaughtResult:
    """The last student, and one record per iteration, the base's (iteration 0) first."""

    student: nn.Module
    records: list[dict[str, Any]]


class SelfTaught:
    """The loop: the student of the iteration before writes, right solutions are kept, the next student learns them.

    base           the network that everything starts from; it is copied, never changed
    collector      problems, codec, grader, sampling and hints
    generator_for  gives the generator that samples a network
    fit_student    see :class:`FitStudent`
    evaluate       flat metrics of a network, for the records; called with the base too
    anchors        traces that are in every training set before the student's own, such as a few gold chains

    A folder holds ``plan.json``, one line per finished iteration in ``iterations.jsonl``, and in ``iteration_NN`` the
    trace store of what was written, the fit's own folder and the student's weights. :meth:`run` on a folder that was
    begun goes on exactly: after the last finished iteration, and within one after its last whole block of problems,
    wherever ``fit_student`` goes on, or after its fit. More ``iterations`` than before extend it.

    A record, by ITERATION_KEYS:

    iteration       0 for the base, of which only student_sha256, metrics and num_problems say anything
    steps, init, init_sha256    of the fine-tuning; init is "base" or "previous"
    writer_sha256, student_sha256    weights that wrote the traces, and weights after the fine-tuning
    num_problems .. tokens    see ``kept_traces.summary``; they speak of the writer, on its training problems
    documents       traces trained on, anchors included
    metrics         of ``evaluate``, on the student after the fine-tuning
    stopped         why the loop ended early; null
    seconds         collecting (over all processes) and fitting (this process); null where not measured
    """

    def __init__(
        self,
        base: nn.Module,
        collector: OwnTraces,
        schedule: Schedule,
        *,
        generator_for: Callable[[nn.Module], AbstractGenerator],
        fit_student: FitStudent,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        anchors: Sequence[Trace] = (),
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self._base, self._collector, self._schedule = base, collector, schedule
        self._generator_for, self._fit_student, self._evaluate = generator_for, fit_student, evaluate
        self._anchors = list(anchors)
        self._plan = self._plan_of(dict(identity or {}))

    def _plan_of(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What a folder was begun with; ``identity`` is what the caller adds (optimizer, tokenizer, ...)."""
        schedule = {name: value for name, value in asdict(self._schedule).items() if name != "iterations"}
        collector = self._collector
        return {
            "base_sha256": weights_sha256(self._base),
            "task": collector.grader.task.name,
            "layout": collector.grader.layout,
            "problems_sha256": _sha256([asdict(problem) for problem in collector.problems]),
            "refused": list(collector.refused),
            "anchors_sha256": _sha256([asdict(trace) for trace in self._anchors]),
            "sampling": asdict(collector.sampling),
            "hints": asdict(collector.hints),
            "block_problems": collector.block_problems,
            "schedule": schedule,
            "identity": identity,
        }

    def run(self, folder: Path) -> SelfTaughtResult:
        """Run, or go on with, the loop in ``folder``.

        Raises CheckpointError where the folder was begun with another plan or a finished student is not as it was
        left; StoreError for a trace store that does not fit.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._check_plan(folder / PLAN_FILE)
        records = _read_records(folder / RECORDS_FILE)
        if not records:
            records = self._append(folder, [], self._base_record())
        student = self._student_of(folder, records[-1])
        while len(records) <= self._schedule.iterations and records[-1]["stopped"] is None:
            student, record = self._iterate(folder, len(records), student)
            records = self._append(folder, records, record)
        return SelfTaughtResult(student, records)

    def _iterate(self, root: Path, iteration: int, writer: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        folder, steps = root / f"iteration_{iteration:02d}", self._schedule.steps(iteration)
        writer_sha256 = weights_sha256(writer)
        settings = {"plan": self._plan, "iteration": iteration, "writer_sha256": writer_sha256}
        seed = seed_for(self._schedule.seed, "self_taught", iteration)
        rows = self._collector.collect(self._generator_for(writer), folder / TRACES_FOLDER, settings, seed)
        collect_s = TraceStore(folder / TRACES_FOLDER).manifest.cost["seconds"]
        traces = [*self._anchors, *(row.trace for row in rows if row.kept)]
        init = self._base if self._schedule.restart else writer
        record = {
            "iteration": iteration,
            "steps": steps,
            "init": "base" if self._schedule.restart else "previous",
            "init_sha256": weights_sha256(init),
            "writer_sha256": writer_sha256,
            **summary(rows, self._collector.problems, len(self._collector.refused)),
            "documents": len(traces),
            "stopped": None,
        }
        if not traces:
            record["stopped"] = f"none of {len(self._collector.problems)} problems was solved and there are no anchors"
            record |= {"steps": 0, "student_sha256": writer_sha256, "metrics": {}}
            return writer, {**record, "seconds": {"collect": collect_s, "fit": None}}
        started, is_fitted = time.perf_counter(), (folder / STUDENT_FILE).exists()
        student = self._fitted(folder, traces, steps, init)
        fit_s = None if is_fitted else time.perf_counter() - started
        record |= {"student_sha256": weights_sha256(student), "metrics": self._metrics(student)}
        return student, {**record, "seconds": {"collect": collect_s, "fit": fit_s}}

    def _fitted(self, folder: Path, traces: Sequence[Trace], steps: int, init: nn.Module) -> nn.Module:
        """The student of an iteration: read where an earlier process finished its fit, else fine-tuned and saved."""
        path = folder / STUDENT_FILE
        if not path.exists():
            fitted = self._fit_student(traces, steps, _state(init), folder / FIT_FOLDER)
            check_state(self._base, _state(fitted), f"the network that fit_student returned for {folder.name}")
            write_atomic(path, save(_state(fitted)))
        return self._loaded(path)

    def _loaded(self, path: Path) -> nn.Module:
        state = load_file(path)
        check_state(self._base, state, str(path))
        student = copy.deepcopy(self._base)
        student.load_state_dict(state)
        return student

    def _student_of(self, folder: Path, record: Mapping[str, Any]) -> nn.Module:
        """The student that a record speaks of."""
        if record["student_sha256"] == self._plan["base_sha256"]:
            return self._base
        last = record["iteration"] - (record["stopped"] is not None)  # who stopped trained nobody
        path = folder / f"iteration_{last:02d}" / STUDENT_FILE
        if not path.exists():
            raise CheckpointError(f"{path} is missing, of a finished iteration; restore it or begin a new folder")
        student = self._loaded(path)
        if weights_sha256(student) != record["student_sha256"]:
            raise CheckpointError(f"{path} is not as iteration {last} left it; restore it or begin a new folder")
        return student

    def _base_record(self) -> dict[str, Any]:
        empty: dict[str, Any] = dict.fromkeys(ITERATION_KEYS)
        num = len(self._collector.problems) + len(self._collector.refused)
        found = {"iteration": 0, "steps": 0, "student_sha256": self._plan["base_sha256"], "num_problems": num}
        return {**empty, **found, "metrics": self._metrics(self._base)}

    def _metrics(self, network: nn.Module) -> dict[str, float]:
        return {} if self._evaluate is None else {name: float(value) for name, value in self._evaluate(network).items()}

    def _append(self, folder: Path, records: list[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
        """The records with one more, the file written whole: a kill leaves it with the line or without."""
        ready = json_ready({key: record[key] for key in ITERATION_KEYS})
        records = [*records, json.loads(json.dumps(ready))]
        lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in records)
        write_atomic(folder / RECORDS_FILE, lines.encode())
        return records

    def _check_plan(self, path: Path) -> None:
        plan = json.loads(json.dumps(self._plan))
        if not path.exists():
            write_atomic(path, (json.dumps(plan, indent=1) + "\n").encode())
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key}: {found.get(key)!r}, now {plan.get(key)!r}"
            for key in sorted({*found, *plan})
            if found.get(key) != plan.get(key)
        ]
        if changed:
            raise CheckpointError(
                f"{path.parent} was begun with another plan ({'; '.join(changed)}); give the same settings, or another "
                "folder"
            )


def _state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights: tensors that nobody else holds, and that share no memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [record.get("iteration") for record in records] != list(range(len(records))):
        raise CheckpointError(f"{path} does not hold iterations 0, 1, .. in order; restore it or begin a new folder")
    return records


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
