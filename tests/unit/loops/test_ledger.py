"""The lines of a run's ledger against numbers by hand: nothing is counted twice, nothing unknown becomes 0."""

from functools import partial
from typing import Any

import pytest
import torch

from research.generation.cost import GenerationCost
from research.loops.ledger import ledger_of, nothing, summed
from research.methods.base import Training
from research.methods.soft_target import SoftTarget
from research.models.build import build_network
from research.results.record import LEDGER_PARTS
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
