"""What a self-teaching run's record says of every iteration, from the iterations' own records."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from research.errors import ConfigError
from research.loops.self_taught import ITERATION_KEYS
from research.loops.self_taught_plan import SelfTaughtPlan
from research.sweeps.self_taught_job import SelfTaughtLoop, iteration_metrics

NONE_CHECKED = {"checked": 0, "invalid": 0, "rate": None}


def record(iteration: int, **told: Any) -> dict[str, Any]:
    return {**dict.fromkeys(ITERATION_KEYS), "iteration": iteration, **told}


def make_loop(weights: str = "last", **trainer: Any) -> SelfTaughtLoop:
    cfg = OmegaConf.create({"trainer": {"devices": 1, "num_nodes": 1, **trainer}, "evaluation": {"weights": weights}})
    data: Any = SimpleNamespace(num_validation=4)
    return SelfTaughtLoop(cfg, data, SelfTaughtPlan())


@pytest.mark.parametrize("trainer", [{}, *({"devices": devices} for devices in (None, [1], "1", "0,"))], ids=str)
def test_one_process_is_enough_for_the_loop(trainer: dict[str, Any]) -> None:
    assert make_loop(**trainer).metrics == {}


@pytest.mark.parametrize(
    "trainer", [*({"devices": devices} for devices in (2, "2", "auto", "0,1", [0, 1])), {"num_nodes": 2}], ids=str
)
def test_ranks_that_would_share_one_store_are_refused(trainer: dict[str, Any]) -> None:
    (key,) = trainer
    with pytest.raises(ConfigError, match=rf"trainer\.{key} is .*loop=self_taught runs its .* give trainer\.{key}=1"):
        make_loop(**trainer)


def test_the_best_weights_of_an_iteration_are_not_to_be_had(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_loop()
        assert caplog.text == ""
        make_loop("best")
    assert "evaluation.weights=best" in caplog.text and "every iteration takes its last weights" in caplog.text


def test_every_rate_stands_under_its_origin_and_iteration() -> None:
    """The rate of a try that kept nothing does not exist, and is left out rather than 0."""
    fates = {"generated": 40, "rationalised": 8, "not_hinted": 1, "hint_failed": 2, "gold_unreadable": 0}
    kept = {"generated": {"checked": 40, "invalid": 3, "rate": 0.075}, "rationalised": NONE_CHECKED}
    last = {"generated": {"checked": 5, "invalid": 0, "rate": 0.0},
            "rationalised": {"checked": 8, "invalid": 2, "rate": 0.25}}  # fmt: skip
    found = iteration_metrics(
        [
            record(0, metrics={"val/accuracy": 0.25, "val/accuracy_level_3": 0.5}),
            record(1, metrics={"val/accuracy": 0.75}, false_positives=kept, documents=58, fates=fates),
            record(12, metrics={}, false_positives=last, documents=23, fates={**fates, "generated": 5}),
        ]
    )
    assert found == {
        "self_taught/accuracy_00": 0.25, "self_taught/accuracy_level_3_00": 0.5, "self_taught/accuracy_01": 0.75,
        "self_taught/false_positives_generated_01": 0.075, "self_taught/documents_01": 58.0,
        "self_taught/kept_generated_01": 40.0, "self_taught/kept_rationalised_01": 8.0,
        "self_taught/false_positives_generated_12": 0.0, "self_taught/false_positives_rationalised_12": 0.25,
        "self_taught/kept_generated_12": 5.0, "self_taught/kept_rationalised_12": 8.0,
        "self_taught/documents_12": 23.0,
    }  # fmt: skip
    assert all(isinstance(value, float) for value in found.values())


def test_an_iteration_without_a_fit_tells_what_it_has() -> None:
    stopped = record(1, metrics={}, false_positives={"generated": NONE_CHECKED}, documents=0, stopped="nothing solved")
    assert iteration_metrics([stopped]) == {"self_taught/documents_01": 0.0}
    with pytest.raises(KeyError):
        iteration_metrics([record(1, metrics={}, false_positives={"generated": {}})])
