"""The progress bar of a trace run: problems, tokens per second, acceptance, remaining time."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TraceProgress:
    """A watch that shows a bar on a terminal and nothing elsewhere.

    Tokens per second are those of this process; acceptance is of the whole store, what an earlier process judged
    included.
    """

    def __init__(self, name: str, total: int | None, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[acceptance]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not (shown and sys.stderr.isatty()),
        )  # fmt: skip
        self._task = self._progress.add_task(name, total=total, rate="", acceptance="")
        self._tokens = self._written = self._kept = 0
        self._started = time.perf_counter()

    def __enter__(self) -> "TraceProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, problems: int, tokens: int) -> None:
        """So many more problems were answered, with so many tokens."""
        self._tokens += tokens
        self._progress.update(self._task, advance=problems, rate=self.rate)

    def judged(self, written: int, kept: int) -> None:
        """So many more traces went through the filters, so many of them were kept."""
        self._written += written
        self._kept += kept
        self._progress.update(self._task, acceptance=self.acceptance)

    @property
    def rate(self) -> str:
        """Tokens per second since this process began, as it is shown."""
        return f"{self._tokens / max(1e-9, time.perf_counter() - self._started):,.0f} tokens/s"

    @property
    def acceptance(self) -> str:
        """Share of traces kept, as it is shown; nothing before the first is judged."""
        return f"{self._kept / self._written:.0%} kept" if self._written else ""
