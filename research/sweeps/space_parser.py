"""Reads a search space: Hydra's override grammar, lists of values, paired groups and conditional blocks.

Says what is wrong with a text before anything is made of it.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    ValueType,
)
from hydra.errors import HydraException

from research.errors import ConfigError
from research.schemas import nearest
from research.sweeps.grammar import written
from research.sweeps.search_space import Choice, Parameter, SearchSpace, stored_as

_CHOICE = re.compile(r"\s*choice\((.*)\)\s*", re.DOTALL)


def parse_space(
    params: Mapping[str, Any],
    arguments: Sequence[str],
    *,
    zipped: Mapping[str, Any] | None = None,
    conditional: Sequence[Mapping[str, Any]] = (),
    config_loader: Any = None,
) -> tuple[SearchSpace, list[str]]:
    """The space of a sweep and the overrides that are the same in every trial.

    params       key -> text in Hydra's grammar, or a list of values
    arguments    the command line's overrides: sweeps replace the entry of `params` with the same key
    zipped       name -> {key: list of values}: the first values of all keys together, then the second, ...
    conditional  blocks {when: {name: value or values}, params: {...}}: those params exist beside those values alone
    Raises ConfigError for a text that does not parse, a range without values, a single choice, and a key that is both
    fixed and searched.
    """
    searched: dict[str, Parameter] = {}
    for key, value in params.items():
        parameter = read_parameter(str(key), value, config_loader)
        searched[parameter.name] = parameter
    fixed: list[str] = []
    fixed_names: dict[str, str] = {}
    for override in _parsed(arguments, config_loader):
        name = override.get_key_element().lstrip("+~")
        if override.is_sweep_override():
            searched[name] = _parameter_of(override)
        else:
            fixed.append(str(override.input_line))
            fixed_names[name] = str(override.input_line)
    found = [*searched.values(), *(_zipped_parameter(name, keys) for name, keys in (zipped or {}).items())]
    for number, block in enumerate(conditional):
        found += _conditional_parameters(block, f"conditional[{number}]", found, config_loader)
    space = SearchSpace(tuple(found))
    _refuse_overlap(space, fixed_names)
    return space, fixed


def read_parameter(key: str, value: Any, config_loader: Any = None) -> Parameter:
    """A parameter from its key and a text in Hydra's grammar, or a list of values."""
    if isinstance(value, list | tuple):
        return _discrete(key, [(item, written(item)) for item in value])
    if not isinstance(value, str):
        raise ConfigError(_no_search(key, value))
    return _parameter_of(_parsed([f"{key}={_with_null(value)}"], config_loader)[0])


def _parsed(lines: Sequence[str], config_loader: Any) -> list[Override]:
    try:
        return list(OverridesParser.create(config_loader=config_loader).parse_overrides(list(lines)))
    except HydraException as error:
        raise ConfigError(f"the search does not parse: {' '.join(str(error).split())}") from None


def _with_null(text: str) -> str:
    """Hydra's choice(...) refuses null, its comma list takes it: the same values in the other form."""
    inner = _CHOICE.fullmatch(text)
    return inner[1] if inner and re.search(r"\bnull\b", text) and "," in inner[1] else text


def _parameter_of(override: Override) -> Parameter:
    key, value = override.get_key_element(), override._value
    if override.is_choice_sweep():
        if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            items: list[Any] = list(override.sweep_iterator())
            if not items:
                raise ConfigError(f"{key}={override.get_value_string()} matches no choice of that group")
        else:
            items = list(value.list) if isinstance(value, ChoiceSweep) else []
        return _discrete(key, [(_plain(item), _text_of(item)) for item in items])
    if isinstance(value, RangeSweep):
        return _ranged(key, value, list(override.sweep_string_iterator()))
    if isinstance(value, IntervalSweep):
        return _interval(key, value)
    raise ConfigError(_no_search(key, override.get_value_string()))


def _discrete(key: str, items: Sequence[tuple[Any, str]]) -> Parameter:
    if len(items) < 2:
        given = items[0][1] if items else "nothing"
        raise ConfigError(_no_search(key, given))
    texts = [text for _, text in items]
    if len(set(texts)) < len(texts):
        raise ConfigError(f"{key} has {next(t for t in texts if texts.count(t) > 1)} twice; give each value once")
    plain = [item if item is None or isinstance(item, bool | int | float | str) else text for item, text in items]
    if len({(value,) for value in plain}) < len(plain):  # 1 and True, 1 and 1.0
        plain = list(texts)
    made = tuple(Choice(stored, (f"{key}={text}",)) for stored, text in zip(plain, texts, strict=True))
    return Parameter(key.lstrip("+"), key, made)


def _ranged(key: str, sweep: RangeSweep, texts: Sequence[str]) -> Parameter:
    """From its values as Hydra writes them: its 1.4 applies a cast such as float(range(...)) there alone."""
    is_int = all(re.fullmatch(r"-?\d+", text) for text in texts)
    values = [int(text) if is_int else float(text) for text in texts]
    if len(values) < 2:
        raise ConfigError(
            f"{key}=range({sweep.start},{sweep.stop},{sweep.step}) holds {len(values)} values; search two"
        )
    low, high, step = min(values), max(values), abs(sweep.step)
    step, is_log = step if is_int else float(step), _is_log(key, sweep, low)
    if is_log and not is_int:
        raise ConfigError(
            f"{key} is a range of numbers with a point, {texts[0]} to {texts[-1]}, on a log scale, where steps mean "
            f"nothing; give tag(log, interval({texts[0]}, {texts[-1]}))"
        )
    return Parameter(key.lstrip("+"), key, low=low, high=high, step=step, log=is_log, is_int=is_int)


def _interval(key: str, sweep: IntervalSweep) -> Parameter:
    low, high = sweep.start, sweep.end
    if low is None or high is None or not low < high:
        raise ConfigError(f"{key}=interval({low},{high}): the first bound must be below the second")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{key}=interval({low},{high}): the bounds must be finite")
    is_int = "int" in sweep.tags or (isinstance(low, int) and isinstance(high, int))
    if is_int:
        low, high = int(low), int(high)
    return Parameter(key.lstrip("+"), key, low=low, high=high, log=_is_log(key, sweep, low), is_int=is_int)


def _is_log(key: str, sweep: RangeSweep | IntervalSweep, low: float) -> bool:
    unknown = sweep.tags - {"log", "int", "float"}
    if unknown:
        raise ConfigError(f"{key} is tagged {', '.join(sorted(unknown))}; the tags are log, int and float")
    if "log" not in sweep.tags:
        return False
    if isinstance(sweep, RangeSweep) and sweep.step != 1:
        raise ConfigError(f"{key} is a range with steps of {sweep.step} on a log scale; give tag(log, interval(...))")
    if low <= 0:
        raise ConfigError(f"{key} is searched on a log scale from {low}; a log scale begins above zero")
    return True


def _zipped_parameter(name: str, keys: Any) -> Parameter:
    if not isinstance(keys, Mapping) or len(keys) < 2:
        raise ConfigError(f"zipped.{name} is {keys!r}; give two keys or more, each with its list of values")
    lengths = {key: len(values) if isinstance(values, list | tuple) else 0 for key, values in keys.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        told = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise ConfigError(f"zipped.{name} pairs lists of equal length, of two values or more; {told}")
    rows = zip(*keys.values(), strict=True)
    choices = []
    for row in rows:
        overrides = tuple(f"{key}={written(value)}" for key, value in zip(keys, row, strict=True))
        choices.append(Choice(" ".join(overrides), overrides))
    return Parameter(str(name), str(name), tuple(choices))


def _conditional_parameters(
    block: Any, where: str, known: Sequence[Parameter], config_loader: Any
) -> Iterator[Parameter]:
    if not isinstance(block, Mapping) or set(block) != {"when", "params"} or not block["when"] or not block["params"]:
        raise ConfigError(f"{where} is {block!r}; expected when: {{name: value}} and params: {{key: values}}")
    by_name = {parameter.name: parameter for parameter in known}
    when = []
    for name, wanted in block["when"].items():
        if name not in by_name:
            raise ConfigError(
                f"{where}.when names {name}, which is not searched before it{nearest(str(name), by_name)}"
            )
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        stored = tuple(stored_as(by_name[name], value) for value in values)
        outside = [value for value in stored if not by_name[name].contains(value)]
        if outside:
            raise ConfigError(f"{where}.when.{name} is {outside[0]!r}, which {name} never takes")
        when.append((str(name), stored))
    for key, value in block["params"].items():
        parameter = read_parameter(str(key), value, config_loader)
        yield Parameter(**{**parameter.__dict__, "when": tuple(when)})


def _refuse_overlap(space: SearchSpace, fixed: Mapping[str, str]) -> None:
    """Refuse what is fixed and searched at once; a paired group searches all of its keys."""
    keys = {key for parameter in space.parameters for key in parameter.keys | {parameter.name}}
    for name, line in fixed.items():
        if name in keys:
            raise ConfigError(
                f"{line} fixes what is searched; leave it out, take {name} out of the search, or hold the parameter at "
                f"one value with hydra.sweeper.fixed={{{name}: VALUE}}"
            )


def _plain(item: Any) -> Any:
    return Override._convert_value(item)


def _text_of(item: Any) -> str:
    """An element of a choice as it is written into an override again: quotes that were needed are put back."""
    if isinstance(item, QuotedString):
        return item.with_quotes()
    return written(_plain(item))


def _no_search(key: str, value: Any) -> str:
    return f"{key} has one value, {value}; a search needs two or more. Give a fixed value as the override {key}={value}"
