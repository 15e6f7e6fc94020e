"""Filters: each one's rule against hand-made texts, drops counted once and by reason, configs checked strictly."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.errors import ConfigError
from research.records import Trace, Verdict
from research.tasks.base import StepReport
from research.traces.candidates import AbstractFilter, Candidate
from research.traces.filters import FENCES, FILTERS, FilterChain, build_filters
from research.traces.overlap import loop_share, normalise
from research.traces.scripts import script_of

VALID, BROKEN = StepReport(2, 2, None, False, "6"), StepReport(2, 1, 1, False, "6")
SKIPPED, NO_STEPS = StepReport(1, 1, None, True, "6"), StepReport(0, 0, None, True, None)


def candidate(text: str = "3;6#6", problem: str = "dbl3", **others: Any) -> Candidate:
    return Candidate(Trace(problem, "3;6", "6", 3), text, **others)


def only(name: str, **options: Any) -> AbstractFilter:
    (made,) = build_filters([{"name": name, **options}], evaluation_texts=()).filters
    return made


def keeps(name: str, text: str, **options: Any) -> bool:
    return only(name, **options).keep(candidate(text))


@pytest.mark.parametrize("verdict", [*Verdict, None])
def test_p66_the_answer_key_keeps_what_is_correct_and_nothing_else(verdict: Verdict | None) -> None:
    assert only("answer_key").keep(candidate(verdict=verdict)) is (verdict is Verdict.CORRECT)


def test_the_step_verifier_looks_at_the_steps_alone() -> None:
    judged = only("step_verifier")
    assert [judged.keep(candidate(steps=steps)) for steps in (VALID, BROKEN, SKIPPED, NO_STEPS, None)] == [
        True, False, False, False, False,
    ]  # fmt: skip
    assert judged.keep(candidate(steps=VALID, verdict=Verdict.WRONG)), "the answer is the answer key's"


def test_length_includes_both_ends() -> None:
    judged = only("length", min_tokens=3, max_tokens=5)
    assert [judged.keep(candidate(tokens=tokens)) for tokens in (2, 3, 5, 6)] == [False, True, True, False]
    assert only("length").keep(candidate(tokens=10**9)), "no limit given, none applied"


# -- loops ------------------------------------------------------------------------------------------------------------


def brute_loop_share(text: str, ngram: int) -> float:
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
    repeated = sum(gram in grams[:number] for number, gram in enumerate(grams))
    return repeated / len(grams) if grams else 0.0


@pytest.mark.parametrize(
    "text", ["", "a b", "a b c d e f", "a b a b a b a b", "14;14;14;14;14;14", "so it is 3. so it is 4. so it is 3."]
)
@pytest.mark.parametrize("ngram", [1, 2, 4])
def test_the_loop_share_is_what_a_count_by_hand_gives(text: str, ngram: int) -> None:
    assert loop_share(text, ngram) == pytest.approx(brute_loop_share(text, ngram))


def test_the_cheap_bound_never_changes_a_decision() -> None:
    texts = [" ".join("abcdefgh"[(n * step) % period] for n in range(30)) for step in (1, 3) for period in range(1, 9)]
    for text in texts:
        for share in (0.0, 0.2, 0.5, 0.9):
            assert keeps("repetition", text, ngram=3, max_share=share) is (brute_loop_share(text, 3) <= share)


def test_repetition_drops_a_loop_and_keeps_an_argument() -> None:
    argument = "Each bed has 10 seeds, and there are 45 beds. So they planted 10 * 45 seeds. 10 * 45 is 450."
    assert keeps("repetition", argument) and not keeps("repetition", "Wait, let me think again about this. " * 8)


# -- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("character", "script"),
    [
        ("a", "latin"), ("é", "latin"), ("ß", "latin"), ("π", "greek"), ("ж", "cyrillic"), ("数", "han"),
        ("か", "kana"), ("カ", "kana"), ("한", "hangul"), ("ع", "arabic"), ("ש", "hebrew"), ("न", "devanagari"),
        ("ไ", "thai"), ("5", None), (" ", None), ("+", None), ("√", None), ("\U0001d465", None), ("µ", None),
        ("😀", None),
    ],
)  # fmt: skip
def test_scripts_of_characters(character: str, script: str | None) -> None:
    assert script_of(character) == script


def test_foreign_script_counts_letters() -> None:
    assert keeps("foreign_script", "the angle π is ≈ 3.14 √2, naïve 😀")
    assert not keeps("foreign_script", "the answer is 答案 6")
    assert keeps("foreign_script", "abcdefgh数", max_share=0.12), "1 of 9 letters"
    assert not keeps("foreign_script", "abcdefgh数", max_share=0.11)
    assert keeps("foreign_script", "答案是6", scripts=["han"]) and not keeps("foreign_script", "six", scripts=["han"])
    assert keeps("foreign_script", "123 + 456 = ?", scripts=["han"]), "no letter, nothing foreign"


# -- form -------------------------------------------------------------------------------------------------------------


def test_code_blocks() -> None:
    assert keeps("code_blocks", "use `x` and ~about~ 3")
    assert not any(keeps("code_blocks", f"so:\n{fence}\nprint(1)\n") for fence in FENCES)


def test_long_paragraphs_are_measured_between_blank_lines() -> None:
    assert keeps("long_paragraphs", "a" * 10, max_characters=10)
    assert not keeps("long_paragraphs", "a" * 11, max_characters=10)
    assert keeps("long_paragraphs", "aaaaa\n\n" * 9, max_characters=10)
    assert not keeps("long_paragraphs", "short\n\n" + "a" * 6 + "\n" + "a" * 6, max_characters=10)


# -- duplicates -------------------------------------------------------------------------------------------------------


def kept_of(chain: FilterChain, candidates: list[Candidate]) -> list[bool]:
    return [chain.reason(each) is None for each in candidates]


def test_a_duplicate_is_what_was_kept_before() -> None:
    chain = build_filters([{"name": "answer_key"}, {"name": "duplicates"}])
    right, wrong = Verdict.CORRECT, Verdict.WRONG
    given = [
        candidate("3;6#6", verdict=wrong),  # dropped by the answer key: it takes nobody's place
        candidate("3;6#6", verdict=right),
        candidate("3;6#6", verdict=right),
        candidate("3;6#6", "dbl4", verdict=right),
    ]
    assert [chain.reason(each) for each in given] == ["answer_key", None, "duplicates", None]
    everywhere = build_filters([{"name": "duplicates", "with_problem": False}])
    assert kept_of(everywhere, given) == [True, False, False, False]


def test_duplicates_are_compared_normalised_or_exactly() -> None:
    texts = [
        "Add THREE\n\nand  six",
        "add three and six",
        "ADD three and \u017fix",
        "add  three and six ",
        "add three, six",
    ]
    assert kept_of(build_filters(["duplicates"]), [candidate(text) for text in texts]) == [
        True, False, False, False, True,
    ]  # fmt: skip
    exact = build_filters([{"name": "duplicates", "normalised": False}])
    assert kept_of(exact, [candidate(text) for text in [*texts, texts[0]]]) == [True] * 5 + [False]
    assert normalise("ﬁve\u00a0Ⅷ  ÄÖ ") == "five viii äö"


def test_what_an_interrupted_run_kept_is_remembered() -> None:
    first, second = build_filters(["duplicates"]), build_filters(["duplicates"])
    rows = [each.stored(first.reason(each)) for each in (candidate("a"), candidate("b"), candidate("a"))]
    assert [row.reason for row in rows] == [None, None, "duplicates"]
    second.recall(rows)
    assert kept_of(second, [candidate("b"), candidate("c")]) == [False, True]


# -- contamination ----------------------------------------------------------------------------------------------------


QUESTION = "Paige planted 10 seeds in each of her 45 flower beds. How many seeds did Paige plant in all?"


@pytest.mark.parametrize(
    ("problem", "text", "clean"),
    [
        (QUESTION, "10 * 45 is 450", False),
        (f"Hello! {QUESTION.upper()}", "450", False),
        ("Another question?", f"It asks: {QUESTION} So 450.", False),
        ("Paige planted 10 seeds in each of her 46 flower beds.", "460", True),  # 12 words and marks, then another
        ("What is 2 + 2?", "4", False),  # short: the same from end to end
        ("What is 2 + 2? And 3?", "It is What is 2 + 2? or so", True),
    ],
)
def test_contamination_is_thirteen_words_in_a_row(problem: str, text: str, clean: bool) -> None:
    (judged,) = build_filters(["contamination"], evaluation_texts=[QUESTION, "What is 2 + 2?"]).filters
    for _ in range(2):  # the second time from what is remembered of the problem
        assert judged.keep(candidate(text, problem)) is clean


def test_contamination_by_brute_force() -> None:
    words = "abcab cabca bcbca".replace(" ", "")
    evaluation = [" ".join(words)]
    grams = {tuple(words[start : start + 4]) for start in range(len(words) - 3)}
    (judged,) = build_filters([{"name": "contamination", "ngram": 4}], evaluation_texts=evaluation).filters
    for number in range(3**6):
        text = "".join("abcd"[number // 3**place % 3] for place in range(6)) + "dabc"
        clean = not any(tuple(text[start : start + 4]) in grams for start in range(len(text) - 3))
        assert judged.keep(candidate(" ".join(text), "q")) is clean


# -- the list ---------------------------------------------------------------------------------------------------------


def test_the_first_reason_counts() -> None:
    nodes = [{"name": "answer_key"}, {"name": "length", "max_tokens": 4}, {"name": "code_blocks"}]
    given = [
        ("```", Verdict.WRONG, 9),
        ("```", Verdict.CORRECT, 9),
        ("```", Verdict.CORRECT, 3),
        ("a", Verdict.CORRECT, 3),
    ]

    def reasons(order: list[dict[str, Any]]) -> Counter[str | None]:
        chain = build_filters(order)
        return Counter(chain.reason(candidate(text, verdict=v, tokens=n)) for text, v, n in given)

    assert reasons(nodes) == {"answer_key": 1, "length": 1, "code_blocks": 1, None: 1}
    assert reasons(nodes[::-1]) == {"code_blocks": 3, None: 1}
    assert reasons([]) == {None: 4}


def test_what_can_be_no_trace_never_reaches_a_filter() -> None:
    chain = build_filters(["duplicates"])
    assert chain.reason(candidate("a", barred="truncated")) == "truncated"
    assert chain.reason(candidate("a")) is None


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([{"name": "anser_key"}], r"filters\[0\]\.name is 'anser_key'; nearest valid: answer_key"),
        (["nonsense"], r"filters\[0\]\.name is 'nonsense'\. Valid: answer_key, step_verifier, length"),
        ([{"name": "length", "max_token": 5}], r"filters\[0\]\.max_token .*nearest valid: filters\[0\]\.max_tokens"),
        ([{"name": "length", "max_tokens": "5"}], r"filters\[0\]\.max_tokens is '5' \(str\); expected int or null"),
        ([{"name": "length", "max_tokens": True}], r"max_tokens is True \(bool\); expected int"),
        ([{"name": "length", "min_tokens": 9, "max_tokens": 5}], "keeps 9 to 5 tokens"),
        ([{"name": "repetition", "max_share": 1.5}], r"repetition: max_share is 1\.5; expected 0 to 1"),
        ([{"name": "repetition", "ngram": 0}], "ngram is 0; expected at least 1"),
        ([{"name": "foreign_script", "scripts": ["latim"]}], "unknown script 'latim'; nearest valid: latin"),
        ([{"name": "foreign_script", "max_share": -1.0}], "max_share is -1"),
        ([{"name": "long_paragraphs", "max_characters": 0}], "max_characters is 0"),
        ([{"name": "answer_key", "strict": True}], r"unknown key filters\[0\]\.strict"),
        (["answer_key", "answer_key"], "filters has answer_key 2 times"),
        ([{"max_tokens": 5}], r"filters\[0\] is \{'max_tokens': 5\}; expected \{name: FILTER"),
        ([7], r"filters\[0\] is 7"),
        ("answer_key", "filters is 'answer_key'; expected a list"),
        ({"name": "answer_key"}, "expected a list"),
        ([{"name": "contamination", "evaluation_texts": ["a"]}], "is set by the run itself"),
    ],
)
def test_a_list_that_says_something_else_is_refused(nodes: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_filters(nodes, evaluation_texts=["a"])


def test_a_filter_without_what_it_judges_by_is_refused() -> None:
    """P71: a filter that lacks its evidence would drop or pass everything; it says so instead."""
    for name, needs in (("answer_key", "verdict"), ("step_verifier", "steps"), ("length", "tokens")):
        with pytest.raises(ConfigError, match=f"{name}, which judges by {needs}"):
            build_filters([name], available=())
    with pytest.raises(ConfigError, match="contamination, which needs the problems of the evaluation splits"):
        build_filters(["contamination"])


def test_every_filter_is_named_by_its_reason_and_has_a_choice_that_uses_it(repository: Path) -> None:
    assert set(FILTERS) == {
        "answer_key", "step_verifier", "length", "repetition", "foreign_script", "code_blocks", "long_paragraphs",
        "duplicates", "contamination",
    }  # fmt: skip
    for path in (repository / "conf" / "filter").glob("*.yaml"):
        nodes = yaml.safe_load(path.read_text())["filters"]
        assert [each.reason for each in build_filters(nodes, evaluation_texts=()).filters] == [n["name"] for n in nodes]
