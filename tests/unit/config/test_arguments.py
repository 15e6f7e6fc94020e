"""Targets and arguments: what is refused before import, before the call, and by type."""

import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import pytest
import torch

from research.arguments import accepted_types, check_names, check_types, fits, locate_target, missing_arguments
from research.config import ALLOWED_PREFIXES
from research.errors import ConfigError

FOREIGN = (
    "os.system",
    "logging.os.system",
    "subprocess.Popen",
    "builtins.eval",
    "research.data.base.os.system",  # an allowed module lends what it imports
    "research.data.base.Path",
    "research.teachers.load.pickle.loads",
    "research.teachers.load.partial",
    "lightning.pytorch.loggers.csv_logs.os.system",
    "torch.optim.adam.torch.load",
    "lightning.Trainer.fit",
)
HOME = {"lightning.Trainer", "torch.optim.Adam", "research.data.digits.Digits", "research.teachers.load.frozen"}


@pytest.mark.parametrize("target", FOREIGN)
def test_p115_what_was_not_defined_under_the_prefixes_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\._target_ is '{target}'"):
        locate_target(target, "data", ALLOWED_PREFIXES)


def test_p115_a_foreign_module_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="trap_module"):
        locate_target("trap_module.anything", "data", ALLOWED_PREFIXES)
    assert "trap_module" not in sys.modules


@pytest.mark.parametrize("target", sorted(HOME))
def test_targets_of_the_project_are_found(target: str) -> None:
    assert callable(locate_target(target, "key", ALLOWED_PREFIXES))


@pytest.mark.parametrize("target", [None, 3, "", "research.data.digits.Digitz", "research.data.nowhere.Data"])
def test_a_target_that_is_none_is_refused(target: object) -> None:
    with pytest.raises(ConfigError, match=r"data\._target_ is"):
        locate_target(target, "data", ALLOWED_PREFIXES)


class Options(TypedDict, total=False):
    rows: int
    folder: str | PathLike[str] | None


def example(
    size: int, rate: float = 0.1, *, mode: Literal["a", "b"] = "a", widths: Sequence[int] = (), **rest: Unpack[Options]
) -> None:
    """A target with every kind of parameter."""


def test_accepted_names_include_typed_rest() -> None:
    assert set(accepted_types(example) or ()) == {"size", "rate", "mode", "widths", "rows", "folder"}
    assert accepted_types(lambda **anything: anything) is None


def test_missing_arguments() -> None:
    assert missing_arguments(example, {"rate"}) == ["size"]
    assert missing_arguments(example, {"size"}) == []


def test_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key data\.widht for example; nearest valid: data\.widths"):
        check_names(example, "example", "data", ["widht"])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("size", "abc", r"data\.size is 'abc' \(str\); expected int"),
        ("size", True, r"data\.size is True \(bool\); expected int"),
        ("size", 1.5, "expected int"),
        ("size", None, "expected int"),
        ("rate", "fast", "expected float"),
        ("mode", "c", "expected 'a', 'b'"),
        ("widths", 3, "expected a list of int"),
        ("widths", ["x"], "expected a list of int"),
        ("rows", "many", "expected int"),
        ("folder", 3, "expected str or .*PathLike.* or null"),
    ],
)
def test_a_value_of_another_type_is_told(name: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_types(example, "data", {name: value})


def test_values_that_fit_pass() -> None:
    check_types(example, "data", {"size": 3, "rate": 1, "mode": "b", "widths": [1, 2], "rows": 2, "folder": "x"})
    check_types(example, "data", {"folder": None, "anything": "unknown names are not this check's"})
    with pytest.raises(ConfigError):
        check_types(example, "data", {"size": "three"})


@pytest.mark.parametrize(
    ("value", "expected", "is_fit"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, float, False),
        (True, bool, True),
        (1, bool, False),
        ("1", int, False),
        ([0.9, 0.99], tuple[float, float], True),
        ("0.9", tuple[float, float], False),
        (0.1, float | torch.Tensor, True),
        ("x", torch.Tensor, False),
        ({"a": 1}, dict[str, int], True),
        ("x", Any, True),
        ("x", "a forward reference", True),
    ],
)
def test_fits(value: Any, expected: Any, is_fit: bool) -> None:
    assert fits(value, expected) is is_fit
