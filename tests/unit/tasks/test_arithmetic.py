"""Chained sums: what is drawn, what each kind of wrong chain is called."""

import re
from collections import Counter

import pytest

from research.records import Problem, Verdict
from research.tasks.arithmetic import ChainedSums, columns_of, num_carries
from research.tasks.base import StepReport

REFERENCE = Problem(0, "17+32+31-60-06", "14")


def evaluated(text: str) -> list[int]:
    """The running totals, by another way than the task's."""
    numbers = [int(number) for number in re.findall(r"[+-]?\d+", text)]
    return [sum(numbers[: place + 1]) for place in range(len(numbers))]


@pytest.mark.parametrize(("terms", "highest"), [(2, 9), (5, 99), (7, 99), (3, 999)])
def test_problems_are_what_they_say(terms: int, highest: int) -> None:
    task = ChainedSums(terms, highest)
    for problem in task.problems("train", 60):
        totals = evaluated(problem.text)
        width = len(str(highest))
        assert problem.level == len(totals) == terms
        assert all(0 <= total <= highest for total in totals)
        assert problem.chain == ";".join(f"{total:0{width}d}" for total in totals[1:])
        assert problem.answer == f"{totals[-1]:0{width}d}"
        assert re.fullmatch(rf"\d{{{width}}}([+-]\d{{{width}}}){{{terms - 1}}}", problem.text)


def test_answers_are_uniform_so_that_chance_is_one_in_a_hundred() -> None:
    counts = Counter(problem.answer for problem in ChainedSums().problems("train", 10_000))
    assert len(counts) == 100 and max(counts.values()) < 150  # 100 expected, standard deviation 10
    assert ChainedSums().chance == 0.01 and ChainedSums(highest=9).chance == 0.1


def test_the_reference_problem_of_the_claims() -> None:
    report = ChainedSums().verify_steps(REFERENCE, "49;80;20;14")
    assert report == StepReport(num_steps=4, num_valid=4, first_wrong=None, skipped=False, result="14")
    assert report.valid


CHAINS = [  # chain, valid steps, first wrong, skipped, result
    ("49;80;30;14", 2, 2, False, "14"),  # an error silently repaired in the next step: both are invalid
    ("49;80;30;24", 3, 2, False, "24"),  # an error carried along: one is
    ("39;80;20;14", 2, 0, False, "14"),
    ("49;20;14", 3, None, True, "14"),  # 80 left out
    ("14", 1, None, True, "14"),  # all left out but the last
    ("49;80;20", 3, None, True, "20"),  # cut off
    ("49;80;20;14;14", 4, 4, False, "14"),  # one too many
    ("49;81;15", 2, 1, True, "15"),  # 81 is wrong, then 15 = 81-60-06 jumps
    ("49;x;20;14", 2, 1, False, "14"),  # unread, so that nothing follows from it
    ("49;80;20;", 3, 3, False, None),
    ("49;080;20;14", 3, 1, False, "14"),  # written another way
    ("", 0, None, True, None),
]


@pytest.mark.parametrize(("chain", "valid", "first_wrong", "skipped", "result"), CHAINS)
def test_how_a_chain_is_wrong(
    chain: str, valid: int, first_wrong: int | None, skipped: bool, result: str | None
) -> None:
    report = ChainedSums().verify_steps(REFERENCE, chain)
    steps = len(chain.split(";")) if chain else 0
    assert report == StepReport(steps, valid, first_wrong, skipped, result)
    assert not report.valid


def test_totals_out_of_range_follow_as_they_are_written() -> None:
    """05 is wrong; 05-60 is -55, -55-06 is -61: the steps behind it follow from it."""
    report = ChainedSums().verify_steps(Problem(0, "17+32+31-60-06", "14"), "49;05;-55;-61")
    assert report == StepReport(4, 3, 1, False, "-61")


def test_answers_are_compared_as_written() -> None:
    task = ChainedSums()
    problem = Problem(0, "08-01", "07")
    told = {
        text: task.verify(problem, text)
        for text in ("07", " 07\n", "7", "007", "08", "seven", "7.0", "-7", "\u0660\u0667")
    }
    assert told == {
        "07": Verdict.CORRECT,
        " 07\n": Verdict.CORRECT,
        "7": Verdict.WRONG,
        "007": Verdict.WRONG,
        "08": Verdict.WRONG,
        "seven": Verdict.UNPARSED,
        "7.0": Verdict.UNPARSED,
        "-7": Verdict.WRONG,
        "\u0660\u0667": Verdict.UNPARSED,
    }


@pytest.mark.parametrize(
    ("total", "term", "written", "carries"),
    [
        (17, 32, "7+2+0>9,0 1+3+0>4,0", 0),
        (47, 35, "7+5+0>2,1 4+3+1>8,0", 1),
        (80, -67, "0-7-0>3,1 8-6-1>1,0", 1),
        (80, -60, "0-0-0>0,0 8-6-0>2,0", 0),
        (99, 1, "9+1+0>0,1 9+0+1>0,1 0+0+1>1,0", 2),
        (3, 4, "3+4+0>7,0 0+0+0>0,0", 0),
    ],
)
def test_columns_by_hand(total: int, term: int, written: str, carries: int) -> None:
    assert columns_of(total, term, 2) == written
    assert num_carries(total, term) == carries


def test_carries_are_counted_over_all_steps() -> None:
    def by_digits(before: int, term: int) -> int:
        """A column of two digits carries where the sum of its digits cannot stand in one."""
        if term >= 0:
            return int(before % 10 + term % 10 > 9) + int(before + term > 99)
        return int(before % 10 < -term % 10)

    for problem in ChainedSums().problems("val", 200):
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", problem.text)]
        totals = evaluated(problem.text)
        expected = sum(by_digits(before, term) for before, term in zip(totals, numbers[1:], strict=False))
        assert problem.details["carries"] == expected


def test_verbose_chains_are_longer_and_their_columns_are_checked() -> None:
    verbose, terse = ChainedSums(verbose=True), ChainedSums()
    for long, short in zip(verbose.problems("val", 50), terse.problems("val", 50), strict=True):
        assert long.text == short.text and long.answer == short.answer
        assert [step.rpartition(" ")[2] for step in long.chain.split(";")] == short.chain.split(";")
        report, either = verbose.verify_steps(long, long.chain), terse.verify_steps(long, long.chain)
        assert report == either and report is not None and report.valid and report.num_steps == 4
        assert verbose.verify_steps(short, short.chain).skipped, "its columns are left out"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "step", ["0-7-0>3,0 8-6-1>1,0 13", "0-7-0>3,1 8-6-0>1,0 13", "0-7-0>3,1 13", "8-6-1>1,0 0-7-0>3,1 13"]
)
def test_a_wrong_column_makes_a_wrong_step_though_the_total_is_right(step: str) -> None:
    task = ChainedSums(2, verbose=True)
    problem = Problem(0, "80-67", "13")
    assert task.verify_steps(problem, "0-7-0>3,1 8-6-1>1,0 13").valid  # type: ignore[union-attr]
    report = task.verify_steps(problem, step)
    assert report == StepReport(1, 0, 0, False, "13")


def test_small_spaces_end() -> None:
    task = ChainedSums(2, 2)
    total = sum(len(task.problems(split, _held(task, split))) for split in ("train", "val", "test"))  # type: ignore[arg-type]
    assert total == 9


def _held(task: ChainedSums, split: str) -> int:
    with pytest.raises(ValueError, match="holds only") as told:
        task.problems(split, 10)  # type: ignore[arg-type]
    return int(re.search(r"only (\d+)", str(told.value))[1])  # type: ignore[index]


@pytest.mark.parametrize("options", [{"num_terms": 1}, {"highest": 0}])
def test_impossible_sums_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give at least"):
        ChainedSums(**options)  # type: ignore[arg-type]
