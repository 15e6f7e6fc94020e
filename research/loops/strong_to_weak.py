"""Phases of one training, each a run of its own: what a config says of them, and what their records amount to.

Off-policy traces first, the student's own words after that: Qwen3's recipe (Yang et al. 2025, arXiv:2505.09388, 4.5).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.data.train_traces import store_folders
from research.errors import CheckpointError, ConfigError
from research.loops.ledger import Ledger, Line, sum_lines, summed, with_traces
from research.loops.scoring import Scores
from research.results.record import LEDGER_FIELDS, RunRecord

PHASES_FOLDER = "phases"
# what says where a phase begins and lies, not what it is
PLACES = ("init_from", "ckpt_path")
_OWN_KEYS = (*PLACES, "loop")
_NAME = re.compile(r"[A-Za-z]\w*")


@dataclass(frozen=True)
class Phase:
    """One run of several: the run's own overrides hold for it too, and ``overrides`` after them."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class StrongToWeakPlan:
    """Settings of ``loop=strong_to_weak``.

    phases  in order, each a mapping of ``name`` and ``overrides``: of `distill train`, without loop, init_from and
            ckpt_path, which the loop sets. The first begins where the run's own ``init_from`` says, each later one
            with the student of the one before

    Raises ConfigError for phases that cannot be meant.
    """

    phases: Sequence[Any]

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.declared()]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"loop.phases has the names {names}; expected at least one phase, each name once")

    def declared(self) -> tuple[Phase, ...]:
        """The phases, checked."""
        return tuple(_phase(number, given) for number, given in enumerate(self.phases))


def _phase(number: int, given: Any) -> Phase:
    where = f"loop.phases[{number}]"
    if not isinstance(given, Mapping) or set(given) - {"name", "overrides"} or "name" not in given:
        raise ConfigError(
            f"{where} is {given!r}; expected a name and overrides, such as "
            "{name: off_policy, overrides: ['method=sft_trace']}"
        )
    name, overrides = given["name"], given.get("overrides") or []
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}.name is {name!r}; expected letters, digits and _: it names a folder and metrics")
    if not isinstance(overrides, list | tuple) or not all(isinstance(text, str) for text in overrides):
        raise ConfigError(f"{where}.overrides is {overrides!r}; expected a list of texts, such as [method=sft_trace]")
    for text in overrides:
        if key_of(text).partition(".")[0] in (*_OWN_KEYS, "hydra"):
            raise ConfigError(f"{where}.overrides has {text!r}, which the loop sets itself; leave it out")
    return Phase(name, tuple(overrides))


def key_of(override: str) -> str:
    """The key of an override: ``+data.task.num_terms=8`` -> ``data.task.num_terms``."""
    return override.lstrip("+~").partition("=")[0]


def folder_of(run_dir: Path, number: int, phase: Phase) -> Path:
    """Where a phase lies in the run's folder, numbered from 1."""
    return run_dir / PHASES_FOLDER / f"{number + 1}_{phase.name}"


def overrides_of(phase: Phase, of_run: Sequence[str], init_from: str | None, ckpt_path: str | None) -> list[str]:
    """A phase's overrides: the run's that the phase does not replace, the phase's, and where it begins.

    init_from  as one value of Hydra's grammar; None: as the run has it
    """
    replaced = {key_of(text) for text in phase.overrides} | {"loop", "ckpt_path"}
    replaced |= set() if init_from is None else {"init_from"}
    kept = [text for text in of_run if key_of(text) not in replaced and not key_of(text).startswith("loop.")]
    places = [f"{key}={value}" for key, value in zip(PLACES, (init_from, ckpt_path), strict=True) if value is not None]
    return [*kept, *phase.overrides, "loop=none", *places]


def check_finished(record: RunRecord, overrides: Sequence[str], folder: Path, *, is_first: bool) -> None:
    """Raise CheckpointError where a finished phase was another run than this one would be, its place aside.

    is_first  the first phase begins where the run says, and with another ``init_from`` it is another run; a later one
              begins in the run's own folder, wherever that lies
    """
    aside = ("ckpt_path",) if is_first else PLACES
    found, wanted = (
        [text for text in texts if key_of(text) not in aside] for texts in (record.overrides, list(overrides))
    )
    if found != wanted:
        only = [f"{text} then" for text in found if text not in wanted]
        only += [f"{text} now" for text in wanted if text not in found]
        raise CheckpointError(
            f"{folder} holds a finished phase of another run ({', '.join(only) or 'in another order'}); give the same "
            "overrides, or another run folder"
        )


def scores_of(run_dir: Path, folders: Mapping[str, Path], records: Mapping[str, RunRecord]) -> Scores:
    """The last phase's metrics and files as those of the whole run; of the others ``phase_<name>/<metric>``."""
    *earlier, last = records
    scores = Scores(dict(records[last].metrics))
    for name in earlier:
        scores.metrics |= {f"phase_{name}/{metric}": value for metric, value in records[name].metrics.items()}
    prefix = folders[last].relative_to(run_dir)
    own = ("student", "curve")  # which the whole run leaves itself
    scores.artifacts = {name: str(prefix / path) for name, path in records[last].artifacts.items() if name not in own}
    return scores


def ledger_of_phases(records: Sequence[RunRecord]) -> Ledger:
    """The sum over phases; a teacher of several of them was trained once, and traces of several were written once."""
    trained: dict[str, Line] = {}
    stores: list[Path] = []
    for record in records:
        if record.teacher is not None and any(record.ledger["teacher_scoring"].values()):
            told = record.teacher
            trained[told["sha256"]] = {name: told.get(f"training_{name}") for name in LEDGER_FIELDS}
        data = record.config.get("data") or {}
        stores += store_folders(data.get("store"), data.get("mixture"))
    whole = summed(record.ledger for record in records)
    return with_traces(whole | {"teacher_training": sum_lines(trained.values())}, stores, trained)
