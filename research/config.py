"""From a composed config to objects: the only caller of `instantiate`.

Every `_target_` is checked against an allowlist before anything is imported, and every key of a node against the
signature of its target, so that a typing error in a file is an error and not a default.
"""

import difflib
import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from research.data.base import AbstractClassData
from research.errors import ConfigError
from research.methods.base import AbstractMethod, Training
from research.models.build import build_network, describe
from research.seeding import seed_for
from research.teachers.base import AbstractTeacher

ALLOWED_PREFIXES: tuple[str, ...] = (
    "research.data.",
    "research.methods.",
    "research.teachers.",
    "torch.optim.",
    "lightning.Trainer",
    "lightning.pytorch.loggers.",
)


@dataclass
class Parts:
    """What one training run is made of."""

    data: AbstractClassData
    method: AbstractMethod
    teacher: AbstractTeacher | None
    reference: AbstractTeacher | None
    architecture: dict[str, Any]


def plain(node: Any) -> dict[str, Any]:
    """A config node as plain resolved containers."""
    container = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return dict(container) if isinstance(container, Mapping) else {}


def build(cfg: DictConfig) -> Parts:
    """Datamodule, student, teacher and method of a train config.

    The student's initial weights come from the stream "init" of `seed`, whatever was drawn before. Raises ConfigError
    for a key or value that does not fit, CheckpointError and CacheError for teachers that do not.
    """
    data = build_data(cfg)
    facts = {"input_shape": tuple(data.input_shape), "num_classes": data.num_classes}
    description = plain(cfg.student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(cfg.seed, "init"))
        student = build_network(description, **facts)
    architecture = describe(description, **facts)
    teacher = build_teacher(cfg, "teacher", facts)
    if teacher is not None and plain(cfg.signal_transform).get("_target_"):
        teacher = make(cfg.signal_transform, "signal_transform", teacher=teacher)
    reference = build_teacher(cfg, "reference", facts)
    method = make(cfg.method, "method", training=_training(cfg, student, architecture), teacher=teacher)
    return Parts(data, method, teacher, reference, architecture)


def build_data(cfg: DictConfig, overrides: Mapping[str, Any] | None = None) -> AbstractClassData:
    """The datamodule of a config, with some of its keys replaced; its order and views follow the run's seed."""
    node = {**plain(cfg.data), **(overrides or {})}
    return make(node, "data", seed=cfg.seed)


def build_teacher(cfg: DictConfig, key: str, facts: Mapping[str, Any]) -> AbstractTeacher | None:
    """The teacher under `key`, or None where its `_target_` is null."""
    node = plain(cfg[key])
    return make(node, key, **facts) if node.get("_target_") else None


def build_trainer(node: Any, **late: Any) -> Any:
    """Lightning's Trainer from its config and what only the run knows (folder, callbacks, logger)."""
    return make({**plain(node)}, "trainer", **late)


def build_logger(cfg: DictConfig) -> Any:
    """The configured logger, or False for none. Raises ConfigError where its optional package is absent."""
    if not plain(cfg.logger).get("_target_"):
        return False
    try:
        return make(cfg.logger, "logger")
    except ModuleNotFoundError as error:
        raise ConfigError(f"this logger needs a package that is not installed: {error}") from None


def make(node: Any, key: str, **late: Any) -> Any:
    """Instantiate one node after checking its target and its keys; `late` adds what the config cannot hold.

    The call itself is ours, so objects in `late` and errors of the target come through as they are. A node with
    `_partial_` gives the factory.
    """
    arguments = plain(node)
    target = arguments.get("_target_")
    if not isinstance(target, str) or not target.startswith(ALLOWED_PREFIXES):
        raise ConfigError(
            f"{key}._target_ is {target!r}; expected something under {', '.join(ALLOWED_PREFIXES)} "
            "(add a prefix in Python with research.config.allow_prefix)"
        )
    check_keys(target, key, [name for name in arguments if not name.startswith("_")])
    factory = instantiate({**arguments, "_partial_": True}, _convert_="all", _recursive_=False)
    return factory if arguments.get("_partial_") else factory(**late)


def allow_prefix(prefix: str) -> None:
    """Let configs name targets under one more import prefix, such as "my_package."."""
    global ALLOWED_PREFIXES
    if prefix not in ALLOWED_PREFIXES:
        ALLOWED_PREFIXES = (*ALLOWED_PREFIXES, prefix)


def check_keys(target: str, key: str, given: Iterable[str]) -> None:
    """Raise ConfigError naming the nearest valid key where a node has one that its target does not take."""
    accepted = _accepted(locate(target), target, key)
    if accepted is None:
        return
    for name in given:
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; nearest valid: {key}.{close[0]}" if close else ""
            raise ConfigError(f"unknown key {key}.{name} for {target}{hint}. Valid keys: {', '.join(sorted(accepted))}")


def _accepted(called: object, target: str, key: str) -> set[str] | None:
    """Names a target takes by keyword; None where it takes anything. Typed **kwargs are read from their TypedDict."""
    if not callable(called):
        raise ConfigError(f"{key}._target_ is {target!r}, which does not exist or cannot be called")
    accepted: set[str] = set()
    for name, parameter in inspect.signature(called).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            accepted.add(name)
            continue
        typed = typing.get_args(parameter.annotation)
        if not typed or not hasattr(typed[0], "__annotations__"):
            return None
        accepted |= set(typed[0].__annotations__)
    return accepted


def _training(cfg: DictConfig, student: nn.Module, architecture: dict[str, Any]) -> Training:
    scheduler = make(cfg.scheduler, "scheduler") if plain(cfg.scheduler).get("_target_") else None
    return Training(student, make(cfg.optimizer, "optimizer"), scheduler, architecture)


def conf_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it once installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"
