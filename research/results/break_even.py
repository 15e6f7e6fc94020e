"""When a teacher has paid for itself: what is best at which cost, and how many students must share a teacher's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.results.bootstrap import effective_df, percentile_interval, ratio_draws, seed_weights, unbiased_weights
from research.results.curves import AGAINST, CurveRow, points_of
from research.results.fields import StudyError

Curves = Mapping[int, Sequence[CurveRow]]


@dataclass(frozen=True)
class BreakEven:
    """Teacher's cost over what each student saves, k*; whoever trains more students than that had better distil.

    students          k*; None where distilling saves nothing
    low, high         95 % interval over seeds; None where it has no finite end
    direct            mean cost of the direct way to the level that it ends at
    distilled         mean cost of the distilled students to that same level, seed by seed
    n                 paired seeds
    """

    students: float | None
    low: float | None
    high: float | None
    direct: float
    distilled: float
    n: int


def break_even(
    direct: Curves, distilled: Curves, metric: str, teacher_cost: float, against: str = "flops"
) -> BreakEven:
    """k* from two arms' curves (claim C27): teacher_cost / (direct - distilled cost at equal ``metric``).

    direct, distilled   seed -> rows of a run's curve, as ``read_study_curves`` gives them. The level that counts is,
                        for each seed, the direct way's last measurement, where it is at its best or nearly so
    metric              higher is better
    teacher_cost        of the teacher's training and of writing its traces, in the unit of ``against``

    Raises StudyError without a shared seed, and where a distilled student never comes to its seed's level.
    """
    seeds = sorted(set(direct) & set(distilled))
    if not seeds:
        raise StudyError("break_even: the two arms share no seed")
    ends = {seed: measured(direct[seed], metric, against)[-1] for seed in seeds}
    reached = {seed: cost_at(measured(distilled[seed], metric, against), ends[seed][1]) for seed in seeds}
    for seed, cost in reached.items():
        if cost is None:
            raise StudyError(f"break_even: with seed {seed} the distilled student never comes to {ends[seed][1]:.3g}")
    direct_S = np.array([ends[seed][0] for seed in seeds])
    distilled_S = np.array([reached[seed] for seed in seeds], dtype=float)
    saved_S = direct_S - distilled_S
    weights_DS = unbiased_weights(seed_weights(len(seeds)))
    saved_D = weights_DS @ saved_S
    low_D, high_D = ratio_draws(np.full_like(saved_D, teacher_cost), saved_D)
    df = effective_df(len(seeds), saved_D, saved_D)
    low, high = percentile_interval(low_D, high_D, df, 0.95) if len(seeds) > 1 else (None, None)
    mean = float(saved_S.mean())
    return BreakEven(
        students=teacher_cost / mean if mean > 0 else None, low=low, high=high,
        direct=float(direct_S.mean()), distilled=float(distilled_S.mean()), n=len(seeds),
    )  # fmt: skip


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names that no other beats: name -> (score, higher is better; cost, lower is better)."""
    return {
        name
        for name, (score, cost) in points.items()
        if not any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in points.values())
    }


def measured(rows: Sequence[CurveRow], metric: str, against: str) -> list[tuple[float, float]]:
    """``points_of`` a run's curve. Raises StudyError where there are none."""
    found = points_of(rows, AGAINST[against], metric)
    if not found:
        raise StudyError(f"break_even: {metric} was never measured against {against}")
    return found


def cost_at(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The least cost at which a curve stands at ``level``, straight between measurements; None: it never does.

    One that begins at the level or above was there at its first measurement, or before: that cost is an upper bound.
    """
    before: tuple[float, float] | None = None
    for cost, value in points:
        if value >= level:
            if before is None or value == before[1]:
                return cost
            share = (level - before[1]) / (value - before[1])
            return before[0] + share * (cost - before[0])
        before = cost, value
    return None
