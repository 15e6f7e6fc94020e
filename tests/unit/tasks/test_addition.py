"""Addition with a scratchpad: columns, carries, levels."""

from collections import Counter

import pytest

from research.records import Problem, Verdict
from research.tasks.addition import Addition
from research.tasks.base import StepReport

PROBLEM = Problem(0, "57+68", "125")


def test_the_scratchpad_by_hand() -> None:
    for verbose, chain in ((True, "7 8 0>5 1;5 6 1>2 1;0 0 1>1 0"), (False, "7 8>5;5 6>2;0 0>1")):
        assert Addition(verbose=verbose).verify_steps(PROBLEM, chain) == StepReport(3, 3, None, False, "125")


@pytest.mark.parametrize("verbose", [True, False])
def test_problems_are_what_they_say(verbose: bool) -> None:
    task = Addition(2, 6, verbose)
    for problem in task.problems("train", 200):
        left, right = problem.text.split("+")
        assert len(left) == len(right) == problem.level and "0" not in (left[0], right[0])
        assert problem.answer == str(int(left) + int(right))
        report = task.verify_steps(problem, problem.chain)
        assert report is not None and report.valid and report.result == problem.answer
        assert report.num_steps == len(problem.answer)


VERBOSE = [
    ("7 8 0>5 0;5 6 0>1 1;0 0 1>1 0", 2, 0, False, "115"),  # the carry is lost; what follows follows from that
    ("7 8 0>5 0;5 6 1>2 1;0 0 1>1 0", 1, 0, False, "125"),  # lost, then silently repaired: two steps do not follow
    ("7 8 0>5 1;5 6 1>2 1", 2, None, True, "25"),
    ("5 6 1>2 1;0 0 1>1 0", 2, None, True, "12"),
    ("7 8 0>5 1;0 0 1>1 0", 2, None, True, "15"),
    ("8 7 0>5 1;5 6 1>2 1;0 0 1>1 0", 2, 0, False, "125"),  # digits of the wrong number
    ("7 8 0>5 1;5 6 1>2 1;0 0 1>1 0;0 0 0>0 0", 3, 3, False, "0125"),
    ("7 8>5;5 6>2;0 0>1", 0, 0, False, None),  # carries are not written
    ("?;5 6 1>2 1;0 0 1>1 0", 1, 0, False, None),
]


@pytest.mark.parametrize(("chain", "valid", "first_wrong", "skipped", "result"), VERBOSE)
def test_how_a_chain_is_wrong(
    chain: str, valid: int, first_wrong: int | None, skipped: bool, result: str | None
) -> None:
    report = Addition().verify_steps(PROBLEM, chain)
    assert report == StepReport(len(chain.split(";")), valid, first_wrong, skipped, result)


def test_terse_steps_are_judged_on_the_true_carry() -> None:
    report = Addition(verbose=False).verify_steps(PROBLEM, "7 8>5;5 6>1;0 0>1")
    assert report == StepReport(3, 2, 1, False, "115")


def test_levels_are_even_and_small_ones_run_out() -> None:
    counts = Counter(problem.level for problem in Addition(1, 4).problems("train", 2000))
    assert counts[1] == 67, "the texts of one-digit problems that hash into train"
    assert all(abs(counts[level] - 644) < 80 for level in (2, 3, 4))
    held = {split: 0 for split in ("train", "val", "test")}
    for split in held:
        with pytest.raises(ValueError, match=rf"split '{split}' holds only (\d+) distinct") as told:
            Addition(1, 1).problems(split, 82)  # type: ignore[arg-type]
        held[split] = int(str(told.value).split("only ")[1].split()[0])
    assert sum(held.values()) == 81


def test_answers_are_compared_as_written() -> None:
    task = Addition()
    assert task.verify(PROBLEM, "125") is Verdict.CORRECT
    assert {task.verify(PROBLEM, text) for text in ("0125", "12", "1250", "126")} == {Verdict.WRONG}
    assert {task.verify(PROBLEM, text) for text in ("125.0", "1 25", "5 2 1", None)} == {Verdict.UNPARSED}


@pytest.mark.parametrize(("low", "high"), [(0, 3), (4, 3)])
def test_impossible_levels_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="1 <= min_digits <= max_digits"):
        Addition(low, high)


def test_carries_are_those_of_the_columns() -> None:
    for problem in Addition(3, 3).problems("val", 100):
        left, right = (int(part) for part in problem.text.split("+"))
        expected = sum((left % 10**place + right % 10**place) >= 10**place for place in (1, 2, 3))
        assert problem.details["carries"] == expected
