"""What templates write, to the letter, and what they read out of text that may hold anything."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from research.arguments import locate_target
from research.text.template import LAYOUTS, AbstractTemplate, Parsed
from research.text.templates import Alpaca, Plain, Think

TEMPLATES = (Plain(), Alpaca(), Think())
PROBLEMS = [
    ("Add 2, 3 and 4.", "2 + 3 = 5\n5 + 4 = 9", "9"),
    ("Tom has 3 boxes of 4 apples and eats 2. How many?", "3 boxes hold 3 * 4 = 12.\nHe eats 2: 12 - 2 = 10.", "10"),
    ("What is 10% of (20 + 30)?", "20 + 30 = 50\n\n10% of 50 is 5.", "5"),
]


@pytest.mark.parametrize(("problem", "chain", "answer"), PROBLEMS)
def test_the_layout_of_claim_14_to_the_letter(problem: str, chain: str, answer: str) -> None:
    template = Alpaca()
    expected = "### Instruction:\n" + problem + "\n\n### Response:\n" + chain + "\n\nAnswer: " + answer
    assert template.prompt(problem) + template.completion(chain, answer, "chain_then_answer") == expected
    assert template.prompt(problem).endswith("### Response:\n")


WRITTEN = [
    (Plain(), "chain_then_answer", "5;9#9"),
    (Plain(), "answer_then_chain", "#9:5;9"),
    (Plain(), "answer_only", "#9"),
    (Alpaca(), "answer_then_chain", "Answer: 9\n\n5;9"),
    (Alpaca(), "answer_only", "Answer: 9"),
    (Think(), "chain_then_answer", "<think>\n5;9\n</think>\n\n9"),
    (Think(), "answer_then_chain", "9\n\n<think>\n5;9\n</think>"),
    (Think(), "answer_only", "<think>\n\n</think>\n\n9"),
]


@pytest.mark.parametrize(("template", "layout", "text"), WRITTEN)
def test_what_is_written_is_read_back(template: AbstractTemplate, layout: str, text: str) -> None:
    assert template.completion("5;9", "9", layout) == text
    assert template.parse(text, layout) == Parsed("" if layout == "answer_only" else "5;9", "9")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("problem", "chain", "answer"), PROBLEMS)
@pytest.mark.parametrize("template", [Alpaca(), Think()])
def test_multi_step_problems_come_back(
    template: AbstractTemplate, problem: str, chain: str, answer: str, layout: str
) -> None:
    read = template.parse(template.completion(chain, answer, layout), layout)
    assert read == Parsed("" if layout == "answer_only" else chain, answer)


READ = [
    # no mark, or nothing behind it
    (Plain(), "chain_then_answer", "", Parsed("", None)),
    (Plain(), "chain_then_answer", "5;9", Parsed("5;9", None)),
    (Plain(), "chain_then_answer", "5;9#", Parsed("5;9", None)),
    (Plain(), "chain_then_answer", "5;9# \n", Parsed("5;9", None)),
    (Plain(), "chain_then_answer", "#9", Parsed("", "9")),
    # no choosing among several answers: the whole rest is the answer
    (Plain(), "chain_then_answer", "5#8#9", Parsed("5", "8#9")),
    (Plain(), "answer_only", "8#9", Parsed("", None)),
    (Plain(), "answer_only", "9", Parsed("", None)),
    (Plain(), "answer_then_chain", "#9", Parsed("", "9")),
    (Plain(), "answer_then_chain", "#9:5:9", Parsed("5:9", "9")),
    (Plain(), "answer_then_chain", "#:5;9", Parsed("5;9", None)),
    (Plain(), "answer_then_chain", "5;9#9", Parsed("", None)),
    # goes on to another problem
    (Plain(), "chain_then_answer", "5;9#9;1+1=2#2", Parsed("5;9", None)),
    (Alpaca(), "chain_then_answer", "It is 9.", Parsed("It is 9.", None)),
    (Alpaca(), "chain_then_answer", "5\n\nAnswer:", Parsed("5", None)),
    (Alpaca(), "chain_then_answer", "5\n\nAnswer:   ", Parsed("5", None)),
    (Alpaca(), "chain_then_answer", "so the Answer: 9", Parsed("so the Answer: 9", None)),
    (Alpaca(), "chain_then_answer", "Answer: 8\nWait.\n\nAnswer: 9", Parsed("Answer: 8\nWait.", "9")),
    (Alpaca(), "chain_then_answer", "5\nAnswer: 18 or 8", Parsed("5", "18 or 8")),
    (Alpaca(), "chain_then_answer", "5\nAnswer: 1 2\n3 4", Parsed("5", "1 2\n3 4")),
    (Alpaca(), "chain_then_answer", "Answer: 9\n\n### Instruction:\nNext\n\n### Response:\nAnswer: 9", None),
    (Alpaca(), "answer_only", "It is 9. Answer: 9", Parsed("", None)),
    (Alpaca(), "answer_only", "\nAnswer: 9", Parsed("", "9")),
    (Alpaca(), "answer_then_chain", "Answer: 9\n\n5\n\nAnswer: 8", Parsed("5\n\nAnswer: 8", "9")),
    (Alpaca(), "answer_then_chain", "5\n\nAnswer: 9", Parsed("", None)),
    (Think(), "chain_then_answer", "<think>\n5, or 9", Parsed("5, or 9", None)),
    (Think(), "chain_then_answer", "5\n</think>\n\n9", Parsed("5", "9")),
    (Think(), "chain_then_answer", "<think>\n5\n</think>", Parsed("5", None)),
    (Think(), "chain_then_answer", "<think>5</think>8</think>9", Parsed("5</think>8", "9")),
    (Think(), "chain_then_answer", "<think>5</think>8<think>9", Parsed("5", None)),
    (Think(), "chain_then_answer", "9", Parsed("9", None)),
    (Think(), "answer_only", "9", Parsed("9", None)),
    (Think(), "answer_then_chain", "9", Parsed("", None)),
    (Think(), "answer_then_chain", "9\n\n<think>\n5;", Parsed("5;", "9")),
    (Think(), "answer_then_chain", "<think>\n5\n</think>\n\n9", Parsed("5", None)),
    (Think(), "chain_then_answer", "<think>5</think>9\n\n### Instruction:\nNext", Parsed("5", None)),
]


@pytest.mark.parametrize(("template", "layout", "text", "expected"), READ)
def test_arbitrary_text(template: AbstractTemplate, layout: str, text: str, expected: Parsed | None) -> None:
    read = template.parse(text, layout)
    if expected is None:
        assert read.answer is None
    else:
        assert read == expected


def test_p70_no_credit_by_containment() -> None:
    """The gold answer stands in each of these texts, and none of them gives it."""
    for text in ("8", "18#18", "#8 apples, I think", "8#", "7#7#8", "8;8;8", "#8=8#8"):
        assert Plain().parse(text, "chain_then_answer").answer != "8"
    for text in ("8", "The answer is 8.", "Answer 8", "Answer: 18", "x Answer: 8", "Answer: 8 or 9", "Answer: 8\nno"):
        assert Alpaca().parse(text, "chain_then_answer").answer != "8"


PIECES = st.lists(
    st.sampled_from(
        ["#", "=", ":", ";", "9", " ", "\n", "\n\n", "Answer:", "Answer: ", "<think>", "</think>", "### Instruction:"]
    )
    | st.text(max_size=4),
    max_size=12,
).map("".join)


@given(PIECES, st.sampled_from(LAYOUTS), st.sampled_from(TEMPLATES))
def test_reading_never_fails_and_answers_are_whole_pieces_of_the_text(
    text: str, layout: str, template: AbstractTemplate
) -> None:
    read = template.parse(text, layout)
    assert read.chain == read.chain.strip() and read.chain in text
    assert read.answer is None or (read.answer and read.answer == read.answer.strip() and read.answer in text)


@given(PIECES, PIECES, st.sampled_from(LAYOUTS), st.sampled_from(TEMPLATES))
def test_a_found_answer_is_never_part_of_a_longer_one(
    chain: str, answer: str, layout: str, template: AbstractTemplate
) -> None:
    """Whatever stands behind the last mark of a chain-first text belongs to the answer."""
    read = template.parse(template.completion(chain, answer, layout), layout)
    if layout == "chain_then_answer" and read.answer is not None:
        assert template.completion(chain, answer, layout).rstrip().endswith(read.answer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_alphabet_holds_every_character_that_is_written(template: AbstractTemplate) -> None:
    for layout in LAYOUTS:
        written = template.prompt("") + template.completion("", "", layout) + template.step_separator
        assert set(written) <= set(template.alphabet)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_unknown_layout_is_refused(template: AbstractTemplate) -> None:
    with pytest.raises(ValueError, match="layout='chain_first': give one of chain_then_answer"):
        template.completion("5", "9", "chain_first")
    with pytest.raises(ValueError, match="layout='chain_first'"):
        template.parse("5#9", "chain_first")


def test_every_choice_of_the_config_is_a_template(repository: Path) -> None:
    """Chat, where it is a choice, needs its tokenizer and is built beside it."""
    for path in (repository / "conf/template").glob("*.yaml"):
        target = yaml.safe_load(path.read_text())["_target_"]
        if target is None:
            assert path.stem == "none"
            continue
        found = locate_target(target, "template", ("research.text.",))
        assert found.__name__.lower() == path.stem and issubclass(found, AbstractTemplate)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("template", [Plain(), Alpaca(), Think()], ids=lambda template: type(template).__name__)
def test_every_mark_spoils_a_chain_or_an_answer(template: AbstractTemplate, layout: str) -> None:
    marks = template.marks(layout)
    assert marks
    for mark in marks:
        parts = [(f"1\n{mark} 2", "3"), ("1", f"3\n{mark} 4")]
        parts = [("", answer) if layout == "answer_only" else (chain, answer) for chain, answer in parts]
        texts = [template.completion(chain, answer, layout) for chain, answer in parts]
        read = [template.parse(text, layout) for text in texts]
        assert any(one != Parsed(*part) for one, part in zip(read, parts, strict=True)), mark
