"""The strict root: unknown, deleted and unchosen keys, and values out of range."""

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from research.errors import ConfigError
from research.schemas import SCHEMAS, check_root, nearest


def root(command: str, **changes: Any) -> DictConfig:
    cfg: DictConfig = OmegaConf.structured(SCHEMAS[command])
    for key in cfg:
        if OmegaConf.is_missing(cfg, key):
            cfg[key] = {"_target_": None}
    with open_dict(cfg):
        for key, value in changes.items():
            OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


@pytest.mark.parametrize("command", SCHEMAS)
def test_the_defaults_pass(command: str) -> None:
    given = root(command)
    check_root(given, command)
    assert given == root(command)  # checked, not mended


@pytest.mark.parametrize("command", SCHEMAS)
def test_p111_unknown_root_key(command: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key nmae; nearest valid: name\. Valid keys: "):
        check_root(root(command, nmae=1), command)


def test_p111_unknown_key_below_the_root() -> None:
    with pytest.raises(ConfigError, match=r"unknown key evaluation\.split; nearest valid: evaluation\.splits"):
        check_root(root("train", evaluation__split="test"), "train")
    with pytest.raises(ConfigError, match=r"unknown key paths\.output; nearest valid: paths\.output_dir"):
        check_root(root("study", paths__output="x"), "study")


def test_a_deleted_key_is_named() -> None:
    cfg = root("train")
    with open_dict(cfg):
        OmegaConf.set_struct(cfg, False)
        cfg._content.pop("seed")
    with pytest.raises(ConfigError, match=r"the key seed was deleted.*leave out ~seed"):
        check_root(cfg, "train")


def test_an_unchosen_group_is_named() -> None:
    cfg = root("train")
    cfg.method = "???"
    with pytest.raises(ConfigError, match=r"method is not chosen"):
        check_root(cfg, "train")


@pytest.mark.parametrize(
    ("command", "changes", "told"),
    [
        ("train", {"name": ""}, "name is ''; expected letters"),
        ("train", {"name": "a/b"}, "name is 'a/b'"),
        ("train", {"threads": 0}, "threads is 0; expected at least 1"),
        (
            "train",
            {"evaluation__splits": ["test", "vel"]},
            r"evaluation\.splits is 'vel'; nearest valid: val",
        ),
        ("train", {"evaluation__weights": "lst"}, r"evaluation\.weights is 'lst'; nearest valid: last"),
        ("train", {"evaluation__batch_size": 0}, r"evaluation\.batch_size is 0"),
        ("cache", {"split": "dev"}, "split is 'dev'"),
        ("cache", {"shard_rows": 0}, "shard_rows is 0"),
        ("evaluate", {"split": "tset"}, "split is 'tset'; nearest valid: test"),
        ("evaluate", {"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_values_out_of_range(command: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_root(root(command, **changes), command)


def test_nearest_is_silent_where_nothing_is_near() -> None:
    assert nearest("temprature", ["temperature", "seed"], "method.") == "; nearest valid: method.temperature"
    assert nearest("xyz", ["temperature", "seed"]) == ""
