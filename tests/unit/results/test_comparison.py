"""Every kind of comparison on made-up runs, against hand values, and the rule for the verdict."""

import dataclasses

import numpy as np
import pytest

from research.results.comparison import MINIMUM_SEEDS, Comparison, compare, verdict_for
from research.results.comparison_spec import OPERANDS, ComparisonSpec, OperandSpec
from research.results.fields import StudyError
from research.results.items import StudyItems
from research.results.panel import Panel
from research.results.readme import sentence_for
from research.results.statistics import smallest_p
from research.results.study import Cell

METRIC = "test/errors"


def _cells(levels: dict[str, list[dict[str, str]]], n: int) -> list[Cell]:
    made = []
    for arm, combinations in levels.items():
        for factors in combinations:
            inner = ",".join(f"{key}={value}" for key, value in sorted(factors.items()))
            for seed in range(n):
                key = "/".join(part for part in (arm, inner, f"seed={seed}") if part)
                made.append(Cell(arm, factors, seed, (), key))
    return made


def _panel(values: dict[str, list[float]], **requirements: float) -> Panel:
    n = len(next(iter(values.values())))
    cells = _cells({arm: [{}] for arm in values}, n)
    records = {cell.key: {"metrics": {METRIC: values[cell.arm][cell.seed]}} for cell in cells}
    records |= {f"requires/{name}": {"metrics": {METRIC: value}} for name, value in requirements.items()}
    return Panel(cells, records)


def _spec(kind: str, lower: bool = True, **operands: OperandSpec | float | str) -> ComparisonSpec:
    pairs = []
    for role in OPERANDS[kind]:
        given = operands.pop(role)
        given = OperandSpec(arm=given) if isinstance(given, str) else given
        pairs.append((role, OperandSpec(value=given) if isinstance(given, float) else given))
    threshold = 1.0 if kind in ("ratio", "gain_ratio") else 0.0
    spec = ComparisonSpec(kind, METRIC, lower, tuple(pairs), threshold)  # type: ignore[arg-type]
    return dataclasses.replace(spec, **operands)  # type: ignore[arg-type]


HARD = [150.0, 148.0, 155.0, 149.0, 152.0, 147.0]
SOFT = [95.0, 99.0, 97.0, 90.0, 101.0, 96.0]


@pytest.mark.parametrize(("lower", "sign"), [(True, 1), (False, -1)])
def test_difference_is_positive_where_the_treatment_is_better(lower: bool, sign: int) -> None:
    result = compare(
        _spec("difference", lower, baseline="hard", treatment="soft"), _panel({"hard": HARD, "soft": SOFT})
    )
    d = np.subtract(HARD, SOFT)
    half = 2.5706 * d.std(ddof=1) / np.sqrt(6)
    assert result.estimate == pytest.approx(sign * d.mean())
    assert (result.n, result.p_value, result.smallest_p) == (6, pytest.approx(2 / 64), pytest.approx(2 / 64))
    assert result.high - result.low == pytest.approx(2 * half, rel=0.15)
    assert result.low < sign * d.mean() < result.high
    assert result.unit == "errors" and "seeds only" in result.test


GAINS = {  # errors by (arm, terms), one for each of six seeds
    ("answer", "2"): [20.0, 22.0, 19.0, 21.0, 23.0, 20.0],
    ("chain", "2"): [10.0, 11.0, 12.0, 10.0, 11.0, 9.0],
    ("answer", "8"): [700.0, 705.0, 690.0, 710.0, 702.0, 695.0],
    ("chain", "8"): [40.0, 60.0, 30.0, 55.0, 45.0, 35.0],
}


def _interaction(lower: bool = True, **changes: object) -> tuple[ComparisonSpec, Panel]:
    cells = _cells({arm: [{"terms": "2"}, {"terms": "4"}, {"terms": "8"}] for arm in ("answer", "chain")}, 6)
    values = {cell.key: GAINS.get((cell.arm, cell.factors["terms"]), [9e9] * 6)[cell.seed] for cell in cells}
    spec = _spec("interaction", lower, baseline="answer", treatment="chain", group="terms", low_group="2", **changes)
    panel = Panel(cells, {key: {"metrics": {METRIC: value}} for key, value in values.items()})
    return dataclasses.replace(spec, high_group="8"), panel


@pytest.mark.parametrize(("lower", "sign"), [(True, 1), (False, -1)])
def test_an_interaction_is_the_difference_of_two_differences_seed_by_seed(lower: bool, sign: int) -> None:
    gains = [np.subtract(GAINS["answer", terms], GAINS["chain", terms]) for terms in ("2", "8")]
    d = sign * (gains[1] - gains[0])
    result = compare(*_interaction(lower))
    assert result.estimate == pytest.approx(d.mean()) and result.n == 6
    assert result.p_value == result.smallest_p == pytest.approx(2 / 64)
    half = 2.5706 * d.std(ddof=1) / np.sqrt(6)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.2) and result.low < d.mean() < result.high
    verdict = verdict_for("interaction", low=result.low, high=result.high, p_value=result.p_value, n=6)[0]
    assert verdict == ("HOLDS" if lower else "FAILS")
    beyond = compare(*_interaction(lower, threshold=float(d.mean())))
    assert beyond.p_value > 0.4, "the test asks for more than the threshold"
    assert verdict_for("interaction", low=1.0, high=2.0, p_value=1 / 32, n=5)[0] == "INCONCLUSIVE"


def test_an_interaction_is_told_in_words() -> None:
    spec, panel = _interaction()
    told = sentence_for(spec, compare(spec, panel), "HOLDS", "")
    assert told.startswith("in errors, chain is better than answer by 645.8 more at terms 8 than at terms 2 (95 %")


def test_a_difference_of_two_metrics_names_both_and_not_the_studys() -> None:
    alone, two = OperandSpec("no_think_alone", metric="test/errors"), OperandSpec("two", metric="test_no_think/errors")
    spec = dataclasses.replace(_spec("difference", baseline=alone, treatment=two), metric="test/obedience")
    found = Comparison(19.0, 10.0, 28.0, 0.03, "sign flip", 6, 1 / 32, "errors", ())
    told = sentence_for(spec, found, "HOLDS", "")
    assert told.startswith("errors of two (test_no_think/errors) 19 below no_think_alone (test/errors) (95 %")
    of_one = dataclasses.replace(_spec("difference", baseline="hard", treatment="soft"), metric="test/errors")
    assert sentence_for(of_one, found, "HOLDS", "").startswith("errors of soft 19 below hard (95 %")


@pytest.mark.parametrize(
    ("kind", "estimate", "told"),
    [
        ("difference", 3.0, "errors of soft 3 below hard (95 % interval -1 to 7)"),
        ("difference", -3.0, "errors of soft 3 above hard (95 % interval -1 to 7)"),
        ("equivalence", -3.0, "errors of soft 3 above hard (90 % interval -1 to 7)"),
    ],
)
def test_the_interval_is_of_the_size_that_is_told(kind: str, estimate: float, told: str) -> None:
    """An interval of the signed estimate, beside its size alone, would not hold it."""
    low, high = (-1.0, 7.0) if estimate > 0 else (-7.0, 1.0)
    found = Comparison(estimate, low, high, 0.03, "sign flip", 6, 1 / 32, "errors", ())
    assert sentence_for(_spec(kind, baseline="hard", treatment="soft"), found, "HOLDS", "").startswith(told)


def test_a_share_names_the_metric_that_is_not_its_own() -> None:
    spec = _spec("share", worst="single", treated="student", best=OperandSpec("student", metric="test/teacher_errors"))
    found = Comparison(0.5, 0.4, 0.6, 0.03, "sign flip", 6, 1 / 64, "share", ())
    told = sentence_for(spec, found, "HOLDS", "")
    assert told.startswith("student closes 50% of the gap in errors from single to student (test/teacher_errors) (95 %")


def test_an_interaction_that_lacks_a_run_names_it() -> None:
    spec, panel = _interaction()
    records = {key: record for key, record in panel.records.items() if key != "chain/terms=8/seed=3"}
    result = compare(spec, Panel(panel.cells, records))
    assert result.n == 5 and result.missing == ("chain/terms=8/seed=3",)


def test_share_of_the_gap_with_a_requirement_a_number_and_an_arm() -> None:
    panel = _panel({"hard": HARD, "soft": SOFT, "best": [67.0] * 6}, teacher=67.0)
    expected = (np.mean(HARD) - np.mean(SOFT)) / (np.mean(HARD) - 67)
    for best in (OperandSpec(requirement="teacher"), 67.0, "best"):
        result = compare(_spec("share", worst="hard", treated="soft", best=best), panel)
        assert result.estimate == pytest.approx(expected)
        assert result.low < expected < result.high
        assert result.p_value == pytest.approx(1 / 64)
    rising = compare(_spec("share", False, worst=0.0, treated="soft", best="hard"), panel)
    assert rising.estimate == pytest.approx(np.mean(SOFT) / np.mean(HARD))


def test_share_of_a_gap_that_is_not_there_has_no_interval() -> None:
    noisy = _panel({"hard": [10.0, 8.0, 12.0, 9.0, 11.0], "soft": [9.0] * 5, "best": [11.0, 9.0, 10.0, 10.0, 9.5]})
    result = compare(_spec("share", worst="hard", treated="soft", best="best"), noisy)
    assert (result.low, result.high) == (None, None)
    assert verdict_for("share", low=None, high=None, p_value=result.p_value, n=5)[0] == "INCONCLUSIVE"
    reverse = compare(_spec("share", worst="best", treated="soft", best="hard"), noisy)
    assert reverse.estimate is None


@pytest.mark.parametrize("lower", [True, False])
def test_gain_ratio_is_what_one_gained_over_what_the_other_did(lower: bool) -> None:
    """By hand: from 100 errors to 40 and to 85 is four times the gain; the same of accuracies, which rise."""
    errors = {"start": [100.0, 102, 98, 101, 99], "grpo": [85.0, 88, 82, 86, 84], "kl": [40.0, 42, 38, 41, 39]}
    panel = _panel({arm: values if lower else [-v for v in values] for arm, values in errors.items()})
    spec = _spec("gain_ratio", lower, start="start", baseline="grpo", treatment="kl", threshold=3.0)
    result = compare(spec, panel)
    assert result.estimate == pytest.approx(4.0) and 3.0 < result.low < 4.0 < result.high
    assert result.p_value == pytest.approx(1 / 32) and result.unit == "ratio of gains in errors"
    told = sentence_for(spec, result, "HOLDS", "")
    assert told.startswith("the gain of kl over start in errors is 4 times that of grpo (95 % interval ")
    assert compare(dataclasses.replace(spec, threshold=4.5), panel).p_value > 0.5
    inverse = compare(_spec("share", lower, worst="start", treated="grpo", best="kl"), panel)
    assert result.estimate == pytest.approx(1 / inverse.estimate)
    fallen = compare(_spec("gain_ratio", lower, start="kl", baseline="grpo", treatment="start"), panel)
    assert fallen.estimate is None, "there is no ratio to a gain that is none"


def test_ratio_and_its_threshold() -> None:
    panel = _panel({"before": [206.0, 200.0, 210.0, 190.0, 220.0], "after": [99.0, 90.0, 95.0, 91.0, 97.0]})
    spec = _spec("ratio", before="before", after="after", threshold=2.0)
    result = compare(spec, panel)
    assert result.estimate == pytest.approx(1026 / 472)
    assert result.p_value == pytest.approx(1 / 32)
    assert 2.0 < result.low < result.estimate < result.high
    tighter = dataclasses.replace(spec, threshold=2.2)
    assert compare(tighter, panel).p_value > 0.5


def test_equivalence_reports_a_90_percent_interval_and_two_one_sided_p() -> None:
    panel = _panel({"a": HARD, "b": [149.0, 149.0, 153.0, 150.0, 152.0, 148.0]})
    result = compare(_spec("equivalence", baseline="a", treatment="b", margin=10.0), panel)
    assert result.estimate == pytest.approx(0.0)
    assert -10 < result.low < 0 < result.high < 10
    assert result.p_value == pytest.approx(1 / 64) and "90%" in result.test
    narrow = compare(_spec("equivalence", baseline="a", treatment="b", margin=0.5), panel)
    assert narrow.p_value > 0.05


def test_trend_is_the_mean_of_the_slopes_per_seed() -> None:
    levels = ["1", "2", "8"]
    cells = _cells({"soft": [{"width": label} for label in levels]}, 5)
    rng = np.random.default_rng(0)
    values = {cell.key: 3 * np.log2(float(cell.factors["width"])) + rng.normal(0, 0.1) for cell in cells}
    panel = Panel(cells, {key: {"metrics": {METRIC: value}} for key, value in values.items()})
    spec = _spec("trend", arm="soft", factor="width", scale="log2")
    slopes = [np.polyfit([0, 1, 3], [values[f"soft/width={x}/seed={s}"] for x in levels], 1)[0] for s in range(5)]
    result = compare(spec, panel)
    assert result.estimate == pytest.approx(np.mean(slopes))
    assert result.low < np.mean(slopes) < result.high and result.p_value == pytest.approx(1 / 32)
    falls = compare(dataclasses.replace(spec, expected="falls"), panel)
    assert falls.estimate == pytest.approx(-np.mean(slopes)) and falls.p_value == 1.0


def _best_level_panel(best: dict[str, str], noise: float, n: int = 5) -> tuple[ComparisonSpec, Panel]:
    levels = ["1", "2.5", "8", "20"]
    cells = _cells({"soft": [{"width": w, "temperature": t} for w in best for t in levels]}, n)
    rng = np.random.default_rng(2)
    records = {}
    for cell in cells:
        far = abs(levels.index(cell.factors["temperature"]) - levels.index(best[cell.factors["width"]]))
        records[cell.key] = {"metrics": {METRIC: 100 + 10 * far + noise * rng.normal()}}
    spec = _spec("best_level", arm="soft", factor="temperature", group="width", low_group="30", high_group="300")
    return spec, Panel(cells, records)


def test_best_level_orders_the_best_levels_over_seed_bootstraps() -> None:
    spec, panel = _best_level_panel({"30": "2.5", "300": "20"}, noise=0.1)
    result = compare(spec, panel)
    assert (result.estimate, result.low, result.high, result.p_value) == (17.5, 17.5, 17.5, 0.0)
    spec, panel = _best_level_panel({"30": "8", "300": "8"}, noise=0.0)
    tied = compare(spec, panel)
    assert (tied.estimate, tied.p_value) == (0.0, 1.0)
    assert verdict_for("best_level", low=0, high=0, p_value=1.0, n=5)[0] == "FAILS"
    spec, panel = _best_level_panel({"30": "8", "300": "8"}, noise=30.0)
    assert 0.0 < compare(spec, panel).p_value <= 1.0


def test_best_level_share_agrees_with_a_loop_over_all_resamples() -> None:
    spec, panel = _best_level_panel({"30": "2.5", "300": "8"}, noise=12.0, n=4)
    levels, contradicted = ["1", "2.5", "8", "20"], 0
    table = {w: np.array([list(panel.values("soft", {"width": w, "temperature": t}, METRIC).values()) for t in levels])
             for w in ("30", "300")}  # fmt: skip
    picks = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    for pick in picks:
        best = {w: float(levels[int(values[:, pick].mean(axis=1).argmin())]) for w, values in table.items()}
        contradicted += best["30"] >= best["300"]
    assert compare(spec, panel).p_value == pytest.approx(contradicted / len(picks), abs=0.02)


def _with_items(n: int) -> Panel:
    """Two arms on 1,000 items: 60 wrong, and 20 of those 60, the same items for every seed."""
    cells = _cells({"hard": [{}], "soft": [{}]}, n)
    label, predictions = np.zeros(1000, np.uint8), {}
    for cell in cells:
        wrong = np.zeros(1000, np.uint8)
        order = np.random.default_rng(0).permutation(1000)[: 60 if cell.arm == "hard" else 20]
        wrong[order] = 1
        predictions[cell.key] = wrong
    items = StudyItems("test", np.arange(1000), label, predictions)
    return Panel(cells, {key: {"metrics": {METRIC: float(column.sum())}} for key, column in predictions.items()}, items)


def test_items_are_resampled_together_for_both_arms() -> None:
    result = compare(_spec("difference", baseline="hard", treatment="soft"), _with_items(6))
    # no seed noise at all: what is left is drawing 40 discordant items among 1,000, sd sqrt(40 x .96) = 6.2
    assert result.estimate == 40.0 and "seeds and items" in result.test
    assert (result.low, result.high) == (
        pytest.approx(40 - 1.96 * 6.2, abs=1.0),
        pytest.approx(40 + 1.96 * 6.2, abs=1.0),
    )


def test_a_metric_that_items_cannot_give_falls_back_to_seeds() -> None:
    panel = _with_items(6)
    for key, record in panel.records.items():
        record["metrics"]["test/nll"] = 2.0 if key.startswith("hard") else 1.0  # type: ignore[index]
    spec = dataclasses.replace(_spec("difference", baseline="hard", treatment="soft"), metric="test/nll")
    result = compare(spec, panel)
    assert "seeds only" in result.test and (result.low, result.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_items_that_contradict_the_record_are_refused() -> None:
    panel = _with_items(6)
    panel.records["soft/seed=3"]["metrics"][METRIC] = 21.0  # type: ignore[index]
    with pytest.raises(StudyError, match=r"soft/seed=3.*21.*20"):
        compare(_spec("difference", baseline="hard", treatment="soft"), panel)


def test_accuracy_is_rebuilt_from_items_too() -> None:
    panel = _with_items(6)
    for record in panel.records.values():
        record["metrics"]["test/accuracy"] = 1 - record["metrics"][METRIC] / 1000
    spec = dataclasses.replace(_spec("difference", False, baseline="hard", treatment="soft"), metric="test/accuracy")
    result = compare(spec, panel)
    assert result.estimate == pytest.approx(0.04) and "seeds and items" in result.test
    assert result.low == pytest.approx((40 - 1.96 * 6.2) / 1000, abs=1e-3)


def test_open_factors_are_averaged_seed_by_seed() -> None:
    cells = _cells({"hard": [{}], "soft": [{"digit": "3"}, {"digit": "7"}]}, 5)
    records = {c.key: {"metrics": {METRIC: 10.0 + c.seed + 2 * (c.factors.get("digit") == "7")}} for c in cells}
    result = compare(_spec("difference", baseline="hard", treatment="soft"), Panel(cells, records))
    assert result.estimate == pytest.approx(-1.0)
    fixed = OperandSpec(arm="soft", where=(("digit", "7"),))
    result = compare(_spec("difference", baseline="hard", treatment=fixed), Panel(cells, records))
    assert result.estimate == pytest.approx(-2.0)


def test_a_missing_run_is_reported_and_its_seed_left_out_of_both_arms() -> None:
    panel = _panel({"hard": [*HARD, 400.0], "soft": [*SOFT, 1.0]})
    del panel.records["soft/seed=6"]  # type: ignore[attr-defined]
    result = compare(_spec("difference", baseline="hard", treatment="soft"), panel)
    assert (result.n, result.missing) == (6, ("soft/seed=6",))
    assert result.estimate == pytest.approx(np.mean(HARD) - np.mean(SOFT))
    panel.records.clear()  # type: ignore[attr-defined]
    nothing = compare(_spec("difference", baseline="hard", treatment="soft"), panel)
    assert (nothing.n, nothing.estimate, len(nothing.missing)) == (0, None, 14)


def test_a_metric_that_is_absent_or_not_finite_is_named() -> None:
    panel = _panel({"hard": HARD, "soft": [*SOFT[:5], float("nan")]})
    with pytest.raises(StudyError, match=r"soft/seed=5.*nan"):
        compare(_spec("difference", baseline="hard", treatment="soft"), panel)
    spec = dataclasses.replace(_spec("difference", baseline="hard", treatment="hard"), metric="test/eror")
    with pytest.raises(StudyError, match=r"'test/eror'; did you mean 'test/errors'"):
        compare(spec, panel)


@pytest.mark.parametrize(
    ("kind", "low", "high", "p_value", "expected"),
    [
        ("difference", 3.0, 9.0, 0.031, "HOLDS"),
        ("difference", 3.0, 9.0, 0.06, "INCONCLUSIVE"),
        ("difference", -1.0, 9.0, 0.04, "INCONCLUSIVE"),
        ("difference", -9.0, -1.0, 0.03, "FAILS"),
        ("difference", -9.0, 0.0, 0.3, "FAILS"),
        ("difference", None, None, 0.03, "INCONCLUSIVE"),
        ("share", 0.2, 0.9, 0.01, "HOLDS"),
        ("share", -0.9, -0.1, 1.0, "FAILS"),
        ("ratio", 1.01, 3.0, 0.01, "HOLDS"),
        ("ratio", 0.9, 3.0, 0.01, "INCONCLUSIVE"),
        ("ratio", 0.5, 0.9, 0.9, "FAILS"),
        ("gain_ratio", 1.2, 9.0, 0.01, "HOLDS"),
        ("gain_ratio", 0.8, 9.0, 0.01, "INCONCLUSIVE"),
        ("gain_ratio", 0.2, 0.9, 0.9, "FAILS"),
        ("equivalence", -4.0, 9.9, 0.01, "HOLDS"),
        ("equivalence", -4.0, 10.0, 0.01, "INCONCLUSIVE"),
        ("equivalence", 11.0, 14.0, 0.9, "FAILS"),
        ("equivalence", -14.0, -11.0, 0.9, "FAILS"),
        ("trend", 0.1, 0.4, 0.01, "HOLDS"),
        ("best_level", 1.0, 5.0, 0.05, "HOLDS"),
        ("best_level", 0.0, 5.0, 0.06, "INCONCLUSIVE"),
        ("best_level", 0.0, 0.0, 0.95, "FAILS"),
    ],
)
def test_verdicts(kind: str, low: float | None, high: float | None, p_value: float, expected: str) -> None:
    threshold = 1.0 if kind in ("ratio", "gain_ratio") else 0.0
    margin = 10.0 if kind == "equivalence" else None
    given = {"low": low, "high": high, "p_value": p_value, "threshold": threshold, "margin": margin}
    verdict, reason = verdict_for(kind, n=6, **given)  # type: ignore[arg-type]
    assert verdict == expected
    assert bool(reason) == (verdict == "INCONCLUSIVE")
    assert verdict_for(kind, n=6, missing=1, **given)[0] == "INCONCLUSIVE"  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", OPERANDS)
def test_p121_too_few_seeds_can_only_be_inconclusive(kind: str) -> None:
    """Whatever the numbers: a claim that looks won and one that looks lost."""
    for n in range(MINIMUM_SEEDS[kind]):
        for low, high, p_value in ((5.0, 6.0, 1e-9), (-6.0, -5.0, 1.0), (-0.1, 0.1, 0.0)):
            verdict, reason = verdict_for(kind, low=low, high=high, p_value=p_value, n=n, margin=1.0)
            assert verdict == "INCONCLUSIVE" and str(MINIMUM_SEEDS[kind]) in reason


def test_p121_minimum_seeds_are_the_least_whose_test_can_reach_05() -> None:
    assert smallest_p(MINIMUM_SEEDS["difference"]) < 0.05 <= smallest_p(MINIMUM_SEEDS["difference"] - 1)
    for kind in ("share", "gain_ratio", "ratio", "equivalence", "trend"):
        assert smallest_p(MINIMUM_SEEDS[kind], False) < 0.05 <= smallest_p(MINIMUM_SEEDS[kind] - 1, False)


def test_p121_five_wins_of_five_are_inconclusive() -> None:
    result = compare(
        _spec("difference", baseline="hard", treatment="soft"), _panel({"hard": HARD[:5], "soft": SOFT[:5]})
    )
    assert (result.n, result.p_value, result.smallest_p) == (5, 0.0625, 0.0625) and result.low > 0
    verdict, reason = verdict_for("difference", low=result.low, high=result.high, p_value=result.p_value, n=result.n)
    assert verdict == "INCONCLUSIVE" and "5 given" in reason


def test_verdict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'anova'"):
        verdict_for("anova", low=1, high=2, p_value=0.01, n=9)
    with pytest.raises(ValueError, match="margin"):
        verdict_for("equivalence", low=1, high=2, p_value=0.01, n=9)
