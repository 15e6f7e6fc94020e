"""Composition errors in one line: which key or choice, what is nearest to it, what would be valid."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from research.schemas import GROUP_OF, nearest, not_chosen

_EXTRAS = {"hydra/launcher/joblib": "parallel"}
_NOT_IN = re.compile(r"Key '([^']+)' (?:is )?not in |Could not delete from config\. '([^']+)' does not exist")
_FULL_KEY = re.compile(r"full_key: (\S+)")
_FILE = re.compile(r"In '([^']+)': (?:\w+ raised while composing config|Could not)")
_NO_CHOICE = re.compile(r"Could not (?:find|load) '([^']+)'")
_CHOICES = re.compile(r"Available options in [^:]+:\s*(.*?)(?:\nConfig search path|$)", re.DOTALL)
_MERGING = re.compile(r"Error merging override (.*)")
_NOT_A_GROUP = re.compile(r"Could not override '([^']+)'\.\s*Did you mean to override (?:one of )?([^?]+)\?")
_NO_GROUP = re.compile(r"Could not override '([^']+)'\.\s*No match in the defaults list")
_UNKNOWN_GROUP = re.compile(r"Override ([^=\s]+)=?\S* looks like a config group override")
_NOT_A_CHOICE = "Config group override must be a string or a list"


def explain_composition(command: str, conf_dir: str, arguments: list[str], error: Exception) -> str:
    """One line for an error that Hydra raised while composing `command` from `arguments`."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None).strip()
    override = getattr(error, "override", None)
    if "Error parsing override" in text or override is not None:
        reason = text.splitlines()[1 if "Error parsing" in text else 0]
        given = override or re.search(r"override '(.*)'", text.splitlines()[0])[1]  # type: ignore[index]
        return f"cannot read {given!r} ({reason}); expected key=value, +key=value to add a key, ~key to delete one"
    if _NOT_A_CHOICE in text:
        return _not_a_choice(conf_dir, arguments)
    if "Ambiguous value for argument" in text:
        given = text.splitlines()[0].partition("'")[2].rstrip("'")
        key, _, value = given.partition("=")
        return f"{given!r} holds several values; sweep over them with -m, or write \"{key}='{value}'\", {key}=[{value}]"
    if found := _NOT_A_GROUP.search(text):
        return f"{found[1]!r} is no group of `distill {command}`; choose one of {found[2]}"
    if (found := _NO_GROUP.search(text)) or (found := _UNKNOWN_GROUP.search(text)):
        return f"{found[1]!r} is no group of `distill {command}`; see them with `distill {command} --help`"
    if found := _NO_CHOICE.search(text):
        return _no_choice(command, found[1], text)
    if found := _NOT_IN.search(text):
        full_key = _FULL_KEY.search(text)
        key = found[2] or (full_key[1] if full_key else found[1])
        file = _FILE.search(text)
        where = f" in conf/{file[1]}.yaml" if file else ""
        return _unknown_key(command, conf_dir, arguments, key, where)
    if found := _MERGING.search(text):
        reason = next((line for line in text.splitlines()[1:] if "full_key" not in line), "does not fit")
        return f"{found[1]}: {reason}"
    return " ".join(re.sub(r"Config search path:.*|full_key:.*|object_type=.*", "", text, flags=re.DOTALL).split())


def _not_a_choice(conf_dir: str, arguments: list[str]) -> str:
    """A group was given something that is no name; find out which."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        folder = Path(conf_dir) / key.lstrip("+").partition("@")[0]
        if not key:
            return f"cannot read {argument!r}; expected key=value"
        if folder.is_dir():
            valid = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            return f"{key} is {value!r}; choose one of them by name. Valid: {valid}"
    return "a group was given something that is not the name of one of its choices"


def _no_choice(command: str, path: str, text: str) -> str:
    group, _, given = path.rpartition("/")
    found = _CHOICES.search(text)
    names = found[1].split() if found else []
    if not group:
        return f"no config {given!r}"
    if given.endswith((".yaml", ".yml")):
        return f"{group}={given}: there is no such file here; give the path of one, or one by name: {', '.join(names)}"
    extra = f"; it needs the extra: pip install 'research-distillation[{_EXTRAS[path]}]'" if path in _EXTRAS else ""
    file = _FILE.search(text)
    where = (
        f" (named in conf/{file[1]}.yaml)" if file and file[1] != command and not file[1].startswith("hydra/") else ""
    )
    return f"no {group} {given!r}{where}{nearest(given, names)}{extra}. Valid: {', '.join(names) or 'none'}"


def _unknown_key(command: str, conf_dir: str, arguments: list[str], key: str, where: str) -> str:
    root = key.partition(".")[0]
    given = next((a.partition("=")[2] for a in arguments if a.partition("=")[0] == root), "")
    if command == "train" and root in GROUP_OF and root != key and given and not given.startswith("{"):
        return not_chosen(root, given)
    node = _composed_without(command, conf_dir, arguments, key)
    if node is None:
        return f"unknown key {key!r}{where}; see the valid ones with `distill {command} --cfg job`"
    parent, _, name = key.rpartition(".")
    below = OmegaConf.select(node, parent) if parent else node
    valid = [str(k) for k in below if k != "_target_"] if isinstance(below, DictConfig) else []
    exact = "" if parent else _elsewhere(node, key)  # the very key, in a group, beats a near one at the root
    hint = exact or nearest(name, valid, f"{parent}." if parent else "")
    hint = hint or _in_another_choice(Path(conf_dir), parent, name, valid) or _elsewhere(node, key)
    if isinstance(below, DictConfig) and not valid:
        return f"{parent} holds no keys yet; add one with +{key}=..."
    return f"unknown key {key!r}{where}{hint}. Valid keys{f' under {parent}' if parent else ''}: {', '.join(valid)}"


def _composed_without(command: str, conf_dir: str, arguments: list[str], key: str) -> DictConfig | None:
    """The config without the overrides of that key, or the plain one where the fault lies in a file."""
    flags = ("-", "hydra")
    kept = [a for a in arguments if "=" in a and not a.startswith(flags) and not _gives(a, key)]
    GlobalHydra.instance().clear()
    for overrides in (kept, []):
        try:
            with initialize_config_dir(conf_dir, version_base="1.3"):
                return compose(command, overrides=overrides, return_hydra_config=key.startswith("hydra"))
        except Exception:  # the next, plainer config is tried; the error being explained stands in any case
            continue
    return None


def _gives(argument: str, key: str) -> bool:
    """Whether an override sets that key: by its name, or in a {..} for a node above it."""
    name, _, value = argument.lstrip("+~").partition("=")
    return name == key or (key.startswith(f"{name}.") and value.lstrip().startswith("{"))


def _in_another_choice(conf_dir: Path, parent: str, name: str, valid: Iterable[str]) -> str:
    """A key of this group that another choice of it has: temperature under method=soft_target."""
    folder = conf_dir / GROUP_OF.get(parent, parent or ".")
    if not parent or not folder.is_dir():
        return ""
    for path in sorted(folder.glob("*.yaml")):
        keys = [key for key in yaml.safe_load(path.read_text()) or {} if not key.startswith("_") and key not in valid]
        if close := difflib.get_close_matches(name, keys, n=1):
            return f"; nearest valid: {parent}.{close[0]}, a key of {path.stem}"
    return ""


def _elsewhere(node: DictConfig, key: str) -> str:
    """The same word in another part of the config: temperature for method.temperature."""
    everywhere = [k for k in _all_keys(node) if not key.startswith(k) and not k.endswith("_target_")]
    same = [k for k in everywhere if k.split(".")[-1] == key.split(".")[-1]][:1]
    close = same or difflib.get_close_matches(key, everywhere, n=1)
    return f"; nearest valid: {close[0]}" if close else ""


def _all_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in node:
        keys.append(f"{prefix}{key!s}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            keys += _all_keys(child, f"{prefix}{key!s}.")
    return keys
