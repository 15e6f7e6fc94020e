"""Composition errors in words: which key, what is nearest to it, what would be valid."""

import difflib
import re
from collections.abc import Iterable

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

_OVERRIDE_KEY = re.compile(r"Could not (?:override|append|delete from config\. ?)[^']*'([^']+)'")
_BAD_KEY = re.compile(r"full_key: (\S+)")
_NO_OPTION = re.compile(r"Could not find '([^']+)'")


def explain_composition(command: str, conf_dir: str, arguments: list[str], error: Exception) -> str:
    """One message for an error that Hydra raised while composing `command` from `arguments`."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None).strip()
    found = _OVERRIDE_KEY.search(text) or _BAD_KEY.search(text)
    if found and ("not in struct" in text or "not in '" in text or "Key '" in text):
        key = found[1].lstrip("+~").split("@")[0]
        return _unknown_key(command, conf_dir, arguments, key)
    missing = _NO_OPTION.search(text)
    if missing and "/" in missing[1]:
        group, _, given = missing[1].rpartition("/")
        options = re.search(r"Available options in [^:]+:\s*(.*?)(?:\nConfig search path|$)", text, re.DOTALL)
        names = options[1].split() if options else []
        return f"no {group} {given!r}{_nearest(given, names)}. Valid: {', '.join(names)}"
    return text


def _unknown_key(command: str, conf_dir: str, arguments: list[str], key: str) -> str:
    """Compose again without the overrides of that key, to see which keys stand where it was sought."""
    kept = [a for a in arguments if not a.lstrip("+~").startswith((f"{key}=", f"{key}@")) and not a.startswith("-")]
    parent, _, name = key.rpartition(".")
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(conf_dir, version_base="1.3"):
            node = compose(command, overrides=[a for a in kept if not a.startswith("hydra")])
        siblings = _keys_below(node, parent)
        everywhere = _all_keys(node)
    except Exception:
        return f"unknown key {key!r}; see the valid ones with `distill {command} --cfg job`"
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        hint = f"{parent}.{near[0]}" if parent else near[0]
    else:
        far = difflib.get_close_matches(key, everywhere, n=1) or [k for k in everywhere if k.split(".")[-1] == name][:1]
        hint = far[0] if far else ""
    nearest = f"; nearest valid: {hint!r}" if hint else ""
    return f"unknown key {key!r}{nearest}. Valid keys under {parent or 'the root'!r}: {', '.join(siblings)}"


def _keys_below(node: DictConfig, parent: str) -> list[str]:
    below = OmegaConf.select(node, parent) if parent else node
    return [str(key) for key in below] if isinstance(below, DictConfig) else []


def _all_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in node:
        keys.append(f"{prefix}{key}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            keys += _all_keys(child, f"{prefix}{key}.")
    return keys


def _nearest(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f"; nearest valid: {close[0]!r}" if close else ""
