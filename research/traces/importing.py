"""Traces that somebody else wrote, one to a row: read under the names in common use, bad rows set aside.

A row's fields are found by ALIASES, whatever their case: for each of problem, chain and answer the first of its names
that the row has with a value other than null, and in ``messages`` or ``conversations`` (one user turn, one assistant
turn) where it has none. Where chain or answer is missing, the other is taken apart, in this order: what stands before
``</think>`` is the chain (behind a leading ``<think>``, or without one, since some templates write it into the prompt)
and what follows it the answer; else what precedes the last ``####`` is the chain, and the answer what follows it in
that line. A chain with a ``</think>`` beside an answer of its own is unwrapped. What followed is kept under
``details["after_think"]`` or ``details["after_answer"]``. All other fields of the row are kept as they stand, together
and apart from ours, under ``details["row"]``: a column of theirs called verdict or outcome is never read as one.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from research.errors import ConfigError
from research.records import Trace, Verdict
from research.traces.files import FILES, lines_of

ALIASES = {
    "problem": ("problem", "question", "prompt", "instruction", "query", "input"),
    "chain": ("chain", "rationale", "reasoning", "cot", "solution", "reasoning_content", "thinking"),
    "answer": ("answer", "final_answer", "output", "response", "completion", "generation", "content", "text"),
    "correct": ("correct", "teacher_correct", "is_correct"),
}
QUARANTINE_FILE, QUARANTINED = "quarantine.jsonl", "quarantine_"  # the file of bad rows; prefix of counts by reason
ROW = "row"  # the key of a trace's details that holds the row's other fields
TURNS = ("messages", "conversations")
SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
REASONS = (
    "not_utf8",
    "not_json",
    "not_an_object",
    "wrong_type",
    "no_problem",
    "no_answer",
    "empty_chain",
    "unclosed_think",
    "several_turns",
    "too_long",
)
_THINK = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_ANSWER = re.compile(r"\s*([^\n]*)(.*)", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class ImportReport:
    """Counts of one pass: ``rows == accepted + sum(quarantined.values())``; blank lines are no rows.

    quarantined  reason, one of REASONS -> rows set aside
    """

    rows: int = 0
    accepted: int = 0
    blank_lines: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)


class BadRow(ValueError):
    """A row that is no trace: ``reason`` is one of REASONS, the message says what was found."""

    def __init__(self, reason: str, told: str) -> None:
        super().__init__(told)
        self.reason = reason


class TraceImport:
    """Iterates over the traces of a file, in file order, a few rows in memory at a time (a ``.json`` list as a whole).

    path              the file, of FILES; see ``files.lines_of``
    quarantine        JSON lines file that takes the bad rows (number of line or row from 1, reason, what was found, the
                      line); written anew by every pass, absent where no row is bad; None: bad rows are counted alone
    max_characters    longest row; a longer one is set aside, never cut
    allow_empty_chain whether rows without any chain are traces: answers to plain questions

    ``index`` of a trace is the number of its line or row from 0, ``sample`` the row's own where it has a whole one. A
    field such as ``teacher_correct: true`` becomes ``details["verdict"]``. ``report`` counts the last pass. Raises
    ConfigError where the file does not exist, StoreError where it is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        quarantine: str | Path | None = None,
        *,
        max_characters: int = 1_000_000,
        allow_empty_chain: bool = False,
    ) -> None:
        self.path = Path(path)
        self.quarantine = None if quarantine is None else Path(quarantine)
        self.max_characters, self.allow_empty_chain = max_characters, allow_empty_chain
        self.report = ImportReport()
        if not self.path.is_file():
            raise ConfigError(f"no file {self.path}; expected rows of traces, {', '.join(FILES)}")

    def __iter__(self) -> Iterator[Trace]:
        self.report = ImportReport()
        aside: IO[str] | None = None
        if self.quarantine is not None:
            self.quarantine.unlink(missing_ok=True)
        try:
            for number, line in enumerate(lines_of(self.path, self.max_characters)):
                if not line.strip():
                    self.report.blank_lines += 1
                    continue
                self.report.rows += 1
                try:
                    trace = self._read(line, number)
                except BadRow as bad:
                    self.report.quarantined[bad.reason] += 1
                    aside = self._set_aside(aside, number + 1, bad, line)
                else:
                    self.report.accepted += 1
                    yield trace
        finally:
            if aside is not None:
                aside.close()

    def _read(self, line: bytes, number: int) -> Trace:
        if len(line) > self.max_characters:
            try:
                length = len(line.decode())
            except UnicodeDecodeError:
                length = len(line)
            if length > self.max_characters:
                raise BadRow("too_long", f"more than {self.max_characters} characters")
        return read_row(line, number, allow_empty_chain=self.allow_empty_chain)

    def _set_aside(self, aside: IO[str] | None, line_number: int, bad: BadRow, line: bytes) -> IO[str] | None:
        if self.quarantine is None:
            return None
        if aside is None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            aside = self.quarantine.open("w", encoding="utf-8")
        text = line[: self.max_characters].decode("utf-8", "replace").rstrip("\r\n")
        row = {"line": line_number, "reason": bad.reason, "found": str(bad), "text": text}
        aside.write(json.dumps(row, ensure_ascii=False) + "\n")
        return aside


def read_row(line: bytes, number: int, *, allow_empty_chain: bool = False) -> Trace:
    """The trace of one JSON line; raises BadRow with the reason where it is none."""
    row = _object(line)
    problem, chain, answer, used = _fields(row)
    tails: dict[str, str] = {}
    if problem is None or not problem.strip():
        raise BadRow("no_problem", f"none of {', '.join(ALIASES['problem'])} has a text")
    rest = {name: value for name, value in row.items() if name not in used}
    details: dict[str, Any] = {ROW: rest} if rest else {}
    if chain is None or answer is None:
        chain, answer, tails["after_answer"] = _apart(chain if answer is None else answer, is_chain=answer is None)
    elif _is_thought(chain):
        chain, tails["after_think"] = _unwrap(chain)
    details |= {name: tail for name, tail in tails.items() if tail}
    if not answer.strip():
        raise BadRow("no_answer", f"none of {', '.join(ALIASES['answer'])} has a text, and the chain holds no answer")
    if not chain.strip() and not allow_empty_chain:
        raise BadRow("empty_chain", f"none of {', '.join(ALIASES['chain'])} has a text")
    names = _names(row)
    claims = (row[names[name]] for name in ALIASES["correct"] if name in names)
    correct = next((claim for claim in claims if isinstance(claim, bool)), None)
    if correct is not None:
        details["verdict"] = (Verdict.CORRECT if correct else Verdict.WRONG).value
    given = row.get(names.get("sample", "sample"))
    sample = given if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 2**31 else 0
    return Trace(problem, chain.strip(), answer.strip(), number, sample, details)


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", str(error)) from None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("not_json", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"a JSON {type(row).__name__}; expected an object with {', '.join(ALIASES)}")
    if "\\ud" in text.lower() and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise BadRow("not_utf8", "half of a surrogate pair stands alone")
    return row


def _fields(row: dict[str, Any]) -> tuple[str | None, str | None, str | None, set[str]]:
    """Problem, chain, answer as texts (None where the row has none), and the names they came from."""
    found: dict[str, str | None] = {}
    used: set[str] = set()
    names = _names(row)
    for part in ("problem", "chain", "answer"):
        name = next((names[name] for name in ALIASES[part] if name in names), None)
        found[part] = None if name is None else _text(row[name], name)
        used |= {name} if name else set()
    turns = next((names[name] for name in TURNS if name in names), None)
    if turns is not None and (found["problem"] is None or (found["chain"] is None and found["answer"] is None)):
        spoken = _turns(row[turns], turns)
        found = {part: value if value is not None else spoken.get(part) for part, value in found.items()}
        used.add(turns)
    extra = row.get(names.get("input", "input"))  # instruction and input are one prompt in files of the Alpaca kind
    if names.get("instruction", "instruction") in used and isinstance(extra, str):
        used.add(names["input"])
        found["problem"] = f"{found['problem']}\n{extra}" if extra.strip() else found["problem"]
    return found["problem"], found["chain"], found["answer"], used


def _names(row: dict[str, Any]) -> dict[str, str]:
    """Each name in small letters -> the row's own, of those with a value other than null; the exact name goes first."""
    given = [name for name, value in row.items() if value is not None]
    return {**{name.lower(): name for name in reversed(given)}, **{name: name for name in given}}


def _text(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow("wrong_type", f"{name} is {json.dumps(value)[:60]}; expected a text or a number")
    return str(int(value)) if float(value).is_integer() else str(value)


def _turns(turns: object, name: str) -> dict[str, str]:
    """Problem and answer (and chain, where the reply has its own) of a conversation of one question."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("wrong_type", f"{name} is no list of turns")
    said: dict[str, list[dict[str, Any]]] = {"user": [], "assistant": [], "system": []}
    for turn in turns:
        speaker = SPEAKERS.get(str(turn.get("role", turn.get("from"))))
        if speaker is None:
            raise BadRow("wrong_type", f"{name} has a turn of {turn.get('role', turn.get('from'))!r}")
        said[speaker].append(turn)
    if len(said["user"]) != 1 or len(said["assistant"]) != 1:
        counts = f"{len(said['user'])} questions and {len(said['assistant'])} replies"
        raise BadRow("several_turns", f"{name} has {counts}; expected one of each")
    question, reply = said["user"][0], said["assistant"][0]
    spoken = {
        "problem": _said(question, name),
        "answer": _said(reply, name),
    }
    if reply.get("reasoning_content") is not None:
        spoken["chain"] = _text(reply["reasoning_content"], "reasoning_content")
    return spoken


def _said(turn: dict[str, Any], name: str) -> str:
    """The text of a turn: as it stands, or in parts of type text."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(_text(part.get("text"), name) for part in content)
    return _text(content, name)


def _apart(text: str | None, *, is_chain: bool) -> tuple[str, str, str]:
    """Chain and answer out of the one text that a row has, and what followed the answer."""
    if text is None:
        raise BadRow("no_answer", f"none of {', '.join(ALIASES['answer'])} and no chain")
    if _is_thought(text):
        return *_unwrap(text), ""
    chain, mark, rest = text.rpartition("####")
    if mark:
        answer, tail = _ANSWER.fullmatch(rest).groups()  # type: ignore[union-attr]  # it matches any text
        return chain, answer, tail.strip()
    return (text, "", "") if is_chain else ("", text, "")


def _is_thought(text: str) -> bool:
    """Whether it begins inside a thought: with its mark, or with a thought whose first mark is the one that ends it."""
    return text.lstrip().startswith("<think>") or ("</think>" in text and "<think>" not in text)


def _unwrap(text: str) -> tuple[str, str]:
    found = _THINK.fullmatch(text)
    if found is None:
        raise BadRow("unclosed_think", "<think> has no </think>: the text was cut off")
    return found[1].strip(), found[2].strip()
