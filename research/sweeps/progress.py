"""One display for many runs: finished of all, and how far each running one is."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from research.results.record import PROGRESS_FILE
from research.sweeps.repeating import repeating

EVERY_S = 1.0


class RunBars:
    """A bar for every run that has begun, by the `progress.json` that runs write into their folders."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[Path, TaskID] = {}

    def show(self, folders: Sequence[str]) -> None:
        """Bars for exactly these runs, or for the newest of the runs inside each."""
        found = {newest for folder in folders if (newest := _newest(Path(folder))) is not None}
        for folder in set(self._bars) - found:
            self.drop(folder)
        for folder in sorted(found):
            self.update(folder)

    def update(self, folder: Path) -> None:
        """Read how far the run in a folder is."""
        try:
            told = json.loads((folder / PROGRESS_FILE).read_text())
        except (OSError, ValueError):
            return
        if folder not in self._bars:
            name = "/".join(folder.parts[-2:])
            self._bars[folder] = self._progress.add_task(f"  {name}", total=told["total_steps"])
        self._progress.update(self._bars[folder], completed=told["step"])

    def drop(self, folder: Path) -> None:
        """Take a run's bar away."""
        bar = self._bars.pop(folder, None)
        if bar is not None:
            self._progress.remove_task(bar)


class StudyProgress:
    """A bar for the study and, below it, one for every run that has begun and not ended.

    Runs write `progress.json` into their folders; this reads them, so it works for any launcher. Where the output is
    no terminal, one line is printed for each tenth of the study instead.
    """

    def __init__(self, name: str, total: int) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, disable=not self._live,
        )  # fmt: skip
        self._name, self._total, self._done, self._told = name, total, 0, -1
        self._console = console
        self._study = self._progress.add_task(name, total=total)
        self._runs = RunBars(self._progress)

    def __enter__(self) -> "StudyProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, number: int) -> None:
        """Count `number` more runs as finished."""
        self._done += number
        self._progress.update(self._study, completed=self._done)
        tenth = 10 * self._done // max(1, self._total)
        if not self._live and tenth != self._told:
            self._told = tenth
            self._console.print(f"{self._name}: {self._done} of {self._total} runs finished")

    @contextmanager
    def watching(self, folders: Sequence[Path], is_finished: Callable[[Path], bool]) -> Iterator[None]:
        """Follow the runs in `folders` from a thread while the caller's launcher works on them."""
        waiting = list(folders)

        def look() -> None:
            for folder in [folder for folder in waiting if is_finished(folder)]:
                waiting.remove(folder)
                self._runs.drop(folder)
                self.advance(1)
            for folder in waiting:
                self._runs.update(folder)

        try:
            with repeating(look, EVERY_S, "run display"):
                yield
        finally:
            look()
            for folder in waiting:
                self._runs.drop(folder)


def _newest(folder: Path) -> Path | None:
    """The folder of the run that told last, this one or one right inside."""
    found = [*folder.glob(PROGRESS_FILE), *folder.glob(f"*/{PROGRESS_FILE}")]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None
