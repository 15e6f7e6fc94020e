"""Passwords and tokens stay out of run folders: Hydra writes every composed config and override to disk.

A secret is given through the environment, in its service's own variable or as `${oc.env:NAME}`, which is stored
unresolved and masked wherever it is printed or recorded.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from research.errors import ConfigError
from research.results.record import is_secret, mask_secrets

_PAIR = re.compile(r"([\w.]+)\s*[=:]\s*(['\"]?\$\{[^}]*\}|[^\s,\[\]{}]*)")
_YAML_LINE = re.compile(r"^(\s*(?:- )?)([\w.]+): (?!null$)(\S.*)$", re.MULTILINE)
_HARMLESS = ("", "null", "***", "''", '""')


def refuse_secret_overrides(overrides: Iterable[str]) -> None:
    """Raise ConfigError, naming the key and not the value, where an override gives a secret literally."""
    for override in overrides:
        for key, value in _PAIR.findall(override):
            if is_secret(key.rsplit(".", 1)[-1]) and _is_literal(value):
                raise _refusal(key)


def refuse_secrets(cfg: DictConfig, hydra_folder: Path) -> None:
    """The same for a composed config; what Hydra has already written of it is masked first."""
    key = next(_literal_secrets(OmegaConf.to_container(cfg, resolve=False), ""), None)
    if key is None:
        return
    for path in hydra_folder.glob("*.yaml"):
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(mask_secrets(OmegaConf.to_container(OmegaConf.load(path))))))
    raise _refusal(key)


def mask_printed(text: str) -> str:
    """Printed YAML with every value under a secret key as ***."""
    return _YAML_LINE.sub(lambda line: f"{line[1]}{line[2]}: ***" if is_secret(line[2]) else line[0], text)


def _literal_secrets(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if is_secret(str(key)) and value is not None and _is_literal(str(value)):
                yield f"{prefix}{key}"
            yield from _literal_secrets(value, f"{prefix}{key}.")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _literal_secrets(value, f"{prefix}{number}.")


def _is_literal(value: str) -> bool:
    return value not in _HARMLESS and not value.strip("'\"").startswith("${")


def _refusal(key: str) -> ConfigError:
    return ConfigError(
        f"{key} is a secret, and configs are written into run folders; set it in the environment, "
        f"in the service's own variable or as {key}='${{oc.env:NAME}}'"
    )
