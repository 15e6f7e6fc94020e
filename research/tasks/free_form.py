"""Problems with free-form mathematical answers, from a JSONL file that a user brings."""

import gzip
import json
import os
import re
import zlib
from functools import cached_property
from pathlib import Path

from research.errors import ConfigError
from research.records import Problem, Verdict
from research.tasks.base import AbstractTask
from research.tasks.files import FromFiles, Official, split_by_text
from research.tasks.math_verifier import MathVerifier
from research.tasks.numbers import parse_number

PROBLEM_NAMES = ("problem", "question", "prompt")
EXPECTED = f"expected {PROBLEM_NAMES[0]} (or {', '.join(PROBLEM_NAMES[1:])}) and answer"
UNIT = re.compile(r"(.+?)\s+\([A-Za-z][A-Za-z ]+\)")


class FreeFormMath(FromFiles, AbstractTask):
    """One JSON object per line with a problem, its answer and, where there is one, a chain.

    Read under the names of the word-problem sets in common use, whatever their case: ``problem``, ``question`` or
    ``prompt`` (behind ``body``, where there is one, as in SVAMP and ASDiv); ``answer``, of which what stands before the
    last ``####`` is the chain, as in GSM8K; ``chain`` or ``rationale``. A unit in brackets behind a number,
    ``9 (apples)``, is no part of the answer.

    8 tenths of the problems are train, 1 val, 1 test, by a hash of the text; repeated texts are left out and counted in
    ``official.dropped``. Answers may be any formula, LaTeX or plain. Steps are not checked.

    path       the file, ``.jsonl`` or ``.jsonl.gz``
    timeout_s  seconds that one check may take; beyond it the verdict is TIMEOUT
    """

    step_separator = "\n"

    def __init__(self, path: str | os.PathLike[str], timeout_s: float = 5.0) -> None:
        self.path = Path(path)
        self.name = f"free_form_{self.path.name.partition('.')[0]}"
        self.verifier = MathVerifier(timeout_s)

    @cached_property
    def official(self) -> Official:
        """All problems, read at the first need; ConfigError, naming the line, for a row that is none."""
        if not self.path.is_file():
            raise ConfigError(
                f"task.path is {str(self.path)!r}: no such file; expected JSON lines of problem and answer"
            )
        content = self.path.read_bytes()
        try:
            text = (gzip.decompress(content) if self.path.suffix == ".gz" else content).decode("utf-8-sig")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ConfigError(f"task.path is {str(self.path)!r}, which cannot be read: {error}") from None
        rows = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return split_by_text(self._problem(number, line) for number, line in rows)

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return self.verifier.verify(problem.answer, answer)

    def _problem(self, number: int, line: str) -> Problem:
        try:
            row = {name.lower(): value for name, value in json.loads(line).items() if value is not None}
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.path}, line {number}: {type(error).__name__}: {error}; {EXPECTED}") from None
        named = next((name for name in PROBLEM_NAMES if name in row), None)
        if named is None or "answer" not in row:
            raise ConfigError(f"{self.path}, line {number} has {', '.join(row) or 'nothing'}; {EXPECTED}")
        problem, answer = row[named], row["answer"]
        chain, body = row.get("chain", row.get("rationale", "")), row.get("body", "")
        texts = all(isinstance(text, str) for text in (problem, chain, body))
        if not texts or isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ConfigError(f"{self.path}, line {number}: problem and chain are texts, answer a text or number")
        written, _, gold = str(answer).rpartition("####")
        measured = UNIT.fullmatch(gold.strip())
        gold = measured[1] if measured and parse_number(measured[1]) is not None else gold
        text = f"{body.strip()}\n{problem.strip()}" if body.strip() else problem.strip()
        return Problem(0, text, gold.strip(), chain or written.strip())
