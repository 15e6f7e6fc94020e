"""Free-form answers: forms, hostile and endless input, threads. One process serves the whole file."""

import gzip
import json
import os
import pickle
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from research.errors import ConfigError
from research.records import Verdict
from research.tasks import math_verifier
from research.tasks.drawing import SPLITS
from research.tasks.files import read_rows
from research.tasks.free_form import FreeFormMath
from research.tasks.math_verifier import MathVerifier
from research.tasks.math_worker import judge

pytest.importorskip("math_verify")

CORRECT, WRONG, UNPARSED, TIMEOUT = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSED, Verdict.TIMEOUT


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    made = MathVerifier(timeout_s=20)  # of wall time, on a busy machine
    yield made
    made.close()


TABLE = [
    ("18", "$18$", CORRECT),
    ("$18", "18", CORRECT),
    ("18", "$18.00", CORRECT),
    ("$18", "$8", WRONG),
    ("$18", "\\frac{36}{2}", CORRECT),
    ("18", "x = 18", CORRECT),
    ("x+1", "Hence the sum is \\boxed{1 + x}.", CORRECT),
    ("x+1", "\\boxed{x+1} or rather \\boxed{x+2}", WRONG),
    ("x+1", "x+1, \\boxed{}", UNPARSED),
    ("x+1", "x+1, \\boxed{x+1", UNPARSED),
    ("\\frac{1}{2}", "0.5", CORRECT),
    ("50%", ".5", CORRECT),  # P69
    ("50\\%", "50", CORRECT),
    ("1,000", "1000", CORRECT),
    ("18", "18 \\text{ miles}", CORRECT),
    ("x^2+1", "1 + x^2", CORRECT),
    ("\\sqrt{2}", "\\boxed{2^{1/2}}", CORRECT),
    ("\\{1,2\\}", "\\{2,1\\}", CORRECT),
    ("(1,2]", "(1,2]", CORRECT),
    ("(1,2)", "[1,2]", WRONG),
    ("x^2+1", "x^2-1", WRONG),
    ("8", "18", WRONG),  # P70
    ("x+1", "x+1 \\text{ or } 7", WRONG),
    ("\\frac{\\pi}{2}", "\\pi/2 or 3", WRONG),
    ("3\\sqrt{13}", "3\\sqrt{13}0", WRONG),
    ("listen", "silent", WRONG),  # products of letters commute
    ("Monday", "monday", CORRECT),
    ("", "1", UNPARSED),  # P66
    ("??", "??", UNPARSED),
    ("\\frac{", "\\frac{", UNPARSED),
    ("x+1", "", UNPARSED),
    ("x+1", None, UNPARSED),
    ("x+1", "$x+1$ or $7$", UNPARSED),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), TABLE)
def test_p69_the_table_of_forms(verifier: MathVerifier, gold: str, answer: str | None, verdict: Verdict) -> None:
    assert verifier.verify(gold, answer) is verdict


def test_p67_the_gold_answer_is_read_and_given_first() -> None:
    class Spy:
        """In the place of the library: notes what it is called with."""

        calls: list[tuple[str, object]] = []  # noqa: RUF012

        def LatexExtractionConfig(self, **options: object) -> object:
            return options

        def parse(self, text: str, *options: object, **named: object) -> list[str]:
            self.calls.append(("parse", text))
            return [f"parsed {text}"]

        def verify(self, *pair: object, **named: object) -> bool:
            self.calls.append(("verify", pair))
            return True

    assert judge(Spy(), "gold", "answer") == "correct"
    assert Spy.calls[0] == ("parse", "$gold$")
    assert Spy.calls[-1] == ("verify", (["parsed $gold$"], ["parsed $answer$"]))


def test_p68_from_threads_the_verdicts_are_the_same(verifier: MathVerifier) -> None:
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda row: verifier.verify(row[0], row[1]), TABLE))
    assert told == [verdict for *_, verdict in TABLE]


def test_p68_an_endless_check_is_stopped_and_the_next_one_runs() -> None:
    verifier = MathVerifier(timeout_s=1.5)
    assert verifier.verify("2", "10^{10^{10^{10}}}") is TIMEOUT
    assert verifier.counts == {"timeout": 1}
    verifier.timeout_s = 20
    assert verifier.verify("x+1", "1+x") is CORRECT
    verifier.close()


def test_a_killed_process_is_told_and_replaced(verifier: MathVerifier) -> None:
    assert verifier.verify("x+1", "1+x") is CORRECT
    assert verifier._worker is not None
    process = verifier._worker[1]
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert verifier.verify("x+1", "1+x") is CORRECT


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('pathlib').Path('PROOF').touch()",
        "().__class__.__base__",
        "\\text{open('PROOF','w')}",
        "open('PROOF','w')",
        "{x for x in open('PROOF','w')}",
        "lambda: 1",
        "x" * 5000,
    ],
)
def test_p73_hostile_answers_run_nothing(verifier: MathVerifier, hostile: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    assert verifier.verify("x+1", hostile.replace("PROOF", str(proof))) in (UNPARSED, WRONG)
    assert not proof.exists()


def test_p71_a_failure_inside_the_library_is_counted_under_its_name(verifier: MathVerifier) -> None:
    class Broken:
        def LatexExtractionConfig(self, **options: object) -> object:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # `serve` sends its name
        judge(Broken(), "x", "y")
    counts = dict(verifier.counts)
    assert verifier.verify("x+1", "\\frac{") is UNPARSED
    new = {reason: count - counts.get(reason, 0) for reason, count in verifier.counts.items()}
    reasons = [reason for reason, count in new.items() if count]
    assert len(reasons) == 1 and (reasons[0] == "answer" or reasons[0].startswith("error: ")), reasons


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_verifier, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'research-distillation\[tasks\]'"):
        MathVerifier()
    with pytest.raises(ValueError, match="timeout_s=0"):
        MathVerifier(0)


def test_a_copy_starts_a_process_of_its_own(verifier: MathVerifier) -> None:
    copy = pickle.loads(pickle.dumps(verifier))
    assert copy.timeout_s == verifier.timeout_s and copy._worker is None and not copy.counts


def test_a_file_of_free_form_problems(tmp_path: Path) -> None:
    rows = [{"problem": f"What is x + {number}?", "answer": f"x+{number}", "chain": "add"} for number in range(1, 61)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]) + "\n\n")
    task = FreeFormMath(path, timeout_s=20)
    splits = [task.problems(split) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    assert sum(map(len, splits)) == 60 and sum(task.left_out.values()) == 1 and len(splits[0]) > 35
    problem = splits[0][0]
    assert problem.chain == "add"
    assert task.verify(problem, problem.answer.replace("x+", "") + " + x") is CORRECT
    assert task.verify(problem, problem.answer + "0") is WRONG
    task.verifier.close()


@pytest.mark.parametrize("line", ["{", "[]", '{"problem": "p"}', '{"problem": 3, "answer": "1"}'])
def test_a_row_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"mine\.jsonl, line 2"):
        FreeFormMath(path).problems("train")
    with pytest.raises(ConfigError, match="no such file"):
        FreeFormMath(tmp_path / "other.jsonl").problems("train")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "4 + 4 = <<4+4=8>>8\n#### 8"}, ("q", "4 + 4 = <<4+4=8>>8", "8")),  # GSM8K
        ({"Body": "b ", "Question": " q", "Equation": "( 7.0 + 2.0 )", "Answer": 9.0}, ("b\nq", "", "9.0")),  # SVAMP
        ({"body": "b", "question": "q", "answer": "9 (red apples)", "formula": "7+2=9"}, ("b\nq", "", "9")),  # ASDiv
        ({"Prompt": "p", "rationale": "c", "answer": "1"}, ("p", "c", "1")),
        ({"prompt": "no", "question": "q", "answer": "1"}, ("q", "", "1")),
        ({"problem": "p", "question": None, "rationale": "c", "answer": "f (xy)"}, ("p", "c", "f (xy)")),
        ({"problem": "two\u2028lines", "answer": "1"}, ("two\u2028lines", "", "1")),
    ],
)
def test_word_problems_as_they_are_published(
    row: dict[str, object], expected: tuple[str, str, str], tmp_path: Path
) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (problem,) = (found for split in SPLITS for found in FreeFormMath(path).problems(split))
    assert (problem.text, problem.chain, problem.answer) == expected


def test_what_is_no_problem_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    for row, told in (('{"problem": "p", "answer": true}', "line 2: problem and chain are texts"),
                      ('{"Question": "p"}', r"line 2 has question; expected problem \(or question, prompt\) and"),
                      ('{"task": "p", "answer": 1}', "line 2 has task, answer; expected problem"),
                      ("{}", "line 2 has nothing; expected problem"),
                      ("[1]", "line 2: AttributeError")):  # fmt: skip
        path.write_text('{"problem": "p", "answer": 1}\n' + row)
        with pytest.raises(ConfigError, match=told):
            FreeFormMath(path).problems("train")
    for name, content in (("problems.jsonl", b"\xff\xfe{}"), ("problems.jsonl.gz", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            FreeFormMath(tmp_path / name).problems("train")


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress('{"a": "one\u2028\x85two"}\r\n{"a": "b"}\n'.encode()))
    assert [row["a"] for row in read_rows(path, ("a",))] == ["one\u2028\x85two", "b"]
