"""Every completed run of a study, looked up by arm, level and seed: what the comparisons and the figure read."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from research.results.bootstrap import DRAWS, RNG_SEED, ItemResampler, seed_weights
from research.results.comparison_spec import OperandSpec
from research.results.fields import StudyError, nearest
from research.results.items import StudyItems
from research.results.study import Cell

# metric name -> (offset, factor, whether factor is divided by the number of items), applied to the count of wrong items
_FROM_ITEMS = {"errors": (0.0, 1.0, False), "error_rate": (0.0, 1.0, True), "accuracy": (1.0, -1.0, True)}


@dataclass(frozen=True)
class Operand:
    """One side of a comparison over paired seeds.

    values_S       the metric per seed (mean over the levels of factors left open)
    resampled_DS   the same in every resampled test set, [draws, seeds] or [draws, 1]; None where the metric cannot be
                   rebuilt from the committed items
    """

    name: str
    values_S: np.ndarray
    resampled_DS: np.ndarray | None
    where: tuple[tuple[str, str], ...] = ()

    @property
    def mean(self) -> float:
        return float(self.values_S.mean())

    def draws(self, weights_DS: np.ndarray, use_items: bool) -> np.ndarray:
        """The operand's mean in every bootstrap draw: seeds weighted, items resampled where ``use_items``."""
        if use_items and self.resampled_DS is not None:
            return np.asarray(np.einsum("ds,ds->d", weights_DS, np.broadcast_to(self.resampled_DS, weights_DS.shape)))
        return np.asarray(weights_DS @ self.values_S)


class Panel:
    """``records`` maps a cell's or requirement's key to its trimmed record; absent keys are missing runs."""

    def __init__(
        self,
        cells: Iterable[Cell],
        records: Mapping[str, Mapping[str, Any]],
        items: StudyItems | None = None,
        draws: int = DRAWS,
        rng_seed: int = RNG_SEED,
    ) -> None:
        self.cells = list(cells)
        self.records = records
        self.items = items
        self._draws, self._rng_seed = draws, rng_seed
        self._weights: dict[int, np.ndarray] = {}
        self._resampled_keys: set[str] | None = None

    def select(self, arm: str, where: Mapping[str, str]) -> list[Cell]:
        """The arm's cells at the levels ``where`` fixes; factors that the arm does not have are not asked for."""
        return [
            cell
            for cell in self.cells
            if cell.arm == arm and all(cell.factors.get(name, label) == label for name, label in where.items())
        ]

    def metric(self, key: str, name: str) -> float:
        """A run's recorded metric; raises StudyError naming the run where it is absent or not finite."""
        metrics = self.records[key]["metrics"]
        if name not in metrics:
            raise StudyError(f"{key}: its record has no metric {name!r}; {nearest(name, metrics)}")
        value = float(metrics[name])
        if not math.isfinite(value):
            raise StudyError(f"{key}: its record has {name} = {value}; a result needs a finite number")
        return value

    def values(self, arm: str, where: Mapping[str, str], metric: str) -> dict[int, float]:
        """seed -> metric, averaged over open factors; only seeds with every run completed."""
        by_seed, _ = self._complete(arm, where)
        return {seed: float(np.mean([self.metric(key, metric) for key in keys])) for seed, keys in by_seed.items()}

    def _complete(self, arm: str, where: Mapping[str, str]) -> tuple[dict[int, list[str]], list[str]]:
        keys: dict[int, list[str]] = {}
        for cell in self.select(arm, where):
            keys.setdefault(cell.seed, []).append(cell.key)
        missing = [key for group in keys.values() for key in group if key not in self.records]
        return {seed: group for seed, group in keys.items() if not set(group) & set(missing)}, missing

    def resample_only(self, specs: Iterable[OperandSpec]) -> None:
        """Declares before the first comparison which runs' items will be asked for; drawing fewer is faster."""
        keys = {cell.key for spec in specs if spec.arm for cell in self.select(spec.arm, dict(spec.where))}
        self._resampled_keys = keys | {f"requires/{spec.requirement}" for spec in specs if spec.requirement}

    def operands(
        self, specs: Iterable[OperandSpec], metric: str, with_items: bool = True
    ) -> tuple[list[Operand], int, list[str]]:
        """The operands over the seeds that all of them have, how many those are, and the runs that are missing."""
        found: list[tuple[OperandSpec, dict[int, list[str]]]] = []
        missing: list[str] = []
        for spec in specs:
            by_seed: dict[int, list[str]] = {}
            if spec.arm is not None:
                by_seed, absent = self._complete(spec.arm, dict(spec.where))
                missing += absent
            elif spec.requirement is not None and f"requires/{spec.requirement}" not in self.records:
                missing.append(f"requires/{spec.requirement}")
            found.append((spec, by_seed))
        paired = [set(by_seed) for spec, by_seed in found if spec.arm is not None]
        seeds = sorted(set.intersection(*paired)) if paired else []
        if not seeds or any(spec.requirement and f"requires/{spec.requirement}" in missing for spec, _ in found):
            return [], 0, sorted(set(missing))
        made = []
        for spec, by_seed in found:
            keys_S = [by_seed[seed] for seed in seeds] if by_seed else []
            made.append(self._operand(spec, keys_S, len(seeds), metric, with_items))
        return made, len(seeds), sorted(set(missing))

    def _operand(self, spec: OperandSpec, keys_S: list[list[str]], n: int, metric: str, with_items: bool) -> Operand:
        if spec.value is not None:
            return Operand(spec.name, np.full(n, spec.value), np.full((1, 1), spec.value))
        name = spec.metric or metric
        if spec.requirement is not None:
            keys_S = [[f"requires/{spec.requirement}"]]
        values = np.array([np.mean([self.metric(key, name) for key in keys]) for keys in keys_S])
        resampled = [[self.resampled(key, name) if with_items else None for key in keys] for keys in keys_S]
        if any(column is None for group in resampled for column in group):
            return Operand(spec.name, np.broadcast_to(values, (n,)), None, spec.where)
        columns = [group[0] if len(group) == 1 else np.mean(group, axis=0) for group in resampled]  # type: ignore[arg-type]
        stacked = np.stack(columns, axis=1)  # type: ignore[arg-type]
        return Operand(spec.name, np.broadcast_to(values, (n,)), stacked, spec.where)

    def resampled(self, key: str, metric: str) -> np.ndarray | None:
        """The metric in every resampled test set, or None where the items cannot give it.

        Raises StudyError where the items and the record of the run contradict each other.
        """
        split, _, name = metric.partition("/")
        if (
            self.items is None
            or split != self.items.split
            or name not in _FROM_ITEMS
            or key not in self.items.predictions
        ):
            return None
        offset, factor, per_item = _FROM_ITEMS[name]
        factor = factor / len(self.items.index_I) if per_item else factor
        rebuilt, recorded = offset + factor * float(self.items.wrong(key).sum()), self.metric(key, metric)
        if abs(rebuilt - recorded) > 1e-5 * max(1.0, abs(recorded)):
            raise StudyError(
                f"{key}: its record says {metric} = {recorded:g}, its items say {rebuilt:g}; collect the runs again"
            )
        return np.asarray(offset + factor * self._resampler.totals(key))

    def weights(self, n: int) -> np.ndarray:
        """Seed weights of ``n`` paired seeds, one row per draw: the same for every comparison over n seeds."""
        if n not in self._weights:
            self._weights[n] = seed_weights(n, self._draws, self._rng_seed)
        return self._weights[n]

    @cached_property
    def _resampler(self) -> ItemResampler:
        if self.items is None:
            raise ValueError("no items to resample")
        keys = [key for key in self.items.predictions if key in self.records]
        if self._resampled_keys is not None:
            keys = [key for key in keys if key in self._resampled_keys]
        wrong = {key: self.items.wrong(key) for key in keys}
        return ItemResampler(wrong, self._draws, self._rng_seed)
