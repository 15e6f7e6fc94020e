"""The comparisons a study may declare, and the rule that turns one into HOLDS, FAILS or INCONCLUSIVE.

With fewer seeds than MINIMUM_SEEDS only INCONCLUSIVE can come out. A difference is a head-to-head of two arms in which
either sign would be news, and so is an interaction, the difference of two such differences: their sign-flip test is
two-sided and cannot go below 2/2**n. Five wins of five are p = .0625, and six seeds are the least that can reach .05.
The other kinds fix their side, threshold or margin in the study file before the runs; their test is one-sided, cannot
go below 1/2**n, and five seeds (.031) are the least. Below that, an interval rests on at most 35 distinct resamples of
the seeds, too few to place a 2.5 % tail.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from research.results.bootstrap import effective_df, percentile_interval, ratio_draws, unbiased_weights
from research.results.comparison_spec import OPERANDS, ComparisonSpec, OperandSpec, number_of
from research.results.panel import Operand, Panel
from research.results.statistics import sign_flip_p, smallest_p

HOLDS, FAILS, INCONCLUSIVE = "HOLDS", "FAILS", "INCONCLUSIVE"
LEVEL = 0.05
TWO_SIDED = ("difference", "interaction")
ONE_SIDED = ("share", "gain_ratio", "ratio", "equivalence", "best_level", "trend")
MINIMUM_SEEDS = dict.fromkeys(TWO_SIDED, 6) | dict.fromkeys(ONE_SIDED, 5)


@dataclass(frozen=True)
class Comparison:
    """The outcome of one comparison.

    estimate, low, high   in ``unit``; 95 % interval (90 % for equivalence); None where it does not exist
    p_value               of the test named in ``test``; ``smallest_p`` is the least that ``n`` paired seeds can give
    missing               declared runs of the compared arms that did not complete
    """

    estimate: float | None
    low: float | None
    high: float | None
    p_value: float | None
    test: str
    n: int
    smallest_p: float | None
    unit: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Reading:
    """What a kind reads from its operands: the point, bootstrap draws for both ends, and one contrast per seed whose
    centre is 0 on the border of the claim."""

    estimate: float | None
    low_D: np.ndarray
    high_D: np.ndarray
    contrast_S: np.ndarray


def level_of(kind: str) -> float:
    """The level of a kind's interval: the two one-sided tests of an equivalence, at 5 % each, make one of 90 %."""
    return 0.90 if kind == "equivalence" else 0.95


def verdict_for(
    kind: str,
    *,
    low: float | None,
    high: float | None,
    p_value: float | None,
    n: int,
    threshold: float = 0.0,
    margin: float | None = None,
    missing: int = 0,
) -> tuple[str, str]:
    """The verdict and, where it is INCONCLUSIVE, the reason (else an empty text).

    HOLDS: the interval lies on the claimed side of ``threshold`` (inside +-``margin`` for equivalence) and, for a
    difference or an interaction, p < .05; ``best_level``: at most 5 % of the seed bootstraps contradict the order.
    FAILS: it lies wholly on the other side (outside the margin). INCONCLUSIVE: anything else, and always

    * with fewer seeds than MINIMUM_SEEDS, whatever the numbers (the argument is in the module's docstring);
    * where a compared run is missing: a run that failed may have failed because of its arm, and a study read before
      its end could be stopped at a lucky moment.
    """
    if kind not in OPERANDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(OPERANDS)}")
    if missing:
        return INCONCLUSIVE, f"{missing} of the compared runs did not complete"
    if n < MINIMUM_SEEDS[kind]:
        return INCONCLUSIVE, f"{kind.replace('_', ' ')} needs at least {MINIMUM_SEEDS[kind]} paired seeds, {n} given"
    if kind == "best_level":
        return _verdict_of_share(p_value)
    if low is None or high is None:
        return INCONCLUSIVE, "the interval has no finite end"
    if kind == "equivalence":
        if margin is None or margin <= 0:
            raise ValueError(f"margin is {margin}; an equivalence needs one above 0")
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
    else:
        inside, outside = low > threshold, high <= threshold
    if outside:
        return FAILS, ""
    if not inside:
        return INCONCLUSIVE, "the interval does not settle it"
    if kind in TWO_SIDED and (p_value is None or p_value >= LEVEL):
        return INCONCLUSIVE, "p is not below .05"
    return HOLDS, ""


def _verdict_of_share(p_value: float | None) -> tuple[str, str]:
    if p_value is None:
        return INCONCLUSIVE, "no bootstrap share"
    if p_value <= LEVEL:
        return HOLDS, ""
    return (
        (FAILS, "")
        if p_value >= 1 - LEVEL
        else (INCONCLUSIVE, "the order of the best levels changes between resamples")
    )


def compare(spec: ComparisonSpec, panel: Panel) -> Comparison:
    """The declared comparison over the panel's runs; an empty one (all None, n = 0) where no seed is complete."""
    if spec.kind == "best_level":
        return _best_level(spec, panel)
    specs = _operand_specs(spec, panel)
    operands, n, missing = panel.operands(specs, spec.metric)
    unit = _unit(spec)
    if not n:
        return Comparison(None, None, None, None, "no complete seed", 0, None, unit, tuple(missing))
    use_items = all(operand.resampled_DS is not None for operand in operands)
    confidence = level_of(spec.kind)
    reading, low, high = _interval(spec, operands, panel.weights(n), use_items, confidence)
    p_value, two_sided = _p_value(spec, reading.contrast_S), spec.kind in TWO_SIDED
    sides = "two-sided" if two_sided else "one-sided" if spec.kind != "equivalence" else "two one-sided"
    scope = "seeds and items" if use_items else "seeds only"
    test = f"sign-flip over {n} paired seeds, {sides}; {confidence:.0%} interval from a paired bootstrap over {scope}"
    return Comparison(reading.estimate, low, high, p_value, test, n, smallest_p(n, two_sided), unit, tuple(missing))


def _interval(
    spec: ComparisonSpec, operands: list[Operand], weights_DS: np.ndarray, use_items: bool, confidence: float
) -> tuple[_Reading, float | None, float | None]:
    read, n = _READERS[spec.kind], weights_DS.shape[1]
    weights_DS = unbiased_weights(weights_DS)
    by_seed = read(spec, operands, [operand.draws(weights_DS, use_items=False) for operand in operands])
    if n < 2:
        return by_seed, None, None
    reading = (
        read(spec, operands, [operand.draws(weights_DS, use_items) for operand in operands]) if use_items else by_seed
    )
    df = effective_df(n, by_seed.low_D, reading.low_D)
    return reading, *percentile_interval(reading.low_D, reading.high_D, df, confidence)


def _p_value(spec: ComparisonSpec, contrast_S: np.ndarray) -> float:
    if spec.kind == "equivalence" and spec.margin is not None:
        return max(sign_flip_p(spec.margin - contrast_S, False), sign_flip_p(spec.margin + contrast_S, False))
    return sign_flip_p(contrast_S, two_sided=spec.kind in TWO_SIDED)


def resampled_operands(specs: Iterable[ComparisonSpec], panel: Panel) -> list[OperandSpec]:
    """The operands whose items the comparisons will resample."""
    return [operand for spec in specs if spec.kind != "best_level" for operand in _operand_specs(spec, panel)]


def _operand_specs(spec: ComparisonSpec, panel: Panel) -> list[OperandSpec]:
    if spec.kind == "interaction":
        groups = (spec.low_group, spec.high_group)
        return [at_level(operand, {spec.group: group}) for group in groups for _, operand in spec.operands]
    if spec.kind != "trend":
        return [operand for _, operand in spec.operands]
    arm = spec.operand("arm")
    return [at_level(arm, {spec.factor: label}) for label in trend_levels(spec, panel)]


def at_level(arm: OperandSpec, levels: dict[str, str]) -> OperandSpec:
    """The same arm, fixed at further factor levels."""
    return OperandSpec(arm=arm.arm, metric=arm.metric, where=tuple(sorted((dict(arm.where) | levels).items())))


def trend_levels(spec: ComparisonSpec, panel: Panel) -> list[str]:
    """The level labels of the comparison's factor that the arm was run at, in rising order."""
    arm = spec.operand("arm")
    labels = {
        cell.factors[spec.factor] for cell in panel.select(str(arm.arm), dict(arm.where)) if spec.factor in cell.factors
    }
    return sorted(labels, key=lambda label: (number_of(label) is None, number_of(label) or 0.0, label))


def _unit(spec: ComparisonSpec) -> str:
    metric = spec.metric.partition("/")[2]
    per = f"{metric} per {'doubling of ' if spec.scale == 'log2' else ''}{spec.factor}"
    units = {"share": "share of the gap", "ratio": f"ratio of {metric}", "trend": per}
    return (units | {"gain_ratio": f"ratio of gains in {metric}"}).get(spec.kind, metric)


def _read_difference(spec: ComparisonSpec, operands: list[Operand], draws: list[np.ndarray]) -> _Reading:
    """baseline - treatment where lower is better, else treatment - baseline: above 0, the treatment is better."""
    sign = 1.0 if spec.lower_is_better else -1.0
    d_S, d_D = sign * (operands[0].values_S - operands[1].values_S), sign * (draws[0] - draws[1])
    border = spec.threshold if spec.kind == "difference" else 0.0
    return _Reading(float(d_S.mean()), d_D, d_D, d_S - border)


def _read_interaction(spec: ComparisonSpec, operands: list[Operand], draws: list[np.ndarray]) -> _Reading:
    """(baseline - treatment) at ``high_group`` minus the same at ``low_group``, of one seed each; sign as above."""
    sign = 1.0 if spec.lower_is_better else -1.0
    low_S, high_S = (operands[at].values_S - operands[at + 1].values_S for at in (0, 2))
    low_D, high_D = (draws[at] - draws[at + 1] for at in (0, 2))
    gain_S, gain_D = sign * (high_S - low_S), sign * (high_D - low_D)
    return _Reading(float(gain_S.mean()), gain_D, gain_D, gain_S - spec.threshold)


def _read_share(spec: ComparisonSpec, operands: list[Operand], draws: list[np.ndarray]) -> _Reading:
    """(worst - treated) / (worst - best), of the means; the test is on (worst - treated) - threshold (worst - best)."""
    sign = 1.0 if spec.lower_is_better else -1.0
    worst, treated, best = (sign * operand.values_S for operand in operands)
    worst_D, treated_D, best_D = (sign * column for column in draws)
    gap = float((worst - best).mean())
    low_D, high_D = ratio_draws(worst_D - treated_D, worst_D - best_D)
    contrast = (worst - treated) - spec.threshold * (worst - best)
    return _Reading(float((worst - treated).mean()) / gap if gap > 0 else None, low_D, high_D, contrast)


def _read_gain_ratio(spec: ComparisonSpec, operands: list[Operand], draws: list[np.ndarray]) -> _Reading:
    """(treatment - start) / (baseline - start), of the means; above 1 the treatment has gained more.

    Of arms that spent equal budgets it is the ratio of what they gained per FLOP. It is a share of the baseline's gain,
    which may be more than all of it.
    """
    start, baseline, treatment = zip(operands, draws, strict=True)
    ordered = (start, treatment, baseline)
    return _read_share(spec, [operand for operand, _ in ordered], [draw for _, draw in ordered])


def _read_ratio(spec: ComparisonSpec, operands: list[Operand], draws: list[np.ndarray]) -> _Reading:
    """before / after, of the means; the test asks for before - threshold x after > 0."""
    before, after = operands
    low_D, high_D = ratio_draws(draws[0], draws[1])
    estimate = before.mean / after.mean if after.mean > 0 else None
    return _Reading(estimate, low_D, high_D, before.values_S - spec.threshold * after.values_S)


def _read_trend(spec: ComparisonSpec, operands: list[Operand], draws: list[np.ndarray]) -> _Reading:
    """Least-squares slope of the metric over the level (or its log2), times -1 where the claim is that it falls."""
    level = np.array([float(dict(operand.where)[spec.factor]) for operand in operands])
    level = np.log2(level) if spec.scale == "log2" else level
    coefficient = (level - level.mean()) / ((level - level.mean()) ** 2).sum()
    coefficient = coefficient if spec.expected == "rises" else -coefficient
    slope_S = coefficient @ np.stack([operand.values_S for operand in operands])
    slope_D = coefficient @ np.stack(draws)
    return _Reading(float(slope_S.mean()), slope_D, slope_D, slope_S)


_READERS: dict[str, Callable[[ComparisonSpec, list[Operand], list[np.ndarray]], _Reading]] = {
    "difference": _read_difference,
    "equivalence": _read_difference,
    "interaction": _read_interaction,
    "share": _read_share,
    "gain_ratio": _read_gain_ratio,
    "ratio": _read_ratio,
    "trend": _read_trend,
}


def _best_level(spec: ComparisonSpec, panel: Panel) -> Comparison:
    """Best level at ``high_group`` minus best level at ``low_group``, in the factor's units, resampling seeds alone.

    p is the share of resamples in which the best level at ``low_group`` is *not* below that at ``high_group``. Ties
    between levels count against the claim: the largest tied level at ``low_group``, the smallest at ``high_group``.
    """
    arm, levels = spec.operand("arm"), trend_levels(spec, panel)
    groups = (spec.low_group, spec.high_group)
    specs = [at_level(arm, {spec.group: group, spec.factor: label}) for group in groups for label in levels]
    operands, n, missing = panel.operands(specs, spec.metric, with_items=False)
    unit = spec.factor
    if not n:
        return Comparison(None, None, None, None, "no complete seed", 0, None, unit, tuple(missing))
    number = np.array([value if (value := number_of(label)) is not None else rank for rank, label in enumerate(levels)])
    sign = 1.0 if spec.lower_is_better else -1.0
    values_GLS = sign * np.stack([operand.values_S for operand in operands]).reshape(2, len(levels), n)
    estimate = float(_best_gap(values_GLS.mean(axis=-1)[..., None], number)[0])
    gap_D = _best_gap(values_GLS @ panel.weights(n).T, number)
    low, high = (float(np.quantile(gap_D, level, method="nearest")) for level in (0.025, 0.975))
    test = f"share of seed bootstraps ({n} paired seeds) in which the order does not hold"
    return Comparison(estimate, low, high, float(np.mean(gap_D <= 0)), test, n, None, unit, tuple(missing))


def _best_gap(values_GLD: np.ndarray, number_L: np.ndarray) -> np.ndarray:
    """Per draw: smallest best level of group 1 minus largest best level of group 0 (lower values are better)."""
    best_GLD = np.isclose(values_GLD, values_GLD.min(axis=1, keepdims=True), rtol=1e-12, atol=1e-9)
    low = np.where(best_GLD[0], number_L[:, None], -np.inf).max(axis=0)
    high = np.where(best_GLD[1], number_L[:, None], np.inf).min(axis=0)
    return np.asarray(high - low)
