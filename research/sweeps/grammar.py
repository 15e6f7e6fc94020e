"""Hydra's override grammar: writing values into it."""

import re
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][\w./@-]*", re.ASCII)
_WORDS = {"null", "true", "false", "nan", "inf"}


def quoted(text: str) -> str:
    """A text as one value of the grammar, whatever it contains; backslashes count there before a quote alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda run: run[1] * 2 + ("\\'" if run[2] else ""), text) + "'"


def written(value: Any) -> str:
    """A plain value (null, bool, number, text, list, dict) as the grammar writes it; read back, it is equal."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else quoted(text)


def _key(key: Any) -> str:
    """A key of a dict, which the grammar takes without quotes alone."""
    return written(key) if not isinstance(key, str) else key
