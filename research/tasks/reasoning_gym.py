"""Problems of the package reasoning-gym, drawn without repeats and graded strictly."""

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from typing import Any

from research.errors import ConfigError
from research.records import Problem, Verdict
from research.seeding import seed_for
from research.tasks.answers import unboxed, value_part
from research.tasks.base import AbstractTask, Split
from research.tasks.drawing import SPLITS, check_request, split_of, take
from research.tasks.expressions import NotArithmetic, evaluate
from research.tasks.numbers import parse_answer, parse_number, plain_text

BLOCK = 1024  # items drawn from one hashed start
MOST_FRUITLESS = 3000  # draws in a row without a new problem, after which a split counts as empty
LONGEST = 20_000  # characters of an answer

_HASHED = "its problems depend on PYTHONHASHSEED: the same seed gives others in another process"
_NO_REFERENCE = "it has no reference answer, so nothing can be trained on or checked against"
_ALGEBRA = "its scorer runs computer algebra on the answer in this process: text would become code, and may not end"
REFUSED = (
    dict.fromkeys(
        ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"), _HASHED
    )
    | dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_REFERENCE)
    | dict.fromkeys(("simple_integration", "intermediate_integration"), _ALGEBRA)
    | {"composite": "it mixes others; make one task of each"}
)
# What these families' scorers are given goes through eval() or a parser built on it. Only text that is plainly data
# reaches them; anything else is UNPARSED. Multiplication yes, powers no: they need not end.
_SUM = re.compile(r"(?!.*(?:\*\*|//))[0-9+\-*/() ]{1,200}")
DATA_ONLY = {
    "countdown": _SUM,
    "puzzle24": _SUM,
    "n_queens": re.compile(r"[Q_ \n]*"),
    "binary_matrix": re.compile(r"[0-9 \n]*"),
    "spiral_matrix": re.compile(r"[0-9 \n]*"),
    "string_insertion": re.compile(r"[A-Z]*"),
}
WORKED_OUT = ("countdown", "puzzle24")  # the whole answer is a sum, worked out here: nothing is contained
ROUNDED = ("power_function",)  # asks for some digits of a longer number
_DECIMAL = re.compile(r"[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]{1,3})?|[0-9]+[eE][-+]?[0-9]{1,3}|\.[0-9]+|[0-9]+")


class ReasoningGym(AbstractTask):
    r"""One data set of reasoning-gym, by name.

    Items are drawn in blocks whose starts are hashed from (seed, block), so that neighbouring seeds share none; repeats
    are left out; the split of a problem is a hash of its text. What is drawn is kept: val and test take ten draws each.

    Of an answer with a ``\boxed{..}``, what stands in the last box is judged, and UNPARSED where that is empty or not
    closed. An answer is CORRECT where it is the reference, up to blanks around it. Two numbers must be equal, without
    tolerance; a leading ``x =`` is left out. Where either is written as a fraction, they must also be the same fraction
    (``\frac{2}{3}`` is ``2/3``, ``4/6`` is not) or have the scorer's full marks: to reduce it may be all that is asked.
    Where both have a unit it must be the same, up to an s at its end.

    A sum that is asked for (``countdown``, ``puzzle24``) is CORRECT where it has exactly the value and the numbers that
    are given. Any other answer (of a problem with several solutions) is CORRECT only where the package's scorer gives
    exactly 1.0, and

    - neither text contains the other: no credit for containment or for an answer cut off;
    - where one of them writes a number with a point, both have the same numbers, in any order and without tolerance
      (unless the problem asks for some digits alone), and no ``nan``;
    - the scorer gives no control full marks (gibberish, the reference within a sentence or doubled): one that does is
      not believed for this problem.

    What the scorer raises is counted in ``counts`` under its own name and gives UNPARSED, never WRONG.

    dataset  its name in the package, such as "chain_sum"; some are refused, with the reason
    options  arguments of its configuration, such as ``{"min_terms": 2}``; seed and size are ours

    ``version`` is that of the installed distribution, not what the package says of itself.
    """

    def __init__(self, dataset: str = "chain_sum", options: Mapping[str, Any] | None = None) -> None:
        self.dataset = dataset
        self.options = dict(options or {})
        self.counts: Counter[str] = Counter()
        self._package = _installed()
        known = importlib.import_module("reasoning_gym.factory").DATASETS
        if dataset not in known:
            raise ConfigError(
                f"task.dataset is {dataset!r}; expected one of {', '.join(sorted(set(known) - set(REFUSED)))}"
            )
        if dataset in REFUSED:
            raise ConfigError(f"task.dataset is {dataset!r}, which is refused: {REFUSED[dataset]}")
        if {"seed", "size"} & set(self.options):
            raise ConfigError(
                f"task.options holds {sorted({'seed', 'size'} & set(self.options))}: they are ours to set"
            )
        self.name = f"reasoning_gym_{dataset}"
        self.version = version("reasoning-gym")
        self._scorer = self._create(0, 1)
        self._drawn: dict[int, _Drawn] = {}

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        check_request(self.name, split, num, needed=True)
        drawn = self._drawn.setdefault(seed, _Drawn(self._items(seed)))
        return take(drawn.of(split), self.name, split, num or 0)

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        gold, given = problem.answer.strip(), (answer or "").strip()
        if not gold or not given or len(given) > LONGEST:
            return Verdict.UNPARSED
        if given != gold:
            given = unboxed(given)
        if not given:
            return Verdict.UNPARSED
        if given == gold:
            return Verdict.CORRECT
        expected, number = parse_number(gold), parse_answer(given)
        are_numbers = expected is not None and number is not None
        if expected is not None and number is not None:
            if expected != number or _other_unit(gold, given):
                return Verdict.WRONG
            if not (expected.fraction or number.fraction) or _bare(gold) == _bare(given):
                return Verdict.CORRECT
            given = value_part(given)
        if not self._is_data(given):
            self.counts["refused: no plain data"] += 1
            return Verdict.UNPARSED
        if self.dataset in WORKED_OUT:
            return _worked_out(problem.details["metadata"], given)
        if not are_numbers and (given in gold or gold in given or not self._same_numbers(gold, given)):
            return Verdict.WRONG
        return self._scored(problem, given, is_equal=are_numbers)

    def _scored(self, problem: Problem, given: str, is_equal: bool = False) -> Verdict:
        """What the package says; controls are left out where the answer is known to equal the reference."""
        entry = {"question": problem.text, "answer": problem.answer, "metadata": problem.details.get("metadata", {})}
        try:
            score = float(self._scorer.score_answer(given, entry))
        except Exception as error:  # the package's own failure: told apart from a wrong answer
            self.counts[f"scorer raised {type(error).__name__}"] += 1
            return Verdict.UNPARSED
        if score != 1.0:
            return Verdict.WRONG
        if not is_equal and self._is_lenient(entry):
            self.counts["scorer is lenient"] += 1
            return Verdict.WRONG
        return Verdict.CORRECT

    def _same_numbers(self, gold: str, given: str) -> bool:
        """Whether two answers, one of which writes decimals, have the same numbers; so do any other two."""
        numbers = [sorted(Fraction(number) for number in _DECIMAL.findall(text)) for text in (gold, given)]
        has_decimals = any("." in number for text in (gold, given) for number in _DECIMAL.findall(text))
        if numbers[0] and "nan" in given.lower() and "nan" not in gold.lower():
            return False
        return self.dataset in ROUNDED or not has_decimals or numbers[0] == numbers[1]

    def _is_data(self, text: str) -> bool:
        pattern = DATA_ONLY.get(self.dataset)
        return pattern is None or bool(pattern.fullmatch(text))

    def _is_lenient(self, entry: dict[str, Any]) -> bool:
        """Whether the scorer gives full marks to an answer that cannot be right."""
        gold = entry["answer"]
        controls = ("xqzt", f"not {gold}", f"{gold} 7", f"{gold} {gold}", f"the answer is {gold} or something else")
        for control in controls:
            if not self._is_data(control):
                continue
            try:
                if float(self._scorer.score_answer(control, entry)) >= 1.0:
                    return True
            except Exception:  # it refuses the control, in its way
                self.counts["scorer raised on a control"] += 1
        return False

    def _items(self, seed: int) -> Iterator[Problem]:
        """Without end and with repeats: block after block, each from a start of its own."""
        for block in count():
            start = seed_for(seed, f"reasoning_gym/{self.dataset}", block) % (2**32 - BLOCK)
            items = self._create(start, BLOCK)
            for number in range(BLOCK):
                item = items[number]
                text, details = str(item["question"]).strip(), {"metadata": item["metadata"]}
                yield Problem(0, text, str(item["answer"]), details=details)

    def _create(self, seed: int, size: int) -> Any:
        try:
            return self._package.create_dataset(self.dataset, seed=seed, size=size, **self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"task.options is {self.options!r}, which {self.dataset!r} does not take: {error}"
            ) from error


class _Drawn:
    """What one seed has drawn so far, by split; a draw for one split is kept for the others."""

    def __init__(self, items: Iterator[Problem]) -> None:
        self.items = items
        self.found: dict[Split, list[Problem]] = {split: [] for split in SPLITS}
        self.seen: set[str] = set()

    def of(self, split: Split) -> Iterator[Problem]:
        """The distinct problems of a split; ends where MOST_FRUITLESS draws in a row bring none."""
        number = 0
        while number < len(self.found[split]) or self._draw_until(split, number):
            yield self.found[split][number]
            number += 1

    def _draw_until(self, split: Split, number: int) -> bool:
        for _ in range(MOST_FRUITLESS):
            problem = next(self.items)
            if problem.text not in self.seen:
                self.seen.add(problem.text)
                self.found[split_of(problem.text)].append(problem)
            if number < len(self.found[split]):
                return True
        return False


def _worked_out(metadata: Mapping[str, Any], given: str) -> Verdict:
    """Of a sum: exactly its value, and each of the numbers once."""
    if sorted(map(int, re.findall("[0-9]+", given))) != sorted(metadata["numbers"]):
        return Verdict.WRONG
    try:
        return Verdict.CORRECT if evaluate(given) == metadata.get("target", 24) else Verdict.WRONG
    except NotArithmetic:
        return Verdict.WRONG


def _other_unit(gold: str, given: str) -> bool:
    """Whether two numbers have units that differ in more than an s at the end; one without may mean the other's."""
    asked, told = (
        [word.lower().removesuffix("s") for word in re.findall("[A-Za-z]+", _bare(text))] for text in (gold, given)
    )
    return bool(asked and told) and asked != told


def _bare(text: str) -> str:
    """A fraction as it is written, without LaTeX and the ``$`` around it."""
    return plain_text(value_part(text)).replace(" /", "/").replace("/ ", "/").strip("$ ")


def _installed() -> Any:
    if find_spec("reasoning_gym") is None:
        raise ConfigError("this task needs the package reasoning-gym: pip install 'research-distillation[tasks]'")
    return importlib.import_module("reasoning_gym")
