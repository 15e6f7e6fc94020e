"""JSON lines of other people: aliases, texts taken apart, and every bad row set aside with its line and reason."""

import csv
import gzip
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from research.errors import ConfigError, StoreError
from research.traces.files import FILES
from research.traces.importing import ALIASES, REASONS, TraceImport
from research.traces.reading import read_traces

GOOD = {"problem": "1+1", "chain": "one more", "answer": "2"}


def one(row: dict[str, Any], tmp_path: Path, **options: Any) -> tuple[str, str, str]:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (trace,) = TraceImport(path, **options)
    return trace.problem, trace.chain, trace.answer


def reason_of(line: bytes, tmp_path: Path, **options: Any) -> str:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    rows = TraceImport(path, **options)
    assert len(list(rows)) == 1, "the row after it is read all the same"
    ((reason, count),) = rows.report.quarantined.items()
    assert count == 1 and rows.report.rows == 2 and rows.report.accepted == 1
    return reason


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["problem", "chain", "answer"])
def test_every_alias_is_read(part: str, tmp_path: Path) -> None:
    for alias in ALIASES[part]:
        row = {name: value for name, value in GOOD.items() if name != part} | {alias: GOOD[part]}
        assert one(row, tmp_path) == ("1+1", "one more", "2"), alias


@pytest.mark.parametrize("part", ["problem", "chain", "answer"])
def test_the_first_alias_with_a_value_wins(part: str, tmp_path: Path) -> None:
    names = ALIASES[part]
    row = GOOD | {name: f"from {name}" for name in reversed(names)}
    assert f"from {names[0]}" in one(row, tmp_path)
    assert f"from {names[1]}" in one(row | {names[0]: None}, tmp_path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "output": "<think>\nfirst\n</think>\n\n7"}, ("q", "first", "7")),
        ({"prompt": "q", "response": "a <b>\n#### 7"}, ("q", "a <b>", "7")),
        ({"question": "q", "answer": "3 #### 4\n#### 7 "}, ("q", "3 #### 4", "7")),  # the last mark
        ({"question": "q", "rationale": "<think>first</think> so 7"}, ("q", "first", "so 7")),
        ({"question": "q", "solution": "first #### 7"}, ("q", "first", "7")),
        ({"question": "q", "output": "<think>a #### b</think>c"}, ("q", "a #### b", "c")),  # think comes before ####
        ({"question": "q", "chain": "c", "answer": 450.0}, ("q", "c", "450")),
        ({"question": "q", "chain": "c", "answer": 0.5}, ("q", "c", "0.5")),
        ({"question": "q", "chain": "c", "answer": -3}, ("q", "c", "-3")),
        ({"instruction": "add", "input": "1 1", "output": "<think>c</think>2"}, ("add\n1 1", "c", "2")),
        ({"instruction": "add", "input": "", "output": "<think>c</think>2"}, ("add", "c", "2")),
        ({"question": "q", "rationale": "<think>c</think> said 5", "answer": "7"}, ("q", "c", "7")),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>c</think>7"}]},
            ("q", "c", "7"),
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                               {"from": "gpt", "value": "c #### 7"}]},
            ("q", "c", "7"),
        ),
        (
            {"messages": [{"role": "user", "content": "q"},
                          {"role": "assistant", "content": "7", "reasoning_content": "c"}]},
            ("q", "c", "7"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "<think>c</think>"},
                                                            {"type": "text", "text": "7"}]}]},
            ("q", "c", "7"),
        ),
        ({"question": "q", "response": "c\n</think>\n\n7"}, ("q", "c", "7")),  # the template began the thought
        ({"question": "q", "chain": "c</think>", "answer": 7}, ("q", "c", "7")),
        ({"question": "q", "chain": "so </think> ends <think>", "answer": 7}, ("q", "so </think> ends <think>", "7")),
        ({"query": "q", "response": "c\n#### 7\nThe answer is: 7"}, ("q", "c", "7")),  # what follows is no answer
        ({"prompt": "q", "reasoning_content": "c", "content": "7"}, ("q", "c", "7")),
        ({"input": "q", "output": "<think>c</think>7"}, ("q", "c", "7")),
        ({"Question": "q", "Rationale": "c", "ANSWER": "7"}, ("q", "c", "7")),
        ({"Question": "no", "question": "q", "rationale": "c", "answer": "7"}, ("q", "c", "7")),
    ],
)  # fmt: skip
def test_texts_are_taken_apart_in_the_stated_order(row: dict[str, Any], expected: tuple, tmp_path: Path) -> None:
    assert one(row, tmp_path) == expected


def test_other_fields_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = GOOD | {"id": 7, "choices": ["a", "b"], "sample": 2, "teacher_correct": False}
    think = GOOD | {"chain": "<think>one</think> and then"}
    path.write_text(f"{json.dumps(row)}\n\n{json.dumps(think)}\n")
    first, second = TraceImport(path)
    assert (first.index, first.sample) == (0, 2) and second.index == 2, "the line number, from 0"
    theirs = {"id": 7, "choices": ["a", "b"], "sample": 2, "teacher_correct": False}
    assert first.details == {"row": theirs, "verdict": "wrong"}
    assert second.chain == "one" and second.details == {"after_think": "and then"}


def test_a_column_of_theirs_is_never_read_as_ours(tmp_path: Path) -> None:
    """Under every name that this program itself writes into details, with values that it would not."""
    names = ("verdict", "outcome", "corruption", "origin", "steps", "stop", "gold", "mode", "source", "row", "details")
    theirs: dict[str, Any] = {name: ["theirs", {"a": None}] for name in names} | {
        "verdict": "excellent",
        "level": "hard",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD | theirs) + "\n" + json.dumps(GOOD | theirs | {"correct": True}) + "\n")
    first, second = TraceImport(path)
    assert first.details == {"row": theirs}
    assert second.details == {"row": theirs | {"correct": True}, "verdict": "correct"}


def test_what_follows_an_answer_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "q", "response": "c\n#### 7\nThe answer is: 7\n"}))
    (trace,) = TraceImport(path)
    assert trace.answer == "7" and trace.details == {"after_answer": "The answer is: 7"}


# -- kinds of files ---------------------------------------------------------------------------------------------------

ROWS = [
    {"question": "1+1", "rationale": "one,\nmore", "answer": "2"},
    {"question": "ü", "rationale": "c", "answer": "3"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        content = (
            json.dumps(rows, indent=1).encode()
            if path.name.startswith("rows.json") and "jsonl" not in path.name
            else b"".join(map(as_line, rows))
        )
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def as_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\r\n"


@pytest.mark.parametrize("suffix", FILES)
def test_every_kind_of_file_gives_the_same_traces_and_sets_the_same_rows_aside(suffix: str, tmp_path: Path) -> None:
    path, aside = tmp_path / f"rows{suffix}", tmp_path / "aside.jsonl"
    write_rows(path, [ROWS[0], {"question": "", "rationale": "c", "answer": "7"}, ROWS[1]])
    rows = TraceImport(path, aside)
    found = [(trace.problem, trace.chain, trace.answer, trace.index) for trace in rows]
    assert found == [("1+1", "one,\nmore", "2", 0), ("ü", "c", "3", 2)] and rows.report.rows == 3
    (told,) = map(json.loads, aside.read_text().splitlines())
    assert (told["line"], told["reason"]) == (2, "no_problem") and '"rationale": "c"' in told["text"]
    assert read_traces(path) == list(rows)


def test_a_compressed_file_is_read_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(as_line(ROWS[0])))
    assert [trace.answer for trace in TraceImport(path)] == ["2"]


def test_lines_in_a_file_named_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + as_line(ROWS[0]) + as_line(ROWS[1]))
    assert [trace.answer for trace in TraceImport(path)] == ["2", "3"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name, content in (("a.parquet", b"PAR1 no"), ("a.json", b'[{"question": "1+1",'), ("b.json", b"[" * 10**6)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match=f"{name} cannot be read to its end"):
            list(TraceImport(tmp_path / name))


def test_cells_without_a_text(tmp_path: Path) -> None:
    """An empty cell is none, a long one is no damage, bytes are read as text, and what is no text is set aside."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b"problem,question,chain,answer\n,1+1," + b"x" * 200_000 + b",2\n,1+1,c,\xff\n")
    rows = TraceImport(path)
    assert [(trace.problem, len(trace.chain)) for trace in rows] == [("1+1", 200_000)]
    assert rows.report.quarantined == Counter(not_utf8=1)
    binary = [{"question": "q", "chain": b"c", "answer": answer} for answer in (b"7", b"\xff")]
    parquet.write_table(pyarrow.Table.from_pylist(binary), tmp_path / "rows.parquet")
    rows = TraceImport(tmp_path / "rows.parquet")
    assert [trace.answer for trace in rows] == ["7"] and rows.report.quarantined == Counter(not_utf8=1)


# -- bad rows ---------------------------------------------------------------------------------------------------------


def encoded(**changes: Any) -> bytes:
    return json.dumps({name: value for name, value in (GOOD | changes).items() if value is not ...}).encode()


BAD = {
    b"{": "not_json",
    b"nonsense": "not_json",
    b'{"problem": "a", "chain": "b", "answer": ' + b"9" * 5000 + b"}": "not_json",  # more digits than Python reads
    b"[" * 100_000: "not_json",
    b"[1, 2]": "not_an_object",
    b'"text"': "not_an_object",
    b"null": "not_an_object",
    b'{"problem": "\xff", "chain": "c", "answer": "a"}': "not_utf8",
    b'{"problem": "\\ud83d", "chain": "c", "answer": "a"}': "not_utf8",
    encoded(problem=...): "no_problem",
    encoded(problem="  "): "no_problem",
    encoded(problem=None): "no_problem",
    encoded(answer=...): "no_answer",
    encoded(answer=" "): "no_answer",
    encoded(chain=..., answer=...): "no_answer",
    encoded(chain=""): "empty_chain",
    encoded(chain=" \n"): "empty_chain",
    encoded(chain=...): "empty_chain",
    encoded(chain=["a", "b"]): "wrong_type",
    encoded(answer={"value": 2}): "wrong_type",
    encoded(answer=True): "wrong_type",
    encoded(answer=float("nan")): "wrong_type",
    encoded(problem=["a"]): "wrong_type",
    b'{"messages": [1]}': "wrong_type",
    b'{"messages": [{"role": "tool", "content": "x"}]}': "wrong_type",
    b'{"messages": [{"role": "user", "content": "x"}]}': "several_turns",
    encoded(chain="<think>never closed"): "unclosed_think",
    encoded(chain=..., answer="<think>never closed"): "unclosed_think",
    encoded(chain="x" * 400): "too_long",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=[f"{n}-{r}" for n, r in enumerate(BAD.values())])
def test_a_bad_row_is_set_aside_by_its_reason(line: bytes, reason: str, tmp_path: Path) -> None:
    limit = 300 if reason == "too_long" else 1_000_000
    assert reason_of(line, tmp_path, max_characters=limit) == reason


def test_every_reason_is_provoked() -> None:
    assert set(BAD.values()) == set(REASONS)


def test_the_quarantine_file_says_line_reason_and_text(tmp_path: Path) -> None:
    path, aside = tmp_path / "rows.jsonl", tmp_path / "deep" / "aside.jsonl"
    lines = [encoded(), b"{", b"", encoded(chain=""), encoded(problem="\u00fc \U0001f600"), b"\xff"]
    path.write_bytes(b"\r\n".join(lines))
    rows = TraceImport(path, aside)
    for _ in range(2):  # a second pass writes the same
        assert [trace.problem for trace in rows] == ["1+1", "ü 😀"]
        told = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
        assert [(row["line"], row["reason"]) for row in told] == [(2, "not_json"), (4, "empty_chain"), (6, "not_utf8")]
        assert told[1]["text"] == encoded(chain="").decode() and "Expecting" in told[0]["found"]
        report = rows.report
        assert (report.rows, report.accepted, report.blank_lines) == (5, 2, 1)
        assert report.quarantined == Counter(not_json=1, empty_chain=1, not_utf8=1)
    path.write_bytes(encoded())
    assert len(list(rows)) == 1 and not aside.exists(), "nothing bad, no file"


def test_lengths_are_characters_not_bytes(tmp_path: Path) -> None:
    row = json.dumps(GOOD | {"chain": "数" * 100}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(row, encoding="utf-8")
    assert len(list(TraceImport(path, max_characters=len(row)))) == 1
    assert len(list(TraceImport(path, max_characters=len(row) - 1))) == 0


def test_plain_answers_are_traces_where_that_is_asked_for(tmp_path: Path) -> None:
    assert one({"instruction": "hi", "output": "hello"}, tmp_path, allow_empty_chain=True) == ("hi", "", "hello")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + encoded() + b"\n")
    assert [trace.problem for trace in TraceImport(path)] == ["1+1"]


def test_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    content = gzip.compress((encoded() + b"\n") * 1000)
    path.write_bytes(content)
    assert len(list(TraceImport(path))) == 1000
    for broken in (content[:-20], content[:20] + b"\x00\x01\x02" + content[23:], b"no gzip"):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match="cannot be read to its end"):
            list(TraceImport(path))


def test_one_endless_line_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(50):
            stream.write(b"x" * 1_000_000)
        stream.write(b"\n" + encoded())
    rows = TraceImport(path, max_characters=10_000)
    tracemalloc.start()
    assert [trace.answer for trace in rows] == ["2"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.report.quarantined == Counter(too_long=1) and peak < 5_000_000


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*expected rows of traces, \.jsonl"):
        TraceImport(tmp_path / "none.jsonl")


# -- real traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "accepted", "aside", "correct"),
    [
        ("svamp_palm540b_test", 200, {}, 148),
        ("svamp_palm540b_train", 800, {}, 588),
        ("cqa_palm540b_test", 1221, {}, 955),
        # 125 rows were cut off inside <think>, as their own column says
        ("gsm8k_test_r1distill_qwen7b", 3832, {"unclosed_think": 125}, None),
    ],
)
def test_real_trace_files(
    name: str, accepted: int, aside: dict[str, int], correct: int | None, require_data: Callable[..., Path]
) -> None:
    rows = TraceImport(require_data("traces") / f"{name}.jsonl.gz")
    traces = list(rows)
    assert rows.report.accepted == len(traces) == accepted and rows.report.quarantined == Counter(aside)
    assert all("think>" not in trace.chain for trace in traces)
    if correct is not None:
        assert sum(trace.details["verdict"] == "correct" for trace in traces) == correct
    else:
        assert {trace.sample for trace in traces} == {0, 1, 2}
        assert all(trace.details["row"]["has_close_think"] for trace in traces)


def test_gsm8k_as_it_is_published(require_data: Callable[..., Path]) -> None:
    traces = list(TraceImport(require_data("gsm8k") / "test.jsonl.gz"))
    assert len(traces) == 1319 and traces[0].answer == "18" and traces[0].chain.endswith("market.")


# -- reading ----------------------------------------------------------------------------------------------------------


def test_traces_are_read_from_stores_and_files(
    make_rows: Callable[..., Any], make_store: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(["a", "b", "c"], {1: "length"})
    folder = make_store(tmp_path / "store", rows)
    kept = [rows[0].trace, rows[2].trace]
    assert read_traces(folder) == kept == read_traces(folder, 5) and read_traces(folder, 1) == kept[:1]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encoded() + b"\n{\n" + encoded(problem="2+2") + b"\n")
    assert [trace.problem for trace in read_traces(path)] == ["1+1", "2+2"]
    assert "1 of 3 rows" in caplog.text and "1 not_json" in caplog.text
    assert len(read_traces(path, 1)) == 1


def test_what_gives_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n" + encoded(chain="") + b"\n")
    with pytest.raises(ConfigError, match=r"none of the 2 rows of .* is a trace \(1 not_json, 1 empty_chain\)"):
        read_traces(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="the file is empty"):
        read_traces(path)
    with pytest.raises(ConfigError, match="no folder of a trace store and no file in"):
        read_traces(tmp_path / "rows.txt")
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        read_traces(tmp_path)
