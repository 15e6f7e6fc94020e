"""A trial's overrides as an experiment file: `distill train experiment=best.yaml` runs the same again."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from research.errors import ConfigError

GROUP = "experiment"
_HEADER = "# @package _global_"


def experiment_text(overrides: Sequence[str], groups: Sequence[str], comment: str) -> str:
    """The YAML of an experiment that composes to what the overrides give.

    groups   the keys that choose a file of a config group, package and prefix left out
    comment  the first line, without #
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    defaults: list[Any] = []
    values, left_out = OmegaConf.create({}), []
    for override in parsed:
        chosen = override.value()
        if override.is_delete():
            left_out.append(str(override.input_line))
        elif override.key_or_group == GROUP:
            defaults.insert(0, chosen)
        elif override.key_or_group in groups:
            defaults.append(_default(override, chosen))
        else:
            OmegaConf.update(values, override.key_or_group, chosen, force_add=True)
    tree: dict[str, Any] = {"defaults": [*defaults, "_self_"]} if defaults else {}
    plain: Any = OmegaConf.to_container(values)
    tree |= plain
    lines = [_HEADER, f"# {comment}", *(f"# to be given beside it: {line}" for line in left_out)]
    return "\n".join(lines) + "\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def with_experiment_file(arguments: Sequence[str]) -> list[str]:
    """`experiment=FILE.yaml`, where that file exists, as a choice of the group; the other arguments as they are.

    Raises ConfigError for a file that is no mapping.
    """
    changed = []
    for argument in arguments:
        found = re.fullmatch(r"(\+?)experiment=(.+\.ya?ml)", argument)
        path = Path(found[2].strip("'\"")) if found else None
        if found and path is not None and path.is_file():
            name = f"{path.stem}_of_{re.sub(r'[^A-Za-z0-9_]+', '_', path.absolute().parent.name)}"
            node = yaml.safe_load(path.read_text())
            if not isinstance(node, dict):
                raise ConfigError(f"experiment={path} holds a {type(node).__name__}; expected keys and values")
            ConfigStore.instance().store(group=GROUP, name=name, node=node, package="_global_", provider=str(path))
            changed.append(f"{found[1]}experiment={name}")
        else:
            changed.append(argument)
    return changed


def _default(override: Override, chosen: Any) -> dict[str, Any]:
    key = override.key_or_group + (f"@{override.package}" if override.package else "")
    is_new = override.is_add() or override.is_force_add()
    return {f"/{key}" if is_new else f"override /{key}": chosen}
