"""Problems with free-form mathematical answers, from a JSONL file that a user brings."""

import gzip
import json
import os
from functools import cached_property
from pathlib import Path

from research.errors import ConfigError
from research.records import Problem, Verdict
from research.tasks.base import AbstractTask, Split
from research.tasks.files import Official, split_by_text
from research.tasks.math_verifier import MathVerifier


class FreeFormMath(AbstractTask):
    """One JSON object per line with ``problem``, ``answer`` and, where there is one, ``chain``.

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
        text = (gzip.decompress(content) if self.path.suffix == ".gz" else content).decode()
        rows = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        return split_by_text(self._problem(number, line) for number, line in rows)

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        return self.official.first(self.name, split, num)

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return self.verifier.verify(problem.answer, answer)

    def _problem(self, number: int, line: str) -> Problem:
        try:
            row = json.loads(line)
            problem, answer, chain = row["problem"], row["answer"], row.get("chain", "")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.path}, line {number}: {type(error).__name__}: {error}; expected problem and answer"
            ) from None
        if not (isinstance(problem, str) and isinstance(answer, str | int | float) and isinstance(chain, str)):
            raise ConfigError(f"{self.path}, line {number}: problem and chain are texts, answer a text or number")
        return Problem(0, problem.strip(), str(answer), chain)
