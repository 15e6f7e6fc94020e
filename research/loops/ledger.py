"""What a run cost, line by line: the ledger of its record."""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from research.methods.base import AbstractMethod
from research.results.record import LEDGER_FIELDS, LEDGER_PARTS, read_record
from research.teachers.base import TeacherIdentity

log = logging.getLogger(__name__)
STORE_RECORD = "run.json"
Line = dict[str, float | None]
Ledger = dict[str, Line]


def nothing() -> Line:
    """A line of what was not done: 0, which is not the None of what was not measured."""
    return dict.fromkeys(LEDGER_FIELDS, 0.0)


def ledger_of(method: AbstractMethod, seconds: float, *, is_text: bool) -> Ledger:
    """Every part of one method's run: FLOPs, tokens (rows of what has none) and seconds, over all its fits.

    seconds  wall time of these fits. Of a student's update it is what is left without rollouts, teacher and validation

    The teacher's training is amortised by the reader, so it stands here whole, and None where no record says what it
    cost; :func:`with_traces` adds what stored traces had cost.
    """
    teacher, rollout = method.teacher, method.rollout_cost
    elsewhere = method.teacher_seconds + rollout.seconds + method.validation_seconds
    ledger: Ledger = {
        "student_update": {
            "flops": method.update_flops,
            "tokens": float(method.tokens_seen),
            "seconds": seconds - elsewhere,
        },
        "rollout": rollout.rollout(),
        "prompt_prefill": rollout.prefill(),
        "teacher_scoring": nothing(),
        "teacher_training": nothing(),
    }
    if teacher is not None and method.teacher_rows:
        ledger["teacher_scoring"] = {
            "flops": _known(method.teacher_flops + teacher.spent_flops()),
            "tokens": float(method.teacher_tokens if is_text else method.teacher_rows),
            "seconds": method.teacher_seconds,
        }
        ledger["teacher_training"] = training_of(teacher.identity)
    return ledger


def with_traces(ledger: Ledger, stores: Iterable[Path], charged: Iterable[str] = ()) -> Ledger:
    """The ledger of a run that read stored traces: their writing and their teachers' training stand in its last line.

    Like a teacher's training this was spent once, before the run and for all students, so the reader amortises it.

    stores   folders of the stores; one without a record of its own makes that line unknown
    charged  hashes of teachers whose training the ledger holds already: it is not charged again for a store of theirs
    """
    known = set(charged)
    lines = [ledger["teacher_training"]]
    for folder in dict.fromkeys(folder.absolute() for folder in stores):
        try:
            record = read_record(folder / STORE_RECORD)
        except (OSError, ValueError) as error:
            log.warning("what the traces of %s had cost is not known: %s", folder, error)
            lines.append(dict.fromkeys(LEDGER_FIELDS))
            continue
        lines.append(record.ledger["teacher_scoring"])
        weights = (record.teacher or {}).get("weights_sha256") or str(folder)
        if weights not in known:
            known.add(weights)
            lines.append(record.ledger["teacher_training"])
    return ledger | {"teacher_training": sum_lines(lines)}


def training_of(teacher: TeacherIdentity) -> Line:
    """What the teacher's own training had cost, as far as its record says."""
    return {"flops": teacher.training_flops, "tokens": teacher.training_tokens, "seconds": teacher.training_seconds}


def summed(ledgers: Iterable[Mapping[str, Mapping[str, float | None]]]) -> Ledger:
    """Part by part and field by field; what one of them did not measure is not known of the sum."""
    given = list(ledgers)
    return {part: sum_lines(ledger.get(part, {}) for ledger in given) for part in LEDGER_PARTS}


def sum_lines(lines: Iterable[Mapping[str, float | None]]) -> Line:
    """Field by field; 0 where there is no line, None where one of them has none of that field."""
    total = nothing()
    for line in lines:
        for name in LEDGER_FIELDS:
            total[name] = added(total[name], line.get(name))
    return total


def added(first: float | None, second: float | None) -> float | None:
    """The sum; None where either is."""
    return None if first is None or second is None else first + second


def _known(flops: float) -> float | None:
    """None for the NaN by which a teacher elsewhere says that nobody counts its FLOPs."""
    return None if math.isnan(flops) else flops
