"""Free-form mathematical answers, judged by math-verify in a process that can be killed."""

import multiprocessing
import os
import re
import threading
from collections import Counter
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from research.errors import ConfigError
from research.records import Verdict
from research.tasks.answers import unwrapped
from research.tasks.math_worker import serve
from research.tasks.numbers import parse_answer, parse_number, verify_number

LONGEST = 2000  # characters of an answer
START_S = 120.0  # to import a computer algebra system on a busy machine
WORDS = re.compile(r"[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")
NO_FORMULA = re.compile(r"__|[`\"]|(?<!\\)\$|\b(?:import|lambda|exec|eval|getattr)\b")


class MathVerifier:
    """``verify(gold, answer)`` from any thread, each check within ``timeout_s`` seconds.

    Of either side the last box counts, where it has one. Two numbers in everyday forms, an answer ``x = 18`` among
    them, are compared exactly by :func:`research.tasks.numbers.verify_number`; two texts of words letter by letter, up
    to case (to computer algebra "listen" is "silent"); anything else by math-verify, which reads each side as one
    formula from end to end: no credit for an answer that merely contains the right one.

    counts  what happened, by reason: verdicts, ``timeout``, ``died``, ``refused`` (too long, or nothing a formula
            holds, such as ``__``), ``gold`` and ``answer`` (could not be read), and every kind of exception inside the
            library under its own name. None of these is ever WRONG

    Raises ConfigError where math-verify is not installed.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r}: give the seconds that one check may take, more than 0")
        if find_spec("math_verify") is None:
            raise ConfigError("free-form answers need math-verify: pip install 'research-distillation[tasks]'")
        self.timeout_s = timeout_s
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._worker: tuple[int, BaseProcess, Connection] | None = None

    def verify(self, gold: str, answer: str | None) -> Verdict:
        """CORRECT, WRONG, UNPARSED (either side cannot be read, or the library failed on them) or TIMEOUT."""
        verdict, reason = self._verdict(gold, answer)
        self.counts[reason] += 1
        return verdict

    def close(self) -> None:
        """End the process; the next check starts another."""
        with self._lock:
            self._kill()

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout_s": self.timeout_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["timeout_s"])  # type: ignore[misc]  # a copy has a process of its own

    def _verdict(self, gold: str, answer: str | None) -> tuple[Verdict, str]:
        gold, answer = unwrapped(gold), unwrapped(answer or "")
        for side, text in (("gold", gold), ("answer", answer)):
            if not text:
                return Verdict.UNPARSED, side
            if len(text) > LONGEST:
                return Verdict.UNPARSED, "refused"
        if parse_number(gold) is not None and parse_answer(answer) is not None:  # a bare $18 is a number, no formula
            verdict = verify_number(gold, answer)
            return verdict, verdict.value
        if NO_FORMULA.search(gold) or NO_FORMULA.search(answer):
            return Verdict.UNPARSED, "refused"
        if WORDS.fullmatch(gold) and WORDS.fullmatch(answer):
            verdict = Verdict.CORRECT if gold.casefold() == answer.casefold() else Verdict.WRONG
            return verdict, verdict.value
        told = self._ask(gold, answer)
        known = {
            "correct": Verdict.CORRECT,
            "wrong": Verdict.WRONG,
            "timeout": Verdict.TIMEOUT,
            "died": Verdict.TIMEOUT,
        }
        return known.get(told, Verdict.UNPARSED), told

    def _ask(self, gold: str, answer: str) -> str:
        with self._lock:
            connection = self._connection()
            try:
                connection.send((gold, answer))
                if connection.poll(self.timeout_s):
                    return str(connection.recv())
                told = "timeout"
            except (EOFError, OSError):  # the process is gone: killed from outside, or out of memory
                told = "died"
            self._kill()
            return told

    def _connection(self) -> Connection:
        if self._worker is not None and self._worker[0] == os.getpid() and self._worker[1].is_alive():
            return self._worker[2]
        self._kill()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True, name="math-verify")
        process.start()
        theirs.close()
        self._worker = (os.getpid(), process, ours)
        told = ours.recv() if ours.poll(START_S) else f"nothing within {START_S:.0f} s"
        if told != "ready":
            self._kill()
            raise ConfigError(f"the process for math-verify did not start: {told}")
        return ours

    def _kill(self) -> None:
        if self._worker is None:
            return
        owner, process, connection = self._worker
        self._worker = None
        connection.close()
        if owner == os.getpid():
            process.kill()
            process.join()
