"""Lookups: a label that is known or not, and facts beside it. Nothing is computed, so a chain leads nowhere."""

from research.records import Problem, Verdict
from research.seeding import seed_for
from research.tasks.base import AbstractTask, Split
from research.tasks.drawing import check_request, problems_of, take
from research.tasks.steps import STEP_SEPARATOR

LABELS, FACTS = "ABCDEFGHIJ", "klmnopqrst"
OCCASIONS = 1000


class Lookup(AbstractTask):
    """``217@403``: entity 217 on occasion 403. The answer is the entity's label, ``C``; the chain two facts about it.

    Label and facts are drawn for every entity, independent of each other, and the occasion means nothing: train and
    test share the entities and no problem. What must be learnt is a table, as of commonsense, and an order of chain
    and answer can only cost, never enable: the counterpart of chained sums (claims C19).

    num_entities  rows of the table, at most 1000
    num_labels    2 to 10, equally likely; the best guess without the table is right with probability 1 / num_labels
    num_facts     facts in a chain, each one of ten letters
    table_seed    which table
    """

    step_separator = STEP_SEPARATOR

    def __init__(self, num_entities: int = 100, num_labels: int = 5, num_facts: int = 3, table_seed: int = 0) -> None:
        limits = {"num_entities": (num_entities, 1, 1000), "num_labels": (num_labels, 2, len(LABELS))}
        for key, (value, least, most) in {**limits, "num_facts": (num_facts, 1, 100)}.items():
            if not least <= value <= most:
                raise ValueError(f"{key}={value!r}: give {least} to {most}")
        self.num_entities, self.num_labels, self.num_facts = num_entities, num_labels, num_facts
        self.table_seed = table_seed
        self.name = f"lookup{num_entities}"
        self.alphabet = f"0123456789@{LABELS[:num_labels]}{FACTS}{STEP_SEPARATOR}"
        self.chance = 1 / num_labels

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        check_request(self.name, split, num, needed=True)
        stream = f"lookup/{self.num_entities}"
        space = self.num_entities * OCCASIONS
        return take(problems_of(space, self._problem, split, seed, stream), self.name, split, num or 0)

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        if not {problem.answer, answer} <= set(LABELS[: self.num_labels]):
            return Verdict.UNPARSED
        return Verdict.CORRECT if answer == problem.answer else Verdict.WRONG

    def _problem(self, number: int) -> Problem:
        entity, occasion = divmod(number, OCCASIONS)
        facts = [FACTS[self._drawn(f"fact{place}", entity, len(FACTS))] for place in range(self.num_facts)]
        label = LABELS[self._drawn("label", entity, self.num_labels)]
        return Problem(0, f"{entity:03d}@{occasion:03d}", label, STEP_SEPARATOR.join(facts))

    def _drawn(self, what: str, entity: int, size: int) -> int:
        return seed_for(self.table_seed, f"lookup/{what}", entity) % size
