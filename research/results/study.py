"""A study: the question, the arms that answer it, and the verdict rule, all fixed in ``study.yaml`` before the runs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from research.results.comparison_spec import ComparisonSpec
from research.results.fields import StudyError, nearest

# {seed} and {requires.teacher}, but not Hydra's own braces such as {a: 1} or ${data.root}
_PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z_][\w.+-]*)\}")


@dataclass(frozen=True)
class Requirement:
    """A run that the cells build on (a teacher, a cache): run once, before the arms, in declared order."""

    name: str
    command: str
    overrides: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"requires/{self.name}"


@dataclass(frozen=True)
class Arm:
    """One treatment: its overrides, its own seeds (None: the study's), and the factors it is crossed with."""

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...] | None = None
    factors: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """A named variation of the whole study, such as ``smoke`` (seconds) or ``paper`` (full length)."""

    name: str
    base: tuple[str, ...] = ()
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    arms: tuple[str, ...] | None = None
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class CurveSpec:
    """One figure of a metric, measured at every validation, over what had been spent: flops, tokens, seconds, steps."""

    metric: str
    against: str


@dataclass(frozen=True)
class Study:
    """The content of one ``study.yaml``; ``factors`` maps factor -> level label -> overrides, in declared order.

    ``command`` says what a cell is: ``train``, one run, or ``sweep``, a whole search.
    """

    name: str
    claim: str
    question: str
    base: tuple[str, ...]
    requires: Mapping[str, Requirement]
    arms: Mapping[str, Arm]
    factors: Mapping[str, Mapping[str, tuple[str, ...]]]
    seeds: tuple[int, ...]
    metric: str
    lower_is_better: bool
    comparison: ComparisonSpec
    secondary: Mapping[str, ComparisonSpec]
    published: Mapping[str, Any]
    budget: Mapping[str, Any]
    presets: Mapping[str, Preset]
    path: Path
    curves: tuple[CurveSpec, ...] = ()
    command: str = "train"

    def preset(self, name: str | None) -> Preset:
        """The named preset; the empty one for None. Raises StudyError with the nearest valid name."""
        if name is None:
            return Preset("")
        if name not in self.presets:
            raise StudyError(f"{self.path}: no preset {name!r}; {nearest(name, self.presets)}")
        return self.presets[name]


@dataclass(frozen=True)
class Cell:
    """One run of a study: an arm at one level of each of its factors with one seed.

    ``overrides`` may still hold {requires.NAME}, and {arms.NAME}: the run of another arm with the same seed, which this
    one goes on from. :meth:`filled` gives the final list. ``key`` is the run's directory name below the study's, such
    as ``soft/temperature=4,width=30/seed=2``.
    """

    arm: str
    factors: Mapping[str, str]
    seed: int
    overrides: tuple[str, ...]
    key: str

    @property
    def needs(self) -> frozenset[str]:
        """Names of the arms whose runs this one goes on from."""
        return named_arms(self.overrides)

    def filled(self, requirement_dirs: Mapping[str, str | Path], runs_dir: str | Path = "") -> list[str]:
        """The overrides with every placeholder replaced; raises StudyError for an unknown one.

        runs_dir  where the cells' runs lie, by key; needed where the cell goes on from another
        """
        values = {f"requires.{name}": str(directory) for name, directory in requirement_dirs.items()}
        values |= {f"arms.{name}": str(Path(runs_dir) / name / f"seed={self.seed}") for name in self.needs}
        return fill_placeholders(self.overrides, {"seed": str(self.seed), **values})


def named_arms(overrides: Iterable[str]) -> frozenset[str]:
    """The arms that stand in overrides as {arms.NAME}."""
    found = [match for override in overrides for match in _PLACEHOLDER.findall(override)]
    return frozenset(name.removeprefix("arms.") for name in found if name.startswith("arms."))


def stages(declared: Iterable[Cell]) -> list[list[Cell]]:
    """The cells in the order in which they can run: each stage goes on from runs of earlier ones alone.

    :func:`read_study` has seen to it that an arm is declared after those it needs.
    """
    depth: dict[str, int] = {}
    by_depth: dict[int, list[Cell]] = {}
    for cell in declared:
        depth[cell.arm] = max((depth.get(name, 0) + 1 for name in cell.needs), default=0)
        by_depth.setdefault(depth[cell.arm], []).append(cell)
    return [by_depth[number] for number in sorted(by_depth)]


def fill_placeholders(overrides: Iterable[str], values: Mapping[str, str]) -> list[str]:
    """Each ``{name}`` replaced by ``values[name]``; raises StudyError for a name without a value."""

    def replace(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise StudyError(
                f"override {match.string!r}: unknown placeholder {{{match[1]}}}; {nearest(match[1], values)}"
            )
        return values[match[1]]

    return [_PLACEHOLDER.sub(replace, override) for override in overrides]


def requirements(study: Study, preset: str | None = None) -> list[Requirement]:
    """The runs to make before the cells, in declared order, with the preset's own additions."""
    extra = study.preset(preset).requires
    return [
        Requirement(item.name, item.command, (*item.overrides, *extra.get(item.name, ())))
        for item in study.requires.values()
    ]


def cells(study: Study, preset: str | None = None) -> list[Cell]:
    """Every cell, arm by arm, then level by level, then seed by seed, in declared order.

    A preset's ``seeds`` replace the study's and those of every arm.
    """
    chosen = study.preset(preset)
    found = []
    for arm in study.arms.values():
        if chosen.arms is not None and arm.name not in chosen.arms:
            continue
        levels = [
            [(name, label) for label in chosen.levels.get(name, tuple(study.factors[name]))] for name in arm.factors
        ]
        for combination in product(*levels):
            for seed in chosen.seeds or arm.seeds or study.seeds:
                found.append(_cell(study, chosen, arm, dict(combination), seed))
    return found


def _cell(study: Study, preset: Preset, arm: Arm, factors: dict[str, str], seed: int) -> Cell:
    overrides = [*study.base, *arm.overrides]
    for name, label in factors.items():
        overrides += study.factors[name][label]
    overrides += preset.base
    if not any(override.startswith("seed=") for override in overrides):
        overrides.append("seed={seed}")
    levels = ",".join(f"{name}={factors[name]}" for name in sorted(factors))
    key = "/".join(part for part in (arm.name, levels, f"seed={seed}") if part)
    return Cell(arm.name, factors, seed, tuple(overrides), key)
