"""What a config's target may be and may be given: located under an allowlist, and checked against its signature.

A target is refused by the text of its path before anything is imported, and by the module it was really defined in
before it is called, so that no allowed module lends a name it only imports (`research.data.base.os.system`).
"""

import inspect
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pydoc import ErrorDuringImport, locate
from typing import Any

from research.errors import ConfigError
from research.schemas import nearest

_PUBLIC_HOMES = {"lightning.Trainer": "lightning.pytorch.trainer.trainer.Trainer"}
_SCALARS = (bool, int, float, str)
_LISTS = (list, tuple, Sequence, Collection, Iterable)


def locate_target(target: object, key: str, prefixes: tuple[str, ...]) -> Any:
    """The class or function that `key._target_` names; ConfigError where it is none defined under `prefixes`."""
    if not isinstance(target, str) or not target.startswith(prefixes):
        raise ConfigError(
            f"{key}._target_ is {target!r}; expected something under {', '.join(prefixes)} "
            "(add a prefix in Python with research.config.allow_prefix)"
        )
    try:
        found = locate(target)
    except ErrorDuringImport as error:
        raise ConfigError(f"{key}._target_ is {target!r}, which cannot be imported: {error.value}") from None
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ConfigError(f"{key}._target_ is {target!r}, which does not exist or is no class or function")
    home = f"{found.__module__}.{found.__qualname__}"
    if not home.startswith(prefixes) and _PUBLIC_HOMES.get(target) != home:
        raise ConfigError(f"{key}._target_ is {target!r}, which is {home}; expected something defined under {prefixes}")
    return found


def accepted_types(called: Any) -> dict[str, Any] | None:
    """Keyword -> annotation of everything `called` takes by name; None where it takes any name.

    Typed **kwargs are read from their TypedDict; an annotation that cannot be read is Any.
    """
    hints = _hints(called.__init__ if inspect.isclass(called) else called)
    accepted: dict[str, Any] = {}
    for name, parameter in inspect.signature(called).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            accepted[name] = hints.get(name, Any)
            continue
        typed = typing.get_args(parameter.annotation)
        if not typed or not hasattr(typed[0], "__annotations__"):
            return None
        accepted |= _hints(typed[0])
    return accepted


def check_names(called: Any, target: str, key: str, given: Iterable[str]) -> None:
    """Raise ConfigError naming the nearest valid key where `given` has one that `called` does not take."""
    accepted = accepted_types(called)
    for name in given:
        if accepted is not None and name not in accepted:
            near = nearest(name, accepted, f"{key}.")
            raise ConfigError(f"unknown key {key}.{name} for {target}{near}. Valid keys: {', '.join(sorted(accepted))}")


def missing_arguments(called: Any, given: Collection[str]) -> list[str]:
    """Parameters without a default that are not among `given`."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(called).parameters.items()
    return [
        name
        for name, parameter in parameters
        if name not in given and parameter.default is inspect.Parameter.empty and parameter.kind not in variadic
    ]


def check_types(called: Any, key: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that is plainly not of the type its parameter declares: a text for a number."""
    accepted = accepted_types(called) or {}
    for name, value in given.items():
        expected = accepted.get(name, Any)
        if not fits(value, expected):
            told = "null" if value is None else f"{value!r} ({type(value).__name__})"
            raise ConfigError(f"{key}.{name} is {told}; expected {_told(expected)}")


def fits(value: Any, expected: Any) -> bool:
    """Whether a plain config value (None, bool, number, text, list, mapping) can be of the annotated type.

    An int fits a float; a bool fits no number; a list fits any sequence or tuple. What is not understood fits.
    """
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in inner)
    if origin is typing.Literal:
        return value in inner
    kind = origin or expected
    if kind in (None, type(None)):
        return value is None
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in _SCALARS:
        return type(value) is kind or (kind is float and type(value) is int)
    if issubclass(kind, os.PathLike):
        return isinstance(value, str)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if kind in _LISTS:
        return isinstance(value, list | tuple) and all(fits(item, member) for item in value for member in inner[:1])
    return isinstance(value, kind)


def _hints(called: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(called)
    except (NameError, TypeError, AttributeError):
        return {}


def _told(expected: Any) -> str:
    members = typing.get_args(expected)
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return " or ".join(_told(member) for member in members)
    if typing.get_origin(expected) is typing.Literal:
        return ", ".join(map(repr, members))
    if expected is type(None):
        return "null"
    if members and typing.get_origin(expected) in _LISTS:
        return f"a list of {_told(members[0])}"
    return expected.__name__ if isinstance(expected, type) and not members else str(expected).rpartition(".")[2]
