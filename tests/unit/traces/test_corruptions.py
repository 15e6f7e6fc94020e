"""Error channels, judged by the task's own step verifier: each leaves the fault it is named after, and no other."""

from collections import Counter
from dataclasses import replace

import pytest

from research.errors import ConfigError
from research.records import Problem, Trace, Verdict
from research.tasks.arithmetic import ChainedSums
from research.tasks.base import StepReport
from research.text.templates import Plain
from research.traces.candidates import Candidate
from research.traces.corruptions import CHANNELS, STEP_CHANNELS, TEXT_CHANNELS, Corruption, corrupt, read_sum
from research.traces.filters import FILTERS

TASKS = [
    ChainedSums(),
    ChainedSums(num_terms=3),
    ChainedSums(num_terms=4, highest=999),
    ChainedSums(verbose=True),
    ChainedSums(8, 9),
]


def trace_of(problem: Problem, sample: int = 0) -> Trace:
    return Trace(problem.text, problem.chain, problem.answer, problem.index, sample, {"origin": "reference"})


def spoilt(task: ChainedSums, channel: str, num: int = 200) -> list[tuple[Problem, Trace, StepReport, Verdict]]:
    """The traces that the channel changed, each with what the task's own verifiers say of it."""
    found = []
    for problem in task.problems("train", num):
        trace = Corruption({channel: 1.0}, seed=3).apply(trace_of(problem))
        report = task.verify_steps(problem, trace.chain)
        assert report is not None and trace.details["origin"] == "reference"
        if trace.details["corruption"] == channel:
            found.append((problem, trace, report, task.verify(problem, trace.answer)))
        else:
            assert trace.details["corruption"] == "none" and report.valid and trace.chain == problem.chain
    return found


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_wrong_step_makes_one_invalid_step_and_a_wrong_answer(task: ChainedSums) -> None:
    found = spoilt(task, "wrong_step")
    assert len(found) == 200
    for problem, trace, report, verdict in found:
        assert verdict is Verdict.WRONG and report.num_steps - report.num_valid == 1 and not report.skipped
        assert report.result == trace.answer != problem.answer, "the answer is what the wrong chain gives"
    assert {report.first_wrong for _, _, report, _ in found} == set(range(task.num_terms - 1)), "at any step"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_compensating_pair_makes_two_invalid_steps_and_the_right_answer(task: ChainedSums) -> None:
    found = spoilt(task, "compensating_pair")
    assert len(found) == 200
    for problem, trace, report, verdict in found:
        assert verdict is Verdict.CORRECT and trace.answer == problem.answer == report.result
        assert report.num_steps - report.num_valid == 2 and not report.skipped and not report.valid
    assert {report.first_wrong for _, _, report, _ in found} == set(range(task.num_terms - 2))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_skipped_step_leaves_no_wrong_one(task: ChainedSums) -> None:
    found = spoilt(task, "skipped_step")
    assert len(found) > 190  # but for sums of which every term that could be jumped is 0
    for _, _, report, verdict in found:
        assert verdict is Verdict.CORRECT and report.skipped and not report.valid
        assert report.num_steps == task.num_terms - 2
        if not task.verbose:  # a step that jumps shows columns of another step there, which is wrong besides
            assert report.first_wrong is None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_lucky_guess_breaks_the_chain_and_hits_the_answer(task: ChainedSums) -> None:
    found = spoilt(task, "lucky_guess")
    assert len(found) == 200
    for problem, trace, report, verdict in found:
        assert verdict is Verdict.CORRECT and trace.answer == problem.answer and not report.valid
        assert report.num_steps - report.num_valid >= 2, "the guess, and the step that hits the answer from it"


@pytest.mark.parametrize("task", TASKS[:4], ids=lambda task: task.name)
def test_a_lost_carry_is_repaired_in_the_next_step(task: ChainedSums) -> None:
    found = spoilt(task, "lost_carry")
    assert len(found) > 50
    for problem, trace, report, verdict in found:
        assert verdict is Verdict.CORRECT and not report.valid and not report.skipped
        right = [int(step.split(" ")[-1]) for step in problem.chain.split(";")]
        wrong = [int(step.split(" ")[-1]) for step in trace.chain.split(";")]
        assert {abs(before - after) for before, after in zip(right, wrong, strict=True)} == {0, 10}
        assert right[-1] == wrong[-1]


def test_totals_of_one_digit_have_no_carry_to_lose() -> None:
    assert spoilt(ChainedSums(8, 9), "lost_carry") == []


def test_a_lost_carry_by_hand() -> None:
    """17+35 = 52 loses its ten; 52-08 borrows and loses that; 44+11 has neither; 55+09 is last and left alone."""
    trace = Trace("17+35-08+11+09", "52;44;55;64", "64", 0)
    assert corrupt(trace, "lost_carry", lambda below: 0).chain == "42;54;55;64"


def test_a_compensating_pair_by_hand() -> None:
    trace = Trace("17+32+31-60-06", "49;80;20;14", "14", 0)
    draws = iter([1, 0])  # the pair of steps 0 and 2, the smallest shift
    changed = corrupt(trace, "compensating_pair", lambda below: next(draws))
    assert changed.chain == "00;31;20;14" and changed.answer == "14"


FILTER_OF = {
    "foreign_text": FILTERS["foreign_script"](),
    "code_block": FILTERS["code_blocks"](),
    "long_paragraph": FILTERS["long_paragraphs"](max_characters=90),
    "loop": FILTERS["repetition"](),
}


@pytest.mark.parametrize("channel", TEXT_CHANNELS)
def test_text_before_the_chain_is_what_one_filter_drops_and_no_other(channel: str) -> None:
    """The answer stays as it was, right or wrong, and the template reads it back."""
    task, template, texts = ChainedSums(8, 9), Plain(), set()
    assert set(FILTER_OF) == set(TEXT_CHANNELS) and set(CHANNELS) == {*STEP_CHANNELS, *TEXT_CHANNELS}
    for problem in task.problems("train", 40):
        given = replace(trace_of(problem), answer=problem.answer if problem.index % 2 else "x")
        trace = Corruption({channel: 1.0}, seed=3).apply(given)
        assert trace.details == {"origin": "reference", "corruption": channel} and trace.answer == given.answer
        text, _, chain = trace.chain.partition(";")
        assert chain == problem.chain and trace.index == problem.index
        parsed = template.parse(
            template.completion(trace.chain, trace.answer, "chain_then_answer"), "chain_then_answer"
        )
        assert (parsed.chain, parsed.answer) == (trace.chain, trace.answer)
        for name, judge in FILTER_OF.items():
            assert judge.keep(Candidate(trace, trace.chain)) == (name != channel)
            assert judge.keep(Candidate(given, given.chain)), "a chain without such text is kept"
        texts.add(text)
    assert texts == {text.strip() for text in TEXT_CHANNELS[channel]}
    empty = Trace("3+4", "", "7", 0)
    assert corrupt(empty, channel, lambda below: 0) == replace(empty, details={"corruption": "none"})


@pytest.mark.parametrize("channel", STEP_CHANNELS)
def test_what_offers_nothing_to_spoil_comes_back_as_it_was(channel: str) -> None:
    wrong = Trace("17+32", "50", "50", 0)
    prose = Trace("Tom has 3 apples and buys 4.", "3 + 4 = 7", "7", 0)
    for trace in (wrong, prose, Trace("17+32", "", "49", 0), Trace("", "", "", 0), Trace("17+32", "49", "x", 0)):
        assert read_sum(trace) is None
        assert corrupt(trace, channel, lambda below: 0) == replace(trace, details={"corruption": "none"})
    if channel != "wrong_step":
        single = Trace("17+32", "49", "49", 0)
        assert corrupt(single, channel, lambda below: 0).details["corruption"] == "none", "one step has no pair"


def test_rates_are_met_and_draws_are_of_each_trace_alone() -> None:
    problems = ChainedSums().problems("train", 2000)
    corruption = Corruption({"compensating_pair": 0.5, "wrong_step": 0.25}, seed=1)
    traces = [corruption.apply(trace_of(problem)) for problem in problems]
    shares = Counter(trace.details.get("corruption", "untouched") for trace in traces)
    # binomial, 2000 draws: five standard deviations are 0.056 and 0.048
    assert abs(shares["compensating_pair"] / 2000 - 0.5) < 0.056 and abs(shares["wrong_step"] / 2000 - 0.25) < 0.048
    assert [corruption.apply(trace_of(problem)) for problem in reversed(problems)] == traces[::-1]
    again = [corruption.apply(trace_of(problem, sample=1)) for problem in problems]
    other = [Corruption(corruption.rates, seed=2).apply(trace_of(problem)) for problem in problems]
    for different in (again, other):
        same = sum(a.chain == b.chain for a, b in zip(traces, different, strict=True))
        assert same < 0.35 * 2000, "another sample and another seed draw anew"


def test_rate_zero_and_one() -> None:
    problems = ChainedSums().problems("train", 50)
    assert all(Corruption({"wrong_step": 0.0}).apply(trace_of(p)) == trace_of(p) for p in problems)
    assert all(Corruption({"wrong_step": 1.0}).apply(trace_of(p)).chain != p.chain for p in problems)


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ({"wrong_steps": 0.5}, r"unknown key corruption\.wrong_steps; nearest valid: corruption\.wrong_step"),
        ({"wrong_step": 1.5}, r"corruption\.wrong_step is 1\.5; expected a share from 0 to 1"),
        ({"wrong_step": -0.1}, "expected a share"),
        ({"wrong_step": True}, "expected a share"),
        ({"wrong_step": float("nan")}, "expected a share"),
        ({"wrong_step": 0.6, "lucky_guess": 0.6}, r"shares sum to 1\.2; expected at most 1"),
    ],
)
def test_rates_that_are_none_are_refused(rates: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Corruption(rates)
