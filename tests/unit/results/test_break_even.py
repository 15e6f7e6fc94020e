"""When a teacher has paid for itself, on curves whose crossing is known."""

import numpy as np
import pytest
from scipy import stats

from research.results.break_even import break_even, cost_at, pareto_front
from research.results.fields import StudyError

METRIC = "val/accuracy"


def curve(*points: tuple[float, float | None]) -> list[dict[str, float | None]]:
    return [{"step": float(n), "spent_flops": cost, METRIC: value} for n, (cost, value) in enumerate(points)]


def test_the_cost_of_a_level_is_read_off_the_straight_line() -> None:
    points = [(0.0, 0.2), (10.0, 0.6), (20.0, 0.5), (30.0, 0.9)]
    assert cost_at(points, 0.4) == pytest.approx(5.0)
    assert cost_at(points, 0.6) == 10.0 and cost_at(points, 0.8) == pytest.approx(27.5)
    assert cost_at(points, 0.1) == 0.0 and cost_at(points, 0.95) is None


def test_students_that_must_share_a_teacher_by_hand() -> None:
    """RL takes 100, 110 and 90 to .5; the students are there at 20, 30 and 10: each saves 80, and 200 needs 2.5."""
    direct = {seed: curve((0, 0.2), (50, None), (cost, 0.5)) for seed, cost in enumerate((100.0, 110.0, 90.0))}
    distilled = {seed: curve((0, 0.2), (cost, 0.5), (99, 0.9)) for seed, cost in enumerate((20.0, 30.0, 10.0))}
    found = break_even(direct, distilled, METRIC, teacher_cost=200.0)
    assert (found.students, found.n) == (pytest.approx(2.5), 3)
    assert (found.direct, found.distilled) == (pytest.approx(100.0), pytest.approx(20.0))
    assert found.low == pytest.approx(2.5) and found.high == pytest.approx(2.5), "every seed saves the same"


def test_the_interval_is_that_of_what_a_student_saves() -> None:
    """k* is the teacher over the mean saving, so that its ends are the teacher over Student's ends of that mean."""
    saved = np.array([80.0, 95.0, 70.0, 88.0, 77.0, 91.0, 84.0, 79.0])
    direct = {seed: curve((0, 0.2), (100.0 + save, 0.5)) for seed, save in enumerate(saved)}
    distilled = {seed: curve((0, 0.2), (100.0, 0.5)) for seed in range(len(saved))}
    found = break_even(direct, distilled, METRIC, teacher_cost=200.0)
    half = stats.t.ppf(0.975, len(saved) - 1) * saved.std(ddof=1) / len(saved) ** 0.5
    assert found.low == pytest.approx(200 / (saved.mean() + half), rel=0.02)
    assert found.high == pytest.approx(200 / (saved.mean() - half), rel=0.02)


def test_a_way_that_saves_nothing_never_pays_for_a_teacher() -> None:
    direct = {seed: curve((0, 0.2), (10.0 + seed, 0.5)) for seed in range(5)}
    distilled = {seed: curve((0, 0.2), (40.0, 0.5)) for seed in range(5)}
    found = break_even(direct, distilled, METRIC, teacher_cost=200.0)
    assert (found.students, found.low, found.high) == (None, None, None)


def test_the_front_is_what_nothing_beats() -> None:
    points = {"best": (0.9, 9.0), "cheap": (0.5, 1.0), "twin": (0.5, 1.0), "dear": (0.5, 2.0), "worse": (0.4, 1.5)}
    assert pareto_front(points) == {"best", "cheap", "twin"}


def test_what_cannot_be_read_is_refused() -> None:
    never = {0: curve((0, 0.2), (40.0, 0.3))}
    with pytest.raises(StudyError, match=r"with seed 0 the distilled student never comes to 0.5"):
        break_even({0: curve((0, 0.2), (10, 0.5))}, never, METRIC, teacher_cost=1.0)
    with pytest.raises(StudyError, match="share no seed"):
        break_even({0: never[0]}, {1: never[0]}, METRIC, teacher_cost=1.0)
    with pytest.raises(StudyError, match="val/accuracy was never measured against flops"):
        break_even({0: curve((0, None))}, never, METRIC, teacher_cost=1.0)
