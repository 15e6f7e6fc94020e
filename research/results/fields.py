"""Checked reading of a YAML mapping: every error names the file, the key, what was given and what is valid."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


class StudyError(ValueError):
    """A study file that cannot be read as written; the message names the file and the key."""


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # C where built in: faster
    """Safe YAML that refuses a key given twice (plain YAML keeps the last one and says nothing)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> Any:
    """The parsed document; raises StudyError where the file is absent or is not YAML."""
    if not path.is_file():
        raise StudyError(f"{path}: no such file; a study is a folder that holds a study.yaml")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise StudyError(f"{path}: not a readable YAML file: {detail}") from error


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint such as ``did you mean 'seeds'? valid: arms, seeds``."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names) if names else '(none)'}"


def label_of(value: Any) -> str | None:
    """A level label as text: 30 -> '30', 2.5 -> '2.5'; None for what cannot be a label (booleans, lists, null)."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value)


class Fields:
    """A mapping under validation; ``where`` is its dotted path inside ``file``."""

    def __init__(self, content: Any, file: Path, where: str = "") -> None:
        self.file, self.where = file, where
        if not isinstance(content, Mapping):
            raise StudyError(f"{file}: {where or 'the document'} is {content!r}; expected a mapping of keys to values")
        self.content: dict[Any, Any] = dict(content)

    def path(self, key: Any) -> str:
        return f"{self.where}.{key}" if self.where else str(key)

    def error(self, key: Any, expected: str) -> StudyError:
        """The error for one key: what was given, what was expected."""
        if key not in self.content:
            return StudyError(f"{self.file}: {self.path(key)} is missing; expected {expected}")
        return StudyError(f"{self.file}: {self.path(key)} is {self.content[key]!r}; expected {expected}")

    def only(self, valid: Iterable[str]) -> None:
        """Refuses a key outside ``valid`` and names the nearest valid one."""
        valid = set(valid)
        for key in self.content:
            if key not in valid:
                raise StudyError(f"{self.file}: unknown key {self.path(key)!r}; {nearest(str(key), valid)}")

    def has(self, key: str) -> bool:
        return self.content.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            raise self.error(key, "a non-empty text")
        return " ".join(value.split())

    def choice(self, key: str, valid: Iterable[str], default: str | None = None) -> str:
        value, valid = self.content.get(key, default), list(valid)
        if value not in valid:
            hint = nearest(str(value), valid) if key in self.content else f"one of {', '.join(sorted(valid))}"
            raise self.error(key, hint)
        return str(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self.content.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.content.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or abs(value) == float("inf")
        ):
            raise self.error(key, "a finite number")
        return float(value)

    def label(self, key: str) -> str:
        value = label_of(self.content.get(key))
        if value is None:
            raise self.error(key, "a level label (text or number)")
        return value

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of texts, such as Hydra overrides."""
        value = self.content.get(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of texts, such as [experiment=mnist_student, method.temperature=4]")
        return tuple(value)

    def seeds(self, key: str) -> tuple[int, ...]:
        value = self.content.get(key)
        good = isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value)
        if not good or len(set(value)) != len(value):  # type: ignore[arg-type]
            raise self.error(key, "a non-empty list of distinct integers >= 0, such as [0, 1, 2, 3, 4, 5]")
        return tuple(value)  # type: ignore[arg-type]

    def child(self, key: str) -> "Fields":
        """The mapping under ``key``; an empty one where it is absent."""
        return Fields(
            self.content.get(key) or {} if self.content.get(key) in (None, {}) else self.content[key],
            self.file,
            self.path(key),
        )
