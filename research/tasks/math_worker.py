"""What runs in the verifier's own process: math-verify on one pair of answers at a time. Imports nothing of ours.

Inputs come as (gold, answer) through a pipe; what goes back is "ready" once, then per pair "correct", "wrong",
"gold", "answer" (which of them could not be read), or "error: " and the kind of exception.
"""

from multiprocessing.connection import Connection
from typing import Any

MEMORY_BYTES = 4 * 2**30


def serve(connection: Connection) -> None:
    """Answer pairs until the other end is closed."""
    import importlib
    import logging
    import signal

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    _limit_memory()
    try:
        library = importlib.import_module("math_verify")  # an optional extra, slow to import
    except ImportError as error:
        connection.send(f"error: {error}")
        return
    connection.send("ready")
    while True:
        try:
            gold, answer = connection.recv()
        except (EOFError, OSError):
            return
        try:
            told = judge(library, gold, answer)
        except Exception as error:  # whatever the library raises is told, never taken for a wrong answer
            told = f"error: {type(error).__name__}"
        connection.send(told)


def judge(library: Any, gold: str, answer: str) -> str:
    """Whether ``answer``, read as one LaTeX formula from end to end, equals ``gold``, read first and given first."""
    expected = _read(library, gold)
    if not expected:
        return "gold"
    given = _read(library, answer)
    if not given:
        return "answer"
    return "correct" if library.verify(expected, given, timeout_seconds=None, raise_on_error=True) else "wrong"


def _read(library: Any, text: str) -> list[object]:
    """The formula that the whole of ``text`` is; [] where it is none. Timeouts by signal are off: see P68."""
    config = [library.LatexExtractionConfig(boxed_match_priority=-1)]
    try:
        return list(
            library.parse(
                f"${text}$", config, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
            )
        )
    except RecursionError:
        return []


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):  # not on this system: the time limit still holds
        return
