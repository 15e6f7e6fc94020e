"""Secrets: refused where they would be written, found wherever they hide, never repeated in the message."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from research.errors import ConfigError
from research.sweeps.secrets import mask_printed, refuse_secret_overrides, refuse_secrets

VALUE = "hunter2hunter2"


@pytest.mark.parametrize(
    "override",
    [
        f"logger.api_key={VALUE}",
        f"+logger.api_key={VALUE}",
        f"++logger.hf_token='{VALUE}'",
        f"+logger={{project: a, api_key: {VALUE}}}",
        f"overrides=[seed=1,logger.password={VALUE}]",
        f"logger.api_key={VALUE},other",
    ],
)
def test_p116_a_literal_secret_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError, match="is a secret") as raised:
        refuse_secret_overrides(["seed=1", override])
    assert VALUE not in str(raised.value)


@pytest.mark.parametrize(
    "override",
    [
        "logger.api_key=${oc.env:KEY}",
        "logger.api_key='${oc.env:KEY}'",
        "logger.api_key=null",
        "name=my_token",
        "data.max_tokens=5",
        "student.eos_token=x",
        "teacher.path=/a/b=c/token",
    ],
)
def test_references_and_harmless_words_pass(override: str) -> None:
    given = [override]
    refuse_secret_overrides(given)
    assert given == [override]


def test_p116_what_was_written_already_is_masked(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"logger": {"_target_": "x", "token": VALUE, "list": [{"api_key": VALUE}]}, "seed": 1})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    OmegaConf.save(OmegaConf.create(["seed=1"]), tmp_path / "overrides.yaml")
    with pytest.raises(ConfigError, match=r"logger\.token is a secret"):
        refuse_secrets(cfg, tmp_path)
    written = OmegaConf.load(tmp_path / "config.yaml")
    assert VALUE not in (tmp_path / "config.yaml").read_text()
    assert written.logger.token == "***" and written.seed == 1
    assert OmegaConf.load(tmp_path / "overrides.yaml") == ["seed=1"]


def test_a_reference_to_the_environment_is_left_unresolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", VALUE)
    cfg = OmegaConf.create({"logger": {"api_key": "${oc.env:SOME_KEY}", "token": None}})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    refuse_secrets(cfg, tmp_path)
    assert VALUE not in (tmp_path / "config.yaml").read_text()


def test_printed_configs_are_masked() -> None:
    printed = f"logger:\n  api_key: {VALUE}\n  hf_token: null\n  eos_token: </s>\nnested:\n- password: {VALUE}\n"
    assert mask_printed(printed) == printed.replace(VALUE, "***")
