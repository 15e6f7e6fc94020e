"""A trial's overrides as an experiment file: `distill train experiment=best.yaml` runs the same again."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from research.errors import ConfigError
from research.sweeps.grammar import written

GROUP = "experiment"
GATHERING = (GROUP, "hparams_search", "debug")
_HEADER = "# @package _global_"
_WITHOUT = "# Without (to be said on the command line once this lies in conf/experiment): "


def experiment_text(overrides: Sequence[str], compose: Callable[[list[str]], DictConfig], comment: str) -> str:
    """The YAML of an experiment that composes to what the overrides give, and leans on no other experiment file.

    compose  gives the application's whole config, hydra's node included, for a list of overrides
    comment  the first line, without #
    """
    wanted, plain = compose(list(overrides)), compose([])
    usual, chosen = _choices(plain), _choices(wanted)
    groups = {key: choice for key, choice in chosen.items() if usual.get(key) != choice}
    deleted = {override[1:].partition("=")[0] for override in overrides if override.startswith("~")}
    gone = [key for key in usual if key not in chosen and key in deleted]
    base = compose(
        [
            *(f"~{key}" for key in gone),
            *(f"{'' if key in usual else '+'}{key}={written(choice)}" for key, choice in groups.items()),
        ]
    )
    tree: dict[str, Any] = {}
    if groups:
        defaults: list[Any] = [{f"override /{k}" if k in usual else f"/{k}": choice} for k, choice in groups.items()]
        tree["defaults"] = [*defaults, "_self_"]
    tree |= _added(_task(base), _task(wanted))
    lost = [*gone, *_lost(_task(base), _task(wanted))]
    lines = [_HEADER, f"# {comment}", *([f"{_WITHOUT}{' '.join(f'~{key}' for key in lost)}"] if lost else []), ""]
    return "\n".join(lines) + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def _choices(config: DictConfig) -> dict[str, Any]:
    """Which file of each group a config is made of; those that gather others are left out, since they are spelt out."""
    chosen: Any = OmegaConf.to_container(config.hydra.runtime.choices)
    return {k: v for k, v in chosen.items() if not k.startswith("hydra/") and k not in ("hydra", *GATHERING)}


def _task(config: DictConfig) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(config, resolve=False)
    return {key: value for key, value in found.items() if key != "hydra"}


def _added(base: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What `wanted` has that `base` has not, or has otherwise."""
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        if key in base and isinstance(value, Mapping) and isinstance(base[key], Mapping) and value:
            inner = _added(base[key], value)
            found |= {key: inner} if inner else {}
        elif key not in base or base[key] != value:
            found[key] = value
    return found


def _lost(base: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Dotted keys that `base` has and `wanted` has not."""
    found = []
    for key, value in base.items():
        if key not in wanted:
            found.append(key)
        elif isinstance(value, Mapping) and isinstance(wanted[key], Mapping):
            found += [f"{key}.{inner}" for inner in _lost(value, wanted[key])]
    return found


def with_experiment_file(arguments: Sequence[str]) -> list[str]:
    """`experiment=FILE.yaml`, where that file exists, as a choice of the group; the other arguments as they are.

    An experiment can add and change, never take away: the keys that the file's own comment names are taken away by
    arguments behind it.

    Raises ConfigError for a file that is no mapping, and for a path where there is no file.
    """
    changed = []
    for argument in arguments:
        found = re.fullmatch(r"(\+?)experiment=(.+\.ya?ml)", argument)
        path = Path(found[2].strip("'\"")) if found else None
        if found and path is not None and not path.is_file() and "/" in found[2]:
            raise ConfigError(
                f"experiment={path} names a file that does not exist; give one, or the name of an experiment"
            )
        if found and path is not None and path.is_file():
            name = f"{path.stem}_of_{re.sub(r'[^A-Za-z0-9_]+', '_', path.absolute().parent.name)}"
            text = path.read_text()
            node = yaml.safe_load(text)
            if not isinstance(node, dict):
                raise ConfigError(f"experiment={path} holds a {type(node).__name__}; expected keys and values")
            ConfigStore.instance().store(group=GROUP, name=name, node=node, package="_global_", provider=str(path))
            changed.append(f"{found[1]}experiment={name}")
            deletions = [line.removeprefix(_WITHOUT) for line in text.splitlines() if line.startswith(_WITHOUT)]
            changed += [one for line in deletions for one in line.split()]
        else:
            changed.append(argument)
    return changed
