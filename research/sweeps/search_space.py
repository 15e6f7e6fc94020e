"""What a sweep searches: parameters, blocks that exist only sometimes, paired values; and the points they make.

Imports no Optuna: a space is checked and counted before a study is opened.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from research.errors import ConfigError
from research.schemas import nearest
from research.sweeps.grammar import written

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Choice:
    """One value of a discrete parameter: as the study stores it, and the overrides that it stands for."""

    stored: Scalar
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """One searched parameter.

    name      in the study: the key without + or ++, or the name of a zipped group
    key       as it is written into an override, prefix included
    choices   of a discrete parameter; else it is a number from low to high, both included
    step      distance of neighbouring values; None: continuous (of an integer: 1)
    when      (name of an earlier parameter, the stored values with which this one exists), all of them needed
    """

    name: str
    key: str
    choices: tuple[Choice, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    is_int: bool = False
    when: tuple[tuple[str, tuple[Scalar, ...]], ...] = ()

    @property
    def keys(self) -> set[str]:
        """The keys that its values are written to: of a zipped group several."""
        if not self.choices:
            return {self.name}
        return {text.partition("=")[0].lstrip("+") for choice in self.choices for text in choice.overrides}

    def suggest(self, trial: Any) -> Any:
        """A value, as Optuna's trial draws it."""
        if self.choices:
            return trial.suggest_categorical(self.name, [choice.stored for choice in self.choices])
        if self.is_int:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.name, low, high, step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def exists(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the parameter exists beside the values that were chosen before it."""
        return all(name in chosen and _among(chosen[name], values) for name, values in self.when)

    def overrides(self, value: Any) -> tuple[str, ...]:
        """The overrides of one value, in Hydra's grammar. Raises ConfigError for a value that it cannot take."""
        if self.choices:
            for choice in self.choices:
                if _among(value, (choice.stored,)):
                    return choice.overrides
            valid = ", ".join(map(repr, self.values()))
            raise ConfigError(f"{self.name} is {value!r}; the search has {valid}")
        return (f"{self.key}={written(int(value) if self.is_int else float(value))}",)

    @property
    def is_countable(self) -> bool:
        """Whether its values can be tried one after the other: not those of an interval, nor of a log scale."""
        return bool(self.choices) or self.step is not None or (self.is_int and not self.log)

    def values(self) -> list[Any]:
        """Every value of a discrete parameter, as stored. Raises ConfigError where they cannot be counted."""
        if self.choices:
            return [choice.stored for choice in self.choices]
        if not self.is_countable:
            raise ConfigError(
                f"{self.name} is continuous, from {self.low} to {self.high}; a grid needs choice(...) or range(...)"
            )
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        found = [Decimal(str(self.low)) + number * Decimal(str(step)) for number in range(count)]
        return [int(value) if self.is_int else float(value) for value in found]

    def contains(self, value: Any) -> bool:
        """Whether a value lies in the parameter's domain."""
        if self.choices:
            return any(_among(value, (choice.stored,)) for choice in self.choices)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high and (not self.is_int or float(value).is_integer())

    def described(self) -> dict[str, Any]:
        """The parameter as plain values: what a study remembers of it, to compare with the next command's."""
        told: dict[str, Any] = {"key": self.key}
        if self.choices:
            told["choices"] = [list(choice.overrides) for choice in self.choices]
        else:
            kind = "int" if self.is_int else "float"
            told |= {"low": self.low, "high": self.high, "step": self.step, "log": self.log, "type": kind}
        if self.when:
            told["when"] = {name: list(values) for name, values in self.when}
        return told


@dataclass(frozen=True)
class SearchSpace:
    """The parameters of a sweep, in the order in which they are drawn."""

    parameters: tuple[Parameter, ...] = ()
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        counts: dict[str, int] = {}
        for parameter in self.parameters:
            for name in {parameter.name} | parameter.keys:
                counts[name] = counts.get(name, 0) + 1
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ConfigError(
                f"{', '.join(twice)} is searched twice; give each parameter once, in params, zipped or conditional. "
                "One that stands in two conditional blocks needs one block whose `when` lists both values"
            )
        object.__setattr__(self, "names", frozenset(parameter.name for parameter in self.parameters))

    @property
    def is_conditional(self) -> bool:
        """Whether some parameters exist only beside certain values of others."""
        return any(parameter.when for parameter in self.parameters)

    def overrides(self, chosen: Mapping[str, Any]) -> list[str]:
        """The overrides of one point: parameter name -> value, as stored."""
        return [
            text
            for parameter in self.parameters
            if parameter.name in chosen
            for text in parameter.overrides(chosen[parameter.name])
        ]

    def draw(self, suggest: Callable[[Parameter], Any]) -> dict[str, Any]:
        """One point: every parameter that exists, its value asked of `suggest` in order."""
        chosen: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.exists(chosen):
                chosen[parameter.name] = suggest(parameter)
        return chosen

    def points(self, fixed: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Every point of a discrete space, the last parameter varying fastest; ConfigError for a continuous one.

        fixed  name -> the one value of a parameter that is held
        """
        yield from self._points({}, self.parameters, fixed or {})

    def _points(
        self, chosen: dict[str, Any], rest: Sequence[Parameter], fixed: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        if not rest:
            yield chosen
        elif not rest[0].exists(chosen):
            yield from self._points(chosen, rest[1:], fixed)
        else:
            name = rest[0].name
            for value in [fixed[name]] if name in fixed else rest[0].values():
                yield from self._points({**chosen, name: value}, rest[1:], fixed)

    def size(self) -> int | None:
        """How many points there are; None where there is no end of them."""
        try:
            return sum(1 for _ in self.points())
        except ConfigError:
            return None

    def check_point(self, point: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A point given by hand, checked; names without + and values as YAML has them. Raises ConfigError."""
        by_name = {parameter.name: parameter for parameter in self.parameters}
        checked: dict[str, Any] = {}
        for key, value in point.items():
            name = str(key).lstrip("+")
            if name not in by_name:
                raise ConfigError(f"{where} names {name}, which is not searched{nearest(name, by_name)}")
            stored = stored_as(by_name[name], value)
            if not by_name[name].contains(stored):
                raise ConfigError(f"{where}.{name} is {value!r}, outside {by_name[name].described()}")
            checked[name] = stored
        return checked

    def described(self) -> dict[str, Any]:
        """Name -> what the parameter is."""
        return {parameter.name: parameter.described() for parameter in self.parameters}


def stored_as(parameter: Parameter, value: Any) -> Any:
    """A value as YAML has it, as the study stores it: a list or dict by its text, a number as it is."""
    if isinstance(value, Mapping):  # of a zipped group: what its keys are together
        lines = {f"{key}={written(item)}" for key, item in value.items()}
        together = [choice.stored for choice in parameter.choices if set(choice.overrides) == lines]
        if together and len(parameter.keys) > 1:
            return together[0]
    if isinstance(value, list | tuple | Mapping):
        return written(value)
    if any(_among(value, (choice.stored,)) for choice in parameter.choices) or not parameter.choices:
        return value
    text = written(value)
    named = [choice.stored for choice in parameter.choices if choice.overrides[0].partition("=")[2] == text]
    return named[0] if len(named) == 1 else value


def _among(value: Any, values: Sequence[Any]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)
