"""Rows of published problem sets: from a local folder, else through Hugging Face ``datasets``; and their splits."""

import gzip
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from research.errors import ConfigError
from research.records import Problem
from research.tasks.base import Split, TooFewProblems
from research.tasks.drawing import check_request, split_of

DATA_VARIABLE = "RESEARCH_DATA_DIR"

Row = dict[str, Any]


@dataclass(frozen=True)
class Hub:
    """Where a set is published: a data set of Hugging Face, its configuration, and split names for train and test."""

    name: str
    config: str | None
    splits: Mapping[str, str]
    to_row: Callable[[Row], Row]


def folder_of(data_dir: str | os.PathLike[str] | None) -> Path | None:
    """``data_dir``, else what RESEARCH_DATA_DIR names, else None."""
    given = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    return Path(given) if given else None


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a gzipped JSONL file, each with all ``columns``.

    Raises ConfigError, naming file and line, where it is missing, damaged, no JSON, or a row lacks a column.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8-sig").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: put it there, or set task.data_dir to a folder that has it") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({error}), expected gzipped JSON lines: restore the file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}, expected one JSON object: restore the file") from None
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            raise ConfigError(f"{path}, line {number} lacks {', '.join(missing)}: expected {', '.join(columns)}")
        rows.append(row)
    return rows


def official_rows(
    data_dir: str | os.PathLike[str] | None, files: Mapping[str, str], columns: Sequence[str], hub: Hub | None
) -> dict[str, list[Row]]:
    """The official splits, ``train`` and ``test``: from ``files`` below the data folder where its first one exists,
    else from ``hub``; ConfigError, saying what to do, where there is neither."""
    folder = folder_of(data_dir)
    if folder is not None and (folder / next(iter(files.values()))).exists():
        return {split: read_rows(folder / name, columns) for split, name in files.items()}
    tried = f"task.data_dir and {DATA_VARIABLE} are not set" if folder is None else f"{folder} has none of them"
    advice = f"{', '.join(files.values())}: {tried}"
    if hub is None:
        raise ConfigError(f"{advice}; set one to a folder that holds them (they are on no hub)")
    return _from_hub(hub, advice)


def _from_hub(hub: Hub, advice: str) -> dict[str, list[Row]]:
    try:
        from datasets import load_dataset  # an optional extra
    except ImportError as error:
        raise ConfigError(
            f"{advice}; set one to a folder that holds them, or pip install 'research-distillation[hub]' to fetch"
            f" {hub.name} from Hugging Face"
        ) from error
    try:
        loaded = load_dataset(hub.name, hub.config)
        return {split: [hub.to_row(dict(row)) for row in loaded[name]] for split, name in hub.splits.items()}
    except Exception as error:  # the hub's failures share no base class
        raise ConfigError(
            f"{advice}, and fetching {hub.name} from Hugging Face failed with {type(error).__name__}: {error};"
            " set one to a folder that holds them"
        ) from error


@dataclass(frozen=True)
class Official:
    """Problems per split, and how many of the official ones were left out, by reason."""

    problems: Mapping[Split, tuple[Problem, ...]]
    dropped: Mapping[str, int]

    def first(self, name: str, split: Split, num: int | None) -> list[Problem]:
        """The first ``num`` problems of a split, or all; TooFewProblems where there are fewer."""
        check_request(name, split, num, needed=False)
        found = self.problems[split]
        if num is not None and num > len(found):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            left_out = f" (of all splits, rows left out: {reasons})" if reasons else ""
            held = f"split {split!r} holds only {len(found)} problems{left_out}; null takes all"
            raise TooFewProblems(name, num, held)
        return list(found[:num])


class FromFiles(ABC):
    """The part of a task whose problems, all of them, stand in files; ``official`` reads them at the first need."""

    name: str

    @property
    @abstractmethod
    def official(self) -> Official: ...

    @property
    def left_out(self) -> Mapping[str, int]:
        return self.official.dropped

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        return self.official.first(self.name, split, num)


def with_hold_out(train: Iterable[Problem], test: Iterable[Problem]) -> Official:
    """Official test; official train less about a tenth of it, by a hash of the text, which is val.

    A text that came before, in test or in train, is dropped from train and counted; one within test likewise.
    """
    return _collect([(None, problem) for problem in train], test)


def split_by_text(problems: Iterable[Problem]) -> Official:
    """No official split: 8 tenths of the texts train, 1 val, 1 test, by hash. Repeated texts are dropped, counted."""
    return _collect([(split_of(problem.text), problem) for problem in problems], ())


def _collect(rest: Sequence[tuple[Split | None, Problem]], test: Iterable[Problem]) -> Official:
    found: dict[Split, list[Problem]] = {"train": [], "val": [], "test": []}
    dropped: dict[str, int] = {}
    seen: dict[str, str] = {}
    official: list[tuple[Split | None, Problem]] = [("test", problem) for problem in test]
    for given, problem in [*official, *rest]:
        split: Split = given or ("val" if split_of(problem.text) == "val" else "train")
        if problem.text in seen:
            reason = f"repeated in {seen[problem.text]}"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        seen[problem.text] = split
        found[split].append(replace(problem, index=len(found[split])))
    return Official({split: tuple(problems) for split, problems in found.items()}, dropped)
