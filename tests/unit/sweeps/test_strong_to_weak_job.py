"""Phases that would need further processes are refused before the first of them begins."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from research.errors import ConfigError
from research.loops.strong_to_weak import StrongToWeakPlan
from research.schemas import register_schemas
from research.sweeps.strong_to_weak_job import StrongToWeakLoop


def make_loop(repository: Path, folder: Path, overrides: list[str], of_phase: list[str]) -> StrongToWeakLoop:
    register_schemas()
    plan = StrongToWeakPlan([{"name": "first"}, {"name": "second", "overrides": of_phase}])
    no_data: Any = None

    def train(*_: Any) -> Any:
        pytest.fail("a phase was begun")

    with initialize_config_dir(str(repository / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=overrides)
        return StrongToWeakLoop(cfg, plan, no_data, folder, overrides, train)


def test_phases_in_one_process_are_as_they_should_be(repository: Path, tmp_path: Path) -> None:
    assert make_loop(repository, tmp_path, ["trainer.devices=[1]"], ["trainer.devices=1"]).metrics == {}


@pytest.mark.parametrize(
    ("overrides", "of_phase"), [(["{}"], []), ([], ["{}"])], ids=["of the run", "of a later phase"]
)
@pytest.mark.parametrize(("key", "value"), [("devices", "2"), ("devices", "[0,1]"), ("num_nodes", "2")])
def test_further_processes_are_refused(
    key: str, value: str, overrides: list[str], of_phase: list[str], repository: Path, tmp_path: Path
) -> None:
    given = f"trainer.{key}={value}"
    told = rf"trainer\.{key} is .*, and loop=strong_to_weak runs its phases .* give trainer\.{key}=1, or run the phases"
    with pytest.raises(ConfigError, match=told):
        make_loop(
            repository, tmp_path, [text.format(given) for text in overrides], [text.format(given) for text in of_phase]
        )
