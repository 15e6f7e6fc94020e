"""Whether a run ended because it had no memory left, on the CPU or on a GPU, whichever library says so."""

import errno
import re
import signal
from pathlib import Path

NAMES = ("MemoryError", "OutOfMemoryError")
# what torch, CUDA's libraries and others say in a RuntimeError
WORDS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|STATUS_ALLOC_FAILED", re.IGNORECASE
)
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # as Python's child, and through a shell


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, says that memory could not be had.

    A run in a process of its own has said so there (`out_of_memory` of a `TrialFailed`).
    """
    if getattr(error, "out_of_memory", False) or isinstance(error, MemoryError) or type(error).__name__ in NAMES:
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and WORDS.search(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def kills_for_memory(counters: Path = Path("/proc/vmstat")) -> int:
    """How many processes of this machine Linux has killed because memory had run out, since it began; 0: not known."""
    try:
        found = re.search(r"^oom_kill (\d+)$", counters.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def was_killed_for_memory(code: int, kills_before: int, counters: Path = Path("/proc/vmstat")) -> bool:
    """Whether a child's exit code is that of a kill -9, and Linux has killed for memory since it was started.

    Nobody else is told of it: the child cannot say a word, and its parent sees the same code as from a user's kill.
    """
    return code in KILLED and kills_for_memory(counters) > kills_before
