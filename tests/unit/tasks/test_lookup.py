"""Lookups: a table that train and test share, labels and facts that say nothing of each other."""

from collections import Counter

import pytest

from research.records import Problem, Verdict
from research.tasks.lookup import Lookup


def entity(problem: Problem) -> str:
    return problem.text.partition("@")[0]


def test_an_entity_has_one_label_and_one_chain_in_every_split() -> None:
    task = Lookup(num_entities=20)
    known = {entity(problem): (problem.answer, problem.chain) for problem in task.problems("train", 2000)}
    assert len(known) == 20
    for split in ("val", "test"):
        found = task.problems(split, 200, seed=5)
        assert {entity(problem) for problem in found} == set(known)
        assert all((problem.answer, problem.chain) == known[entity(problem)] for problem in found)


def test_the_facts_do_not_tell_the_label() -> None:
    """Over 1000 entities no fact goes with a label more often than chance would have it."""
    problems = {entity(problem): problem for problem in Lookup(num_entities=1000).problems("train", 30_000)}
    assert len(problems) == 1000
    counts = Counter((problem.chain.split(";")[0], problem.answer) for problem in problems.values())
    assert len(counts) == 50 and max(counts.values()) < 20 + 5 * 4.4, "20 expected each, standard deviation 4.4"


def test_another_table_is_another_table() -> None:
    first, second = (Lookup(table_seed=seed).problems("test", 300) for seed in (0, 1))
    assert [problem.text for problem in first] == [problem.text for problem in second]
    same = sum(a.answer == b.answer for a, b in zip(first, second, strict=True))
    assert 20 < same < 110, "one in five by chance"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("C", "correct"), ("A", "wrong"), ("F", "unparsed"), ("c", "unparsed"), ("CC", "unparsed"), ("", "unparsed")],
)
def test_only_a_label_is_an_answer(answer: str, verdict: str) -> None:
    problem = Problem(0, "001@001", "C", "k;l;m")
    assert Lookup().verify(problem, answer) == Verdict(verdict)
    assert Lookup().verify(problem, None) is Verdict.UNPARSED


@pytest.mark.parametrize("wrong", [{"num_entities": 0}, {"num_labels": 11}, {"num_facts": 0}])
def test_a_table_without_meaning_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Lookup(**wrong)
