"""What a generator has written of the block in work: nothing is asked for twice after a kill, nothing is lost."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from research.generation.base import Written
from research.records import Completion
from research.traces.manifest import replace_file

JOURNAL_FILE = "pending.jsonl"


@dataclass(frozen=True)
class Cost:
    """What writing cost: tokens as the generator counts them, FLOPs, seconds of wall time; None: not known."""

    tokens: float | None = 0.0
    flops: float | None = 0.0
    seconds: float | None = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """The sum; what is not known of either stays unknown."""
        return Cost(_sum(self.tokens, other.tokens), _sum(self.flops, other.flops), _sum(self.seconds, other.seconds))


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


class Journal:
    """One JSON line for each prompt of the block in work, appended as it is finished.

    path      the file; it lives beside the shards, and its lock is the store writer's
    settings  fingerprint of the run: lines of another are not used

    A line that a kill cut off is dropped, as is a journal of a block that became a shard.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self._settings = path, settings
        self._stream: IO[str] | None = None

    def open(self, block: int) -> tuple[dict[int, Written], Cost]:
        """Begin a block: what an earlier process finished of it, by index, and what that cost."""
        head = {"block": block, "settings": self._settings}
        lines = self._lines()
        found, cost = {}, Cost()
        if lines and lines[0] == head:
            for line in lines[1:]:
                completions = tuple(Completion.from_plain(each) for each in line["completions"])
                found[line["index"]] = Written(line["index"], completions)
                cost += Cost(**line["cost"])
        self.close()
        kept = "".join(json.dumps(line) + "\n" for line in (lines if found else [head]))
        replace_file(self.path, kept.encode())
        self._stream = self.path.open("a", encoding="utf-8")
        return found, cost

    def append(self, written: Written, cost: Cost) -> None:
        """Add one prompt's completions and what they cost; they survive a kill from here on."""
        if self._stream is None:
            raise RuntimeError("the journal of a store was written to before its block was opened")
        line: dict[str, Any] = {"index": written.index, "cost": asdict(cost)}
        line["completions"] = [asdict(completion) for completion in written.completions]
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Let go of the file and keep what is in it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def drop(self) -> None:
        """The block is a shard now."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _lines(self) -> list[dict[str, Any]]:
        try:
            content = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        for text in content.split("\n")[:-1]:  # what follows the last line end was cut off
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines
