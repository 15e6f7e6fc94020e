"""Two modes in one training set: which half, what is written, how held-out problems are posed, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from research.data.traces import TraceData
from research.data.train_traces import reference_trace
from research.errors import ConfigError
from research.evaluation.sequences import SequenceEvaluation
from research.loops.scoring import obedience
from research.records import Sampling
from research.tasks.arithmetic import ChainedSums
from research.tasks.base import AbstractTask
from research.text.document import Document
from research.text.templates import Alpaca, Plain

TASK = ChainedSums(num_terms=3, highest=9)


def make(task: AbstractTask = TASK, template: Any = None, **changes: Any) -> TraceData:
    options = {"num_train": 31, "num_val": 6, "num_test": 4, "batch_size": 8, **changes}
    return TraceData(task=task, template=template or Plain(), **options)


def text_of(data: TraceData, document: Document) -> str:
    return str(data.codec.tokenizer.decode(document.ids[:-1]))


def posed(data: TraceData) -> str:
    return str(data.codec.tokenizer.decode(data.codec.prompt_ids("1+2")))


def test_half_of_the_traces_is_written_without_its_chain_and_says_so() -> None:
    data = make(modes="two")
    references = [reference_trace(problem) for problem in TASK.problems("train", 31)]
    texts = [text_of(data, document) for document in data.documents("train")]
    by_hand = {
        True: [f"{trace.problem}T={trace.chain}#{trace.answer}" for trace in references],
        False: [f"{trace.problem}N=#{trace.answer}" for trace in references],
    }
    thinks = ["T" in text for text in texts]
    assert texts == [by_hand[think][place] for place, think in enumerate(thinks)]
    assert thinks.count(False) == 15 and thinks.count(True) == 16
    assert len(data.documents("train")[0].completion_ids) < 20 and data.documents("train")[0].index == 0


def test_the_control_is_the_same_mixture_without_marks() -> None:
    marked, unmarked, other = make(modes="two"), make(modes="unmarked"), make(modes="two", format_seed=1)
    texts, plain, others = (
        [text_of(data, one) for one in data.documents("train")] for data in (marked, unmarked, other)
    )
    assert [text.replace("T=", "=").replace("N=", "=") for text in texts] == plain
    assert marked.facts() == unmarked.facts(), "students of one size"
    assert ["T" in text for text in texts] != ["T" in text for text in others]


def test_data_without_modes_know_no_marks() -> None:
    data = make()
    assert data.modes.asked is None and data.codec.mark == "" and posed(data) == "1+2="
    assert data.facts()["vocab_size"] == make(modes="two").facts()["vocab_size"] - 2
    assert data.codec.fingerprint() == make(mode="think").codec.fingerprint()


@pytest.mark.parametrize(
    ("options", "prompt", "chain"),
    [
        ({"modes": "two"}, "1+2T=", True),
        ({"modes": "two", "mode": "think"}, "1+2T=", True),
        ({"modes": "two", "mode": "no_think"}, "1+2N=", False),
        ({"modes": "unmarked", "mode": "no_think"}, "1+2=", False),
        ({"modes": "unmarked", "mode": "think"}, "1+2=", True),
        ({"mode": "no_think"}, "1+2=", True),  # a student of one mode: its trace format says what is written
    ],
)
def test_held_out_problems_are_posed_in_a_mode(options: dict[str, str], prompt: str, chain: bool) -> None:
    data = make(**options)
    assert posed(data) == prompt
    (document, *_), (problem, *_) = data.documents("val"), data.problems("val")
    mark = prompt.removeprefix("1+2")
    assert text_of(data, document) == f"{problem.text}{mark}{problem.chain if chain else ''}#{problem.answer}"
    rows = make(**options, num_prompts=4).prompts()
    assert data.codec.tokenizer.decode(rows[0].ids).endswith(mark)
    assert "T" not in rows[0].problem.text and "N" not in rows[0].problem.text, "the grader sees the problem alone"


def test_prompts_are_posed_in_both_modes_half_and_half() -> None:
    """The student and its teacher in the same mode, each in the words of its own template; held-out ones in think."""
    options = {"modes": "two", "mode": "both", "num_prompts": 4}
    data = make(**options)
    rows = data.prompts()
    ends = [data.codec.tokenizer.decode(row.ids)[-2:] for row in rows]
    assert sorted(set(ends)) == ["N=", "T="] and ends.count("N=") == len(rows) // 2
    assert all(row.ids == row.teacher_ids for row in rows) and posed(data) == "1+2T="
    assert ends == [data.codec.tokenizer.decode(row.ids)[-2:] for row in make(**options).prompts()], "seeded"
    other = make(**options, format_seed=1)
    assert ends != [other.codec.tokenizer.decode(row.ids)[-2:] for row in other.prompts()]
    in_words = {**options, "tokenizer": "bpe", "vocab_size": 300, "teacher_template": Alpaca()}
    data = make(**in_words)
    for row in data.prompts():
        mine, theirs = (data.codec.tokenizer.decode(ids) for ids in (row.ids, row.teacher_ids))
        assert (" /think\n" in theirs) == mine.endswith("T=") and (" /no_think\n" in theirs) == mine.endswith("N=")


class Colon(Plain):
    """Asks with a colon."""

    alphabet = f"{Plain.alphabet}:"

    def prompt(self, problem: str) -> str:
        return f"{problem}:"


def test_a_teacher_under_another_template_is_asked_for_the_same_mode() -> None:
    """Behind stored traces each in its own, behind held-out problems in the one that is asked for."""
    options = {"modes": "two", "mode": "no_think", "num_prompts": 4, "num_stored": 4}
    data = make(**options, teacher_template=Colon())
    rows, read = data.stored_rows(), data.codec.tokenizer.decode
    pairs = [(read(row.ids[: row.prompt_length]), read(row.teacher_prompt_ids)) for row in rows]
    assert all(theirs == f"{mine.removesuffix('=')}:" for mine, theirs in pairs)
    assert [mine[-2] for mine, _ in pairs].count("N") == 15 and len(pairs) == 31
    assert read(data.teacher_codec.prompt_ids("1+2")) == data.teacher_codec.prompt("1+2") == "1+2N:"
    unmarked = make(**{**options, "modes": "unmarked"}, teacher_template=Colon())
    assert unmarked.codec.tokenizer.decode(unmarked.stored_rows()[0].teacher_prompt_ids)[-2:].strip("0123456789") == ":"


def test_a_trace_without_chain_is_in_neither_mode() -> None:
    traces = [reference_trace(problem) for problem in TASK.problems("train", 8)]
    given = [trace if place % 4 else replace(trace, chain="") for place, trace in enumerate(traces)]
    data = make(modes="two").with_traces(given, seed=0)
    texts = [text_of(data, document) for document in data.documents("train")]
    assert len(texts) == 6 and sum("T" in text for text in texts) == 3
    assert data.summary()["dropped"]["train"] == {"empty_chain": 2}
    assert [document.index for document in data.documents("train")] == [1, 2, 3, 5, 6, 7]


def test_open_text_is_asked_in_words() -> None:
    data = make(modes="two", mode="no_think", template=Alpaca(), tokenizer="bpe", vocab_size=300)
    assert posed(data) == "### Instruction:\n1+2 /no_think\n\n### Response:\n"
    texts = [text_of(data, document) for document in data.documents("train")]
    think, without = ([text for text in texts if f" /{mode}\n" in text] for mode in ("think", "no_think"))
    assert len(think) == 16 and all(";" in text and "\n\nAnswer: " in text for text in think)
    assert len(without) == 15 and all("### Response:\nAnswer: " in text and ";" not in text for text in without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": "three"}, r"data\.modes is 'three'; expected null or one of two, unmarked"),
        ({"mode": "loud"}, r"data\.mode is 'loud'; expected null or one of think, no_think, both"),
        ({"mode": "both"}, r"data\.mode is both with data\.modes=None; two modes need data\.modes=two"),
        ({"modes": "unmarked", "mode": "both"}, r"data\.mode is both with data\.modes=unmarked"),
        ({"modes": "two", "trace_format": "answer_only"}, "trace_format=chain_then_answer"),
        ({"modes": "two", "trace_format": "answer_then_chain"}, "trace_format=chain_then_answer"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_task_that_writes_the_marks_itself_is_refused() -> None:
    class Lettered(ChainedSums):
        def __init__(self) -> None:
            super().__init__(num_terms=3, highest=9)
            self.alphabet = f"{self.alphabet}TX"

    with pytest.raises(ConfigError, match="marks prompts with T, N, and the task's own texts hold T"):
        make(Lettered(), modes="two").facts()


def test_obedience_is_the_share_in_the_mode_that_was_asked_for() -> None:
    empty: dict[str, Any] = {"items": {}, "samples": {}}
    greedy = SequenceEvaluation("test_a", {"test_a/outcome_no_chain": 0.2}, sampling=Sampling(), **empty)
    assert obedience(greedy, "think") == {"test_a/obedience": 0.8}
    assert obedience(greedy, "no_think") == {"test_a/obedience": 0.2} and obedience(greedy, None) == {}
    drawn = SequenceEvaluation("val", {"val/sampled_outcome_no_chain": 0.75}, sampling=Sampling(4, 1.0), **empty)
    assert obedience(drawn, "no_think") == {"val/sampled_obedience": 0.75}
