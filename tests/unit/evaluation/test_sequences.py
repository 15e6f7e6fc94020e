"""The evaluator of written answers against hand counts, on a ten-item task with a scripted writer."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from research.evaluation.completions import read_samples, readable, regrade, regurgitates, score, write_samples
from research.evaluation.sequences import (
    CHAIN_NAMES,
    GREEDY_NAMES,
    OUTCOME_NAMES,
    SAMPLE_COLUMNS,
    SAMPLED_NAMES,
    SEQUENCE_ITEM_COLUMNS,
    VOTED_ITEM_COLUMNS,
    evaluate_sequences,
    sequence_metric_names,
)
from research.generation.base import AbstractGenerator, Written
from research.records import Completion, Problem, Sampling, Verdict
from research.results.items import pack_items, read_items, write_items
from research.tasks.base import AbstractTask, StepReport
from research.tasks.grading import Grader
from research.tasks.word_problems import Gsm8k
from research.text.refusals import ControlToken
from research.text.template import AbstractTemplate, Parsed
from research.text.templates import Think


class Halving(AbstractTask):
    """Ten problems ``16``: halve until odd, ``8;4;2;1``; the answer is the last number."""

    name = "halving"
    checks_steps = True

    def problems(self, split="test", num=None, seed=0):
        return [self.problem(index, 2 ** (index % 4 + 2) * (2 * index + 3)) for index in range(10)]

    @staticmethod
    def problem(index, number):
        steps = [number]
        while steps[-1] % 2 == 0:
            steps.append(steps[-1] // 2)
        chain = ";".join(map(str, steps[1:]))
        return Problem(index, str(number), str(steps[-1]), chain, level=len(steps) - 1)

    def verify(self, problem, answer):
        if answer == "slow":
            return Verdict.TIMEOUT
        if answer is None or not answer.isdigit() or not problem.answer.isdigit():
            return Verdict.UNPARSED
        return Verdict.CORRECT if int(answer) == int(problem.answer) else Verdict.WRONG

    def verify_steps(self, problem, chain):
        steps = [int(step) for step in chain.split(";") if step.isdigit()]
        before = [int(problem.text), *steps]
        valid = [2 * after == start for start, after in itertools.pairwise(before)]
        wrong = valid.index(False) if False in valid else None
        return StepReport(len(steps), sum(valid), wrong, before[-1] % 2 == 0, str(steps[-1]) if steps else None)


class Arrow(AbstractTemplate):
    """``Q:16->`` then ``8;4;2;1=1``."""

    alphabet = "Q:->="
    step_separator = ";"

    def prompt(self, problem):
        return f"Q:{problem}->"

    def completion(self, chain, answer, layout):
        return f"={answer}" if layout == "answer_only" else f"{chain}={answer}"

    def parse(self, text, layout):
        chain, found, answer = text.partition("=")
        return Parsed(chain, answer) if found else Parsed(chain, None)


class Letters:
    """A codec that writes one id per character."""

    layout = "chain_then_answer"

    def prompt_ids(self, problem_text):
        return [ord(letter) for letter in Arrow().prompt(problem_text)]


class Scripted(AbstractGenerator):
    """Says what the script holds for each index, last prompt first; a text that ends in # is cut by the limit."""

    def __init__(self, script, with_ids=True):
        self.script, self.with_ids, self.prompts = script, with_ids, []
        self.identity = {"kind": "scripted"}

    def generate(self, prompts, sampling):
        self.prompts += prompts
        for prompt in reversed(prompts):
            yield Written(prompt.index, tuple(map(self.completion, self.script[prompt.index])))

    def completion(self, text):
        stop = "length" if text.endswith("#") else "eos"
        text = text.removesuffix("#")
        ids = (*map(ord, text), *([0] if stop == "eos" else []))
        return Completion(ids if self.with_ids else (), text, stop)


TASK = Halving()
PROBLEMS = TASK.problems()
GOLD = {problem.index: f"{problem.chain}={problem.answer}" for problem in PROBLEMS}
GREEDY = Sampling(max_new_tokens=64)


def grader(layout="chain_then_answer", task=TASK):
    return Grader(task, Arrow(), layout)


def greedy(changes, problems=PROBLEMS, **options):
    script = {index: [text] for index, text in {**GOLD, **changes}.items()}
    return evaluate_sequences(Scripted(script, **options), Letters(), grader(), problems, GREEDY, split="test")


def test_a_perfect_writer() -> None:
    result = greedy({})
    value = {name.removeprefix("test/"): number for name, number in result.metrics.items()}
    ones = {
        "accuracy", "step_validity", "chain_valid", "process_valid_pass_at_1", "chain_answer_agreement",
        "outcome_valid_right", *(f"accuracy_level_{level}" for level in (2, 3, 4, 5)),
    }  # fmt: skip
    counts = {"problems": 10, "problems_level_2": 3, "problems_level_3": 3, "problems_level_4": 2}
    counts |= {"problems_level_5": 2, "tokens_per_answer": sum(len(text) + 1 for text in GOLD.values()) / 10}
    assert {name for name, number in value.items() if number == 1.0} == ones
    assert {name: value[name] for name in counts} == counts
    assert all(number == 0 for name, number in value.items() if name not in ones | set(counts))
    assert result.omitted == {} and result.refused == ()
    assert set(value) == set(sequence_metric_names(GREEDY, [problem.level for problem in PROBLEMS]))


# index 0..3 are the problems 12, 40, 112, 288: answers 3, 5, 7, 9
FAULTS = {
    0: "6;3=4",  # wrong answer, valid chain that says otherwise
    1: "20;11;5=5",  # right answer, two wrong steps of three: luck
    2: "56;28;14;7=",  # no answer can be read
    3: "144;72;36;18;9=9#",  # cut off, though complete
    4: "=11",  # right without any chain
    5: GOLD[5] + "\nQ:16->",  # goes on with a prompt of its own
    6: "1;" * 40,  # loops
    7: "slow=slow",
}


def test_every_rate_by_hand() -> None:
    result = greedy(FAULTS)
    value = {name.removeprefix("test/"): number for name, number in result.metrics.items()}
    assert [verdict for verdict in result.items["verdict"]] == [
        "wrong", "correct", "unparsed", "truncated", "correct", "unparsed", "unparsed", "timeout", "correct", "correct",
    ]  # fmt: skip
    assert (value["accuracy"], value["errors"]) == (0.4, 6)
    assert (value["unparsed"], value["truncated"], value["timeout"]) == (0.3, 0.1, 0.1)
    assert value["repetition"] == 0.1 and value["regurgitation"] == 0.1
    assert value["process_valid_pass_at_1"] == 0.2  # 8 and 9
    assert value["invalid_given_right"] == 0.5  # 1 and 4 of 1, 4, 8, 9
    assert value["chain_valid"] == 0.6  # 0, 2, 3, 5, 8, 9
    steps = np.array([[2, 2], [1, 3], [4, 4], [5, 5], [3, 3], [0, 40], [2, 2], [3, 3]])
    steps[4] = [len(PROBLEMS[5].chain.split(";"))] * 2
    steps[6:] = [[len(PROBLEMS[index].chain.split(";"))] * 2 for index in (8, 9)]
    assert value["step_validity"] == pytest.approx(steps[:, 0].sum() / steps[:, 1].sum())
    assert value["chain_answer_agreement"] == 0.8  # 0 disagrees; 1, 3, 8, 9 agree; the others cannot be compared
    assert sum(value[name] for name in OUTCOME_NAMES) == pytest.approx(1)
    assert value["outcome_lucky_answer"] == 0.1 and value["outcome_no_chain"] == 0.1
    assert value["accuracy_level_2"] == pytest.approx(2 / 3) and value["problems_level_2"] == 3  # of 0, 4, 8


def test_items_join_as_every_run_does_and_keep_the_completion(tmp_path) -> None:
    result = greedy(FAULTS)
    assert tuple(result.items) == SEQUENCE_ITEM_COLUMNS and tuple(result.samples) == SAMPLE_COLUMNS
    items = read_items(write_items(tmp_path / "items.parquet", result.items))
    assert items["index"].tolist() == list(range(10))
    assert pack_items("test", {"run": items}).wrong("run").mean() == pytest.approx(1 - result.metrics["test/accuracy"])
    assert items["completion"][1] == "20;11;5=5" and items["gold"][1] == "5" and items["answer"][6] == ""
    assert (items["chain_valid"][1], items["num_steps"][1], items["num_valid"][1]) == (0, 3, 1)
    assert items["chain_valid"][4] == -1 and items["tokens"][3] == len("144;72;36;18;9=9")
    assert items["level"].tolist() == [problem.level for problem in PROBLEMS]


def test_verdicts_can_be_given_again_from_the_items(tmp_path) -> None:
    items = read_items(write_items(tmp_path / "items.parquet", greedy(FAULTS).items))
    assert [verdict.value for verdict in regrade(grader(), PROBLEMS, items)] == items["verdict"].tolist()
    items["completion"][0] = "6;3=3"
    assert regrade(grader(), PROBLEMS, items)[0] is Verdict.CORRECT  # it is the text that is judged
    with pytest.raises(ValueError, match="no problem has the index 0"):
        regrade(grader(), PROBLEMS[1:], items)


@pytest.mark.parametrize("gold", ["", "??"])
def test_p66_an_unreadable_gold_answer_is_counted_and_never_rewarded(gold: str) -> None:
    problems = [replace(PROBLEMS[0], answer=gold), *PROBLEMS[1:]]
    result = greedy({0: f"6;3={gold}"}, problems)
    assert result.refused == (0,) and result.metrics["test/gold_unreadable"] == 1
    assert result.metrics["test/problems"] == 9 and result.metrics["test/accuracy"] == 1.0
    assert 0 not in result.items["index"] and 0 not in result.samples["index"]
    with pytest.raises(ValueError, match="gold answers of 1 cannot be read"):
        readable(grader(), problems[:1])


def test_refused_problems_are_not_written_for() -> None:
    generator = Scripted({index: [text] for index, text in GOLD.items()})
    problems = [replace(PROBLEMS[0], answer="?"), *PROBLEMS[1:]]
    evaluate_sequences(generator, Letters(), grader(), problems, GREEDY, split="test")
    assert [prompt.index for prompt in generator.prompts] == list(range(1, 10))
    assert generator.prompts[0].text == "Q:40->" and generator.prompts[0].ids == tuple(map(ord, "Q:40->"))


class Narrow(Letters):
    """A codec that cannot write the problem 112."""

    def prompt_ids(self, problem_text):
        if problem_text == "112":
            raise ControlToken("it holds a control token")
        return super().prompt_ids(problem_text)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(2, 1.0)])
def test_prompts_that_cannot_be_asked_are_not_right_and_counted_by_reason(sampling, caplog) -> None:
    """Of the prompts Q:12-> to Q:544->, with 6 or 7 ids, those of 7 leave the writer no room."""
    script = {index: [text] * sampling.num_samples for index, text in GOLD.items()}
    generator = Scripted(script)
    generator.longest_prompt = 6
    overlong = [problem.index for problem in PROBLEMS if len(problem.text) > 2 and problem.index != 2]
    result = evaluate_sequences(generator, Narrow(), grader(), PROBLEMS, sampling, split="test")
    start = "test/sampled_" if sampling.num_samples > 1 else "test/"
    value = {name.removeprefix(start): number for name, number in result.metrics.items()}
    unasked = {2, *overlong}
    assert len(overlong) == 5
    assert sorted(prompt.index for prompt in generator.prompts) == sorted(set(range(10)) - unasked)
    assert value["refused_prompts_control_token"] == 1 and value["refused_prompts_too_long"] == len(overlong)
    right = value["accuracy" if sampling is GREEDY else "pass_at_1"]
    assert value["problems"] == 10 and right == 1 - len(unasked) / 10 and value["unparsed"] == len(unasked) / 10
    lengths = [len(GOLD[index]) + 1 for index in range(10) if index not in unasked]
    assert value["tokens_per_answer"] == sum(lengths) / len(lengths) and not result.omitted
    levels = [problem.level for problem in PROBLEMS]
    names = sequence_metric_names(sampling, levels, ("too_long", "control_token"))
    assert set(result.metrics) == {f"test/{name}" for name in names}
    rows = dict(zip(result.samples["index"].tolist(), result.samples["stop"].tolist(), strict=False))
    assert rows[2] == "control_token" and {rows[index] for index in overlong} == {"too_long"}
    assert f"{len(unasked)} of 10 prompts cannot be asked" in caplog.text
    if sampling is GREEDY:
        assert regrade(grader(), PROBLEMS, result.items)[2] is Verdict.UNPARSED


def test_a_vote_is_the_box_and_not_the_prose_around_it() -> None:
    problem = Problem(0, "What is 9 + 9?", "18")
    texts = ("So \\boxed{18}.", "That makes $\\boxed{18}$", "18", "No: \\boxed{8}", "\\boxed{}")
    completions = [Completion((), f"<think>\n9 + 9\n</think>\n\n{text}", "eos") for text in texts]
    votes = [one.vote for one in score(Grader(Gsm8k(), Think(), "chain_then_answer"), problem, completions)]
    assert votes == ["18", "18", "18", "8", None]


def test_rows_are_in_order_whatever_the_order_of_problems() -> None:
    assert greedy(FAULTS, PROBLEMS[::-1]).items["verdict"].tolist() == greedy(FAULTS).items["verdict"].tolist()


def test_what_does_not_exist_is_omitted_with_its_reason() -> None:
    script = {index: ["=1#"] for index in GOLD}
    result = evaluate_sequences(Scripted(script), Letters(), grader(), PROBLEMS, GREEDY, split="val")
    assert result.omitted == {
        "val/step_validity": "no completion writes a step",
        "val/invalid_given_right": "no right answer has a chain that could be checked",
        "val/chain_answer_agreement": "no completion has both an answer and a chain that ends in a value",
    }
    text_only = greedy({}, with_ids=False)
    assert set(text_only.omitted) == {"test/repetition", "test/tokens_per_answer"}
    assert set(text_only.items["tokens"]) == {-1}
    codec = Letters()
    codec.layout = "answer_only"
    script = {problem.index: [f"={problem.answer}"] for problem in PROBLEMS}
    result = evaluate_sequences(Scripted(script), codec, grader("answer_only"), PROBLEMS, GREEDY, split="test")
    assert {name.removeprefix("test/") for name in result.omitted} == set(CHAIN_NAMES)
    assert result.metrics["test/accuracy"] == result.metrics["test/outcome_no_chain"] == 1.0
    assert len(result.metrics) + len(result.omitted) == len(sequence_metric_names(GREEDY, (2, 3, 4, 5)))


SAMPLED = Sampling(num_samples=6, temperature=0.7, top_p=0.9, max_new_tokens=32, seed=5)


def sampled(problems=PROBLEMS[:2]):
    script = {
        0: ["6;3=3", "6;2=2", "6;2=2", "=", "=", "="],  # the majority of readable answers is wrong
        1: ["=7#", "=7#", "=7#", "20;10;5=5", "1;5=5", "20;10;5=4"],  # what was cut off does not vote
    }
    return evaluate_sequences(Scripted(script), Letters(), grader(), problems, SAMPLED, split="test")


def test_sampled_scores_by_hand() -> None:
    result = sampled()
    value = {name.removeprefix("test/sampled_"): number for name, number in result.metrics.items()}
    assert value["pass_at_1"] == pytest.approx((1 / 6 + 2 / 6) / 2)
    subsets = list(itertools.combinations(range(6), 4))
    share = [sum(any(place < right for place in subset) for subset in subsets) / len(subsets) for right in (1, 2)]
    assert value["pass_at_4"] == pytest.approx(sum(share) / 2)
    assert value["pass_at_6"] == 1.0
    assert value["cons_at_6"] == 0.5  # problem 1 alone
    assert value["cons_at_2"] == pytest.approx((1 / 3 + 2 / 3) / 2)  # groups of two: 3,2 | 2,- | -,-; -,- | -,5 | 5,4
    assert value["truncated"] == 3 / 12 and value["unparsed"] == 3 / 12
    assert value["process_valid_pass_at_1"] == 2 / 12 and value["invalid_given_right"] == pytest.approx(1 / 3)
    assert value["pass_at_1_level_2"] == pytest.approx(1 / 6) and value["problems_level_2"] == 1
    assert result.sampling == SAMPLED
    assert set(result.metrics) == {f"test/{name}" for name in sequence_metric_names(SAMPLED, (2, 3))}


def test_sampled_items_and_samples(tmp_path) -> None:
    result = sampled()
    assert tuple(result.items) == VOTED_ITEM_COLUMNS
    assert result.items["prediction"].tolist() == [0, 1] and result.items["answer"].tolist() == ["2", "5"]
    assert result.items["num_right"].tolist() == [1, 2] and result.items["num_samples"].tolist() == [6, 6]
    columns, sampling = read_samples(write_samples(tmp_path / "samples.parquet", result.samples, result.sampling))
    assert sampling == SAMPLED and tuple(columns) == SAMPLE_COLUMNS
    assert columns["index"].tolist() == [0] * 6 + [1] * 6 and columns["sample"].tolist() == [*range(6)] * 2
    assert [verdict.value for verdict in regrade(grader(), PROBLEMS, columns)] == columns["verdict"].tolist()
    with pytest.raises(ValueError, match="no sampling"):
        read_samples(write_items(tmp_path / "items.parquet", result.items))


def test_one_sample_at_a_temperature_is_a_sampled_score() -> None:
    script = {index: [text] for index, text in GOLD.items()}
    sampling = replace(GREEDY, temperature=1.0)
    result = evaluate_sequences(Scripted(script), Letters(), grader(), PROBLEMS, sampling, split="test")
    assert "test/accuracy" not in result.metrics and result.metrics["test/sampled_pass_at_1"] == 1.0


def test_half_a_surrogate_pair_does_not_stop_the_writer(tmp_path) -> None:
    result = greedy({0: "6;3=3\ud800"})
    back = read_items(write_items(tmp_path / "items.parquet", result.items))
    assert back["completion"][0] == "6;3=3?"


class Careless(Scripted):
    def __init__(self, change):
        super().__init__({index: [text] for index, text in GOLD.items()})
        self.change = change

    def generate(self, prompts, sampling):
        return self.change(list(super().generate(prompts, sampling)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda written: written[1:], r"left out 1 of 10 prompts, index \[9\]"),
        (lambda written: written + written[:1], "prompt 9 unasked or twice"),
        (lambda written: [*written, Written(77, written[0].completions)], "prompt 77 unasked or twice"),
        (lambda written: [replace(written[0], completions=()), *written[1:]], "0 completions for prompt 9"),
    ],
)
def test_a_careless_generator_is_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_sequences(Careless(change), Letters(), grader(), PROBLEMS, GREEDY, split="test")


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="index 3 stands for 2 problems"):
        greedy({}, [*PROBLEMS, PROBLEMS[3]])
    with pytest.raises(ValueError, match="no problem to score"):
        greedy({}, [])
    with pytest.raises(ValueError, match="the layout 'chain_then_answer'"):
        evaluate_sequences(Scripted({}), Letters(), grader("answer_only"), PROBLEMS, GREEDY, split="test")
    with pytest.raises(ValueError, match="without '/'"):
        evaluate_sequences(Scripted({}), Letters(), grader(), PROBLEMS, GREEDY, split="test/a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6;3=3", False),
        ("6;3=3Q:40->", True),  # a new prompt
        ("6;3=3->", True),
        ("12;6;3=3", True),  # the problem again
    ],
)
def test_regurgitation(text: str, expected: bool) -> None:
    assert regurgitates(Arrow(), PROBLEMS[0], text) is expected


def test_what_the_reference_writes_is_no_regurgitation() -> None:
    restated = replace(PROBLEMS[0], chain="12;6;3")
    assert not regurgitates(Arrow(), restated, "12;6;3=3")
    unknown = replace(PROBLEMS[0], text="four and eight", chain="")
    assert not regurgitates(Arrow(), unknown, "4->12=3")  # two characters prove nothing without a reference
    assert regurgitates(Arrow(), unknown, "four and eight=3")


def test_the_frozen_names() -> None:
    answer = ("problems", "gold_unreadable", "unparsed", "truncated", "timeout", "repetition", "tokens_per_answer")
    chain = ("step_validity", "chain_valid", "process_valid_pass_at_1", "invalid_given_right", "chain_answer_agreement")
    shared = (*answer, "regurgitation", *chain, *OUTCOME_NAMES)
    assert ("accuracy", "errors", *shared) == GREEDY_NAMES
    assert ("sampled_pass_at_1", *(f"sampled_{name}" for name in shared)) == SAMPLED_NAMES
    assert sequence_metric_names(Sampling(num_samples=6, temperature=1))[len(SAMPLED_NAMES) :] == (
        "sampled_pass_at_2", "sampled_pass_at_4", "sampled_pass_at_6",
        "sampled_cons_at_2", "sampled_cons_at_4", "sampled_cons_at_6",
    )  # fmt: skip
