"""From generator to store: every trace graded, counted once, and the same rows however often the run was cut."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from research.errors import ConfigError
from research.generation.base import AbstractGenerator, Prompt, Written
from research.generation.in_process import LocalGenerator
from research.records import Completion, Problem, Sampling, Verdict
from research.tasks.arithmetic import ChainedSums
from research.tasks.grading import Grader
from research.text.codec import Codec
from research.text.templates import Plain
from research.text.tokenizer import build_tokenizer
from research.traces.corruptions import Corruption
from research.traces.filters import build_filters
from research.traces.importing import TraceImport
from research.traces.journal import JOURNAL_FILE, Cost, Journal
from research.traces.manifest import StoreManifest
from research.traces.rows import StoredTrace
from research.traces.sources import AbstractSource, FileSource, ReferenceSource, TeacherSource
from research.traces.store import StoreWriter, TraceStore
from research.traces.writer import write_traces

SETTINGS = {"made": "by a test"}
SAMPLING = Sampling(num_samples=2, temperature=1.0, max_new_tokens=9)
FILTERS = ("answer_key", "step_verifier", "duplicates")


def script(prompt: Prompt, sample: int) -> str:
    """By problem: right, right by a wrong step, wrong, without answer, cut off, without chain, a broken character."""
    n = prompt.index
    second = {
        1: f"9;{2 * n}#{2 * n}",
        2: f"{n};9#9",
        3: f"{n};{2 * n}",
        4: f"{n};{2 * n}...",
        5: f"#{2 * n}",
        6: "\udc80#6",
    }
    return second.get(n, f"{n};{2 * n}#{2 * n}") if sample else f"{n};{2 * n}#{2 * n}"


def source_of(ten: Any, generator: AbstractGenerator, **options: Any) -> TeacherSource:
    grader = Grader(ten, Plain(), "chain_then_answer")
    return TeacherSource(ten.problems("train"), generator, grader, SAMPLING, **{"block_problems": 4, **options})


def write(folder: Path, source: AbstractSource, filters: Sequence[Any] = FILTERS, **options: Any) -> StoreManifest:
    with StoreWriter(folder, SETTINGS) as writer:
        return write_traces(source, build_filters(filters), writer, **options)


def rows_in(folder: Path) -> list[StoredTrace]:
    return list(TraceStore(folder).rows())


# -- one run -----------------------------------------------------------------------------------------------------------


def test_every_completion_is_graded_and_stored_in_order(ten: Any, scripted: Any, tmp_path: Path) -> None:
    manifest = write(tmp_path, source_of(ten, scripted(script)))
    rows = rows_in(tmp_path)
    assert [(row.trace.index, row.trace.sample) for row in rows] == [(n, s) for n in range(10) for s in (0, 1)]
    reasons = {(row.trace.index, row.trace.sample): row.reason for row in rows if row.reason}
    assert reasons == {
        (0, 1): "duplicates", (1, 1): "step_verifier", (2, 1): "answer_key", (3, 1): "no_answer", (4, 1): "truncated",
        (5, 1): "empty_chain", (6, 1): "not_unicode", (7, 1): "duplicates", (8, 1): "duplicates", (9, 1): "duplicates",
    }  # fmt: skip
    tally = manifest.tally
    assert (tally.problems, tally.written, tally.kept) == (10, 20, 10)
    assert sum(tally.dropped.values()) == 10 and tally.dropped["duplicates"] == 4
    assert len(manifest.shards) == 3 and manifest.complete


def test_a_row_says_what_was_written_and_found(ten: Any, scripted: Any, tmp_path: Path) -> None:
    write(tmp_path, source_of(ten, scripted(script)))
    row = rows_in(tmp_path)[3]
    assert (row.trace.problem, row.trace.chain, row.trace.answer, row.text) == ("dbl1", "9;2", "2", "9;2#2")
    assert (row.verdict, row.kept, row.tokens, row.logprob) == (Verdict.CORRECT, False, 6, -2.5)
    assert row.trace.details == {
        "origin": "teacher", "gold": "2", "outcome": "lucky_answer", "stop": "eos",
        "steps": {"num_steps": 2, "num_valid": 1, "first_wrong": 0, "skipped": False, "result": "2"},
    }  # fmt: skip


@pytest.mark.parametrize("filters", [["answer_key"], []])
def test_p66_an_unreadable_gold_answer_is_never_a_trace(
    filters: list[str], ten_but_7: Any, scripted: Any, tmp_path: Path
) -> None:
    """Whatever the filters: the teacher would say what the gold answer says, and it is not even asked."""
    teacher = scripted(lambda prompt, sample: "7;14#??")
    manifest = write(tmp_path, source_of(ten_but_7, teacher), filters)
    (row,) = (row for row in rows_in(tmp_path) if row.trace.index == 7)
    assert (row.trace.answer, row.kept, row.reason) == ("", False, "gold_unreadable")
    assert 7 not in teacher.asked and manifest.tally.dropped["gold_unreadable"] == 1


class FailingGrader(Grader):
    """A verifier that breaks, as one does whose optional package is absent."""

    def grade(self, problem: Problem, completion: Completion) -> Any:
        if problem.index == 5:
            raise ConfigError("the verifier needs a package that is not installed")
        return super().grade(problem, completion)


def test_p71_a_broken_verifier_stops_the_run_and_is_no_wrong_answer(ten: Any, scripted: Any, tmp_path: Path) -> None:
    generator = scripted(script)
    grader = FailingGrader(ten, Plain(), "chain_then_answer")
    source = TeacherSource(ten.problems("train"), generator, grader, SAMPLING, block_problems=4)
    with pytest.raises(ConfigError, match="not installed"):
        write(tmp_path, source)
    with StoreWriter(tmp_path, SETTINGS) as writer:
        assert writer.finished == 1 and {row.trace.index for row in writer.rows()} == {0, 1, 2, 3}
    resumed = scripted(script)
    write(tmp_path, source_of(ten, resumed))
    assert resumed.asked == [9, 8], "what was written before the verifier broke is not asked for again"


def test_dropped_traces_can_be_left_out_and_are_counted_all_the_same(ten: Any, scripted: Any, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", source_of(ten, scripted(script)))
    kept = write(tmp_path / "kept", source_of(ten, scripted(script)), keep_dropped=False)
    assert kept.tally == whole.tally and kept.rows == 10
    assert rows_in(tmp_path / "kept") == list(TraceStore(tmp_path / "whole").rows(kept=True))


def test_a_finished_store_is_left_alone(ten: Any, scripted: Any, tmp_path: Path) -> None:
    write(tmp_path, source_of(ten, scripted(script)))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    again = scripted(script)
    assert write(tmp_path, source_of(ten, again)).complete and again.asked == []
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}


def test_a_filter_without_its_evidence_is_refused_before_anything_is_asked(
    ten: Any, scripted: Any, tmp_path: Path
) -> None:
    generator = scripted(script)
    with pytest.raises(ConfigError, match="length judges by tokens"):
        write(tmp_path, source_of(ten, generator), ["length"])
    assert generator.asked == []


# -- cut and gone on with ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", range(10))
def test_a_generator_that_goes_away_loses_and_doubles_nothing(
    stop_after: int, ten: Any, scripted: Any, tmp_path: Path
) -> None:
    whole = write(tmp_path / "whole", source_of(ten, scripted(script)))
    first, second = scripted(script, stop_after=stop_after), scripted(script)
    with pytest.raises(ConnectionError, match="the server is gone"):
        write(tmp_path / "cut", source_of(ten, first))
    cut = write(tmp_path / "cut", source_of(ten, second))
    assert rows_in(tmp_path / "cut") == rows_in(tmp_path / "whole")
    assert cut.tally == whole.tally, "the duplicates of the first part are known to the second"
    assert sorted(first.asked + second.asked) == list(range(10)), "every problem is asked for once"
    assert not (tmp_path / "cut" / JOURNAL_FILE).exists()


def test_duplicates_across_a_cut_are_known_without_the_dropped_rows(ten: Any, scripted: Any, tmp_path: Path) -> None:
    filters = [{"name": "duplicates", "with_problem": False}]
    same = scripted(lambda prompt, sample: "1;2#2", stop_after=5)
    with pytest.raises(ConnectionError):
        write(tmp_path, source_of(ten, same), filters, keep_dropped=False)
    manifest = write(tmp_path, source_of(ten, scripted(lambda p, s: "1;2#2")), filters, keep_dropped=False)
    assert (manifest.tally.kept, manifest.tally.dropped) == (1, {"duplicates": 19})


def test_a_half_line_of_the_journal_is_asked_for_again(ten: Any, scripted: Any, tmp_path: Path) -> None:
    first = scripted(script, stop_after=6)  # problems 7 and 6 of the second block
    with pytest.raises(ConnectionError):
        write(tmp_path, source_of(ten, first))
    journal = tmp_path / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-10])
    second = scripted(script)
    write(tmp_path, source_of(ten, second))
    assert second.asked == [6, 5, 4, 9, 8]
    write(tmp_path / "whole", source_of(ten, scripted(script)))
    assert rows_in(tmp_path) == rows_in(tmp_path / "whole")


def test_a_journal_of_another_run_or_of_a_finished_block_is_not_used(tmp_path: Path) -> None:
    written = Written(3, (Completion((1, 2), "text \udc80", "eos", -1.5), Completion((), "", "length", None)))
    journal = Journal(tmp_path / JOURNAL_FILE, "these")
    assert journal.open(0)[0] == {}
    journal.append(written, Cost(7.0, 5.0, 0.25))
    journal.close()
    for settings, block in (("those", 0), ("these", 1)):
        before = (tmp_path / JOURNAL_FILE).read_bytes()
        other = Journal(tmp_path / JOURNAL_FILE, settings)
        assert other.open(block)[0] == {}
        other.close()
        (tmp_path / JOURNAL_FILE).write_bytes(before)
    found, cost = journal.open(0)
    journal.close()
    assert found == {3: written} and cost == Cost(7.0, 5.0, 0.25), "token by token, as it was"
    with pytest.raises(RuntimeError, match="before its block was opened"):
        Journal(tmp_path / "other", "these").append(written, Cost())


# -- generators that do not keep their word ----------------------------------------------------------------------------


class Unruly(AbstractGenerator):
    """Gives what it is told to, whatever it was asked for."""

    def __init__(self, given: Sequence[tuple[int, int]]) -> None:
        self.given, self.identity = given, {}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        for index, number in self.given:
            yield Written(index, (Completion((1,), "1;2#2", "eos"),) * number)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([(0, 2), (0, 2)], "gave problem 0, which was not asked for or came before"),
        ([(99, 2)], "gave problem 99, which was not asked for"),
        ([(0, 1)], "gave 1 completions of problem 0; expected 2"),
        ([(0, 3)], "gave 3 completions of problem 0; expected 2"),
        ([(0, 2), (1, 2)], "ended without 2 of 4 problems, 2 first"),
    ],
)
def test_a_generator_that_gives_something_else_is_refused(
    given: list[tuple[int, int]], told: str, ten: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        write(tmp_path, source_of(ten, Unruly(given)))


def test_a_problem_that_cannot_be_posed_is_counted(sums_codec: Codec, scripted: Any, tmp_path: Path) -> None:
    sums = ChainedSums()
    problems = sums.problems("train", 4)
    problems[2] = replace(problems[2], text="17 plus 3")
    grader = Grader(sums, Plain(), "chain_then_answer")
    right = {problem.index: f"{problem.chain}#{problem.answer}" for problem in problems}
    generator = scripted(lambda prompt, sample: right[prompt.index])
    source = TeacherSource(problems, generator, grader, SAMPLING, codec=sums_codec)
    manifest = write(tmp_path, source, ["answer_key"])
    assert sorted(generator.asked) == [0, 1, 3]
    assert manifest.tally.dropped == {"unknown_character": 1} and manifest.tally.kept == 6
    (barred,) = [row for row in rows_in(tmp_path) if not row.kept]
    assert barred.trace.problem == "17 plus 3" and barred.text == ""


def test_a_prompt_without_room_for_an_answer_is_counted_and_the_others_are_asked(tmp_path: Path) -> None:
    """A model of 40 places: the prompt of 40 tokens fills it, that of 39 leaves room for one token."""
    sums = ChainedSums()
    tokenizer = build_tokenizer("characters", alphabet=str(sums.alphabet) + Plain.alphabet)
    codec = Codec(tokenizer, Plain(), max_tokens=2**20)
    config = LlamaConfig(
        vocab_size=codec.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=40,
    )  # fmt: skip
    generator = LocalGenerator(LlamaForCausalLM(config), codec)
    problems = sums.problems("train", 3)
    texts = [problems[0].text, "1" * 39, "1" * 38]
    problems = [replace(problem, text=text) for problem, text in zip(problems, texts, strict=True)]
    assert [len(codec.prompt_ids(text)) for text in texts[1:]] == [40, 39]
    grader = Grader(sums, Plain(), "chain_then_answer")
    source = TeacherSource(problems, generator, grader, Sampling(2, 1.0, max_new_tokens=50), codec=codec)
    tally = write(tmp_path, source, []).tally
    assert tally.dropped["too_long"] == 1 and tally.written == 5 and tally.problems == 3
    rows = [(row.trace.index, row.reason, row.text) for row in rows_in(tmp_path)]
    assert [row for row in rows if row[1] == "too_long"] == [(1, "too_long", "")]
    assert [index for index, *_ in rows] == [0, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="prompt 1 has 40 tokens and the model's context is 40"):
        generator.generate([Prompt(1, "", tuple(codec.prompt_ids(texts[1])))], SAMPLING)


def test_a_chat_server_gets_the_problem_without_a_template(ten: Any, scripted: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    def spy(prompt: Prompt, sample: int) -> str:
        seen.append(prompt.text)
        return script(prompt, 0)

    for endpoint, expected in (("chat", "dbl0"), ("completions", "dbl0=")):
        generator = scripted(spy)
        generator.identity = {"endpoint": endpoint}
        seen.clear()
        write(tmp_path / endpoint, source_of(ten, generator))
        assert expected in seen


# -- error channels and the task's own solutions -----------------------------------------------------------------------


def test_the_tasks_own_solutions_are_traces(sums: ChainedSums, sums_codec: Codec, tmp_path: Path) -> None:
    problems = sums.problems("train", 50)
    source = ReferenceSource(problems, Grader(sums, Plain(), "chain_then_answer"), codec=sums_codec, block_problems=20)
    manifest = write(tmp_path, source)
    assert manifest.tally.kept == 50 and manifest.tally.outcomes == {"valid_right": 50} and len(manifest.shards) == 3
    row = rows_in(tmp_path)[7]
    assert (row.trace.problem, row.trace.chain) == (problems[7].text, problems[7].chain)
    assert row.text == f"{problems[7].chain}#{problems[7].answer}"
    assert row.tokens == len(sums_codec.encode(row.trace).completion_ids) and row.trace.details["level"] == 5


def test_c22_an_answer_key_passes_what_a_step_verifier_drops(
    sums: ChainedSums, sums_codec: Codec, scripted: Any, tmp_path: Path
) -> None:
    """The same error channel on the task's solutions and behind a teacher that is always right."""
    problems = sums.problems("train", 200)
    grader = Grader(sums, Plain(), "chain_then_answer")
    right = {problem.index: f"{problem.chain}#{problem.answer}" for problem in problems}
    corruption = Corruption({"compensating_pair": 0.5, "wrong_step": 0.25}, seed=0)
    options: dict[str, Any] = {"codec": sums_codec, "corruption": corruption}
    reference = ReferenceSource(problems, grader, **options)
    sampling = Sampling(num_samples=1)
    teacher = TeacherSource(problems, scripted(lambda p, s: right[p.index]), grader, sampling, **options)
    kept = {}
    for name, source in (("reference", reference), ("teacher", teacher)):
        for filters in (["answer_key"], ["answer_key", "step_verifier"]):
            tally = write(tmp_path / f"{name}_{len(filters)}", source, filters).tally
            kept[name, len(filters)] = tally.kept_outcomes
            pairs, wrong = tally.corruptions["compensating_pair"], tally.corruptions["wrong_step"]
            assert tally.dropped["answer_key"] == wrong and tally.written == 200
    key, verifier = kept["reference", 1], kept["reference", 2]
    assert key == {"lucky_answer": pairs, "valid_right": 200 - pairs - wrong} and 60 < pairs < 140
    assert verifier == {"valid_right": 200 - pairs - wrong}
    assert kept["teacher", 1] == key and kept["teacher", 2] == verifier
    spoilt = next(row for row in rows_in(tmp_path / "teacher_1") if row.trace.details.get("corruption") == "wrong_step")
    assert spoilt.text == f"{spoilt.trace.chain}#{spoilt.trace.answer}", "the text is what the student would read"
    assert spoilt.logprob is None, "nobody drew it"


# -- files -------------------------------------------------------------------------------------------------------------


def test_columns_of_theirs_stop_no_import_and_enter_no_count(tmp_path: Path) -> None:
    theirs = {"verdict": "excellent", "outcome": ["lucky_answer"], "corruption": {"kind": "typo"}, "origin": "here"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "q", "chain": "c", "answer": "a"} | theirs) + "\n")
    source = FileSource(TraceImport(path))
    tally = write(tmp_path / "store", source, ["duplicates"]).tally
    (row,) = TraceStore(tmp_path / "store").rows()
    assert row.trace.details == {"row": theirs, "origin": "file"} and row.verdict is None
    assert tally.verdicts == {"none": 1} and tally.outcomes == tally.corruptions == {}
    assert "verdict" not in source.gives, "nobody has verified them"


def test_a_file_becomes_a_store_and_its_bad_rows_are_in_the_ledger(tmp_path: Path) -> None:
    good = [{"question": f"q{n}", "cot": f"c{n % 3}", "answer": n, "correct": n % 4 != 0} for n in range(10)]
    lines = [json.dumps(row) for row in good]
    lines[5:5] = ["{", '{"question": "q"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, "[]"]))
    source = FileSource(TraceImport(path, tmp_path / "aside.jsonl"), block_rows=4)
    manifest = write(tmp_path / "store", source, ["answer_key", {"name": "duplicates", "with_problem": False}])
    tally = manifest.tally
    assert tally.dropped == {
        "answer_key": 3, "quarantine_not_json": 1, "quarantine_no_answer": 1, "quarantine_not_an_object": 1,
    }  # fmt: skip
    assert tally.written == 13 == tally.kept + sum(tally.dropped.values()) and manifest.rows == 10
    assert [row.trace.answer for row in TraceStore(tmp_path / "store").rows(kept=True)] == [
        "1",
        "2",
        "3",
        "5",
        "6",
        "7",
        "9",
    ]
    assert len((tmp_path / "aside.jsonl").read_text().splitlines()) == 3


def test_a_cut_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join("{" if n == 6 else json.dumps({"q": 0, "prompt": n, "cot": "c", "answer": n}) for n in range(20))
    )
    whole = write(tmp_path / "whole", FileSource(TraceImport(path), block_rows=4), [])
    calls = iter(range(10))
    write_shard = StoreWriter.write

    def cut(self: StoreWriter, *arguments: Any, **cost: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        write_shard(self, *arguments, **cost)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "cut", FileSource(TraceImport(path), block_rows=4), [])
    resumed = write(tmp_path / "cut", FileSource(TraceImport(path), block_rows=4), [])
    assert resumed.tally == whole.tally and rows_in(tmp_path / "cut") == rows_in(tmp_path / "whole")


def test_unverified_rows_cannot_be_filtered_by_an_answer_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "cot": "c", "answer": "a"}')
    with pytest.raises(ConfigError, match="answer_key judges by verdict"):
        write(tmp_path / "store", FileSource(TraceImport(path)), ["answer_key"])


def test_progress_counts_what_an_earlier_process_did(ten: Any, scripted: Any, tmp_path: Path) -> None:
    class Counted:
        problems = tokens = written = kept = 0

        def advance(self, problems: int, tokens: int) -> None:
            self.problems += problems
            self.tokens += tokens

        def judged(self, written: int, kept: int) -> None:
            self.written += written
            self.kept += kept

    with pytest.raises(ConnectionError):
        write(tmp_path, source_of(ten, scripted(script, stop_after=6)))
    seen = Counted()
    manifest = write(tmp_path, source_of(ten, scripted(script)), watch=seen)
    assert (seen.problems, seen.written, seen.kept) == (10, 20, 10) == (10, manifest.tally.written, manifest.tally.kept)


def test_the_progress_bar_shows_rate_and_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    from research.traces.progress import TraceProgress

    with TraceProgress("writing", 10) as progress:
        assert progress.acceptance == ""
        progress.advance(1, 50)
        progress.judged(8, 2)
        assert progress.acceptance == "25% kept" and progress.rate.endswith(" tokens/s")
    assert capsys.readouterr() == ("", ""), "nothing where there is no terminal"


def test_costs_are_summed_over_processes(ten: Any, scripted: Any, tmp_path: Path) -> None:
    class Spent:
        flops, tokens = 0.0, 0

    def costly(stop_after: int | None) -> AbstractGenerator:
        generator = scripted(script, stop_after=stop_after)
        generator.spent = Spent()
        plain = generator.script

        def counting(prompt: Prompt, sample: int) -> str:
            generator.spent.flops += 100.0
            generator.spent.tokens += 9
            return str(plain(prompt, sample))

        generator.script = counting
        return generator

    with pytest.raises(ConnectionError):
        write(tmp_path, source_of(ten, costly(6)))
    manifest = write(tmp_path, source_of(ten, costly(None)))
    assert manifest.cost["flops"] == 10 * 2 * 100.0 and manifest.cost["tokens"] == 10 * 2 * 9
    assert manifest.cost["seconds"] is not None and manifest.cost["seconds"] > 0
    uncounted = write(tmp_path / "uncounted", source_of(ten, scripted(script)))
    assert uncounted.cost["flops"] is None and uncounted.cost["tokens"] is None, "not known is not nothing"
