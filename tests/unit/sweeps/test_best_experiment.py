"""best.yaml: an experiment that composes to the trial's own config, whatever files the trial was made of."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from research.config import conf_dir
from research.errors import ConfigError
from research.schemas import register_schemas
from research.sweeps.best_experiment import experiment_text, with_experiment_file
from research.sweeps.space_parser import parse_space
from research.sweeps.sweep_command import _check_composes, composer

SEARCHES = sorted(path.stem for path in (conf_dir() / "hparams_search").glob("*.yaml"))
Compose = Callable[[list[str]], DictConfig]


@pytest.fixture
def compose() -> Iterator[Compose]:
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield composer(GlobalHydra.instance().config_loader(), "train")


def task_of(config: DictConfig) -> Any:
    found: Any = OmegaConf.to_container(config, resolve=False)
    return {key: value for key, value in found.items() if key != "hydra"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.lr=0.5"],
        ["experiment=mnist_soft_target", "student.hidden=[30,30]", "method.temperature=2.5"],
        ["experiment=sum8_trace", "model@student=llama_100k", "trainer=smoke", "data.trace_format=answer_only"],
        ["experiment=digits_soft_target", "teacher=none", "method=supervised", "seed=7"],
        ["+data.extra=1", "evaluation.variants={moved: {noise: 1}}", "tags=['a,b','c=d']"],
        ["~trainer.accelerator", "~optimizer.lr", "~logger", "seed=3"],
        *[[f"hparams_search={name}", "optimizer.lr=0.0123"] for name in SEARCHES],
    ],
    ids=lambda overrides: overrides[0],
)
def test_it_composes_to_the_trials_own_config(overrides: list[str], compose: Compose, tmp_path: Path) -> None:
    path = tmp_path / "sweep" / "best.yaml"
    path.parent.mkdir()
    path.write_text(experiment_text(overrides, compose, "trial 3"))
    assert path.read_text().startswith("# @package _global_\n# trial 3\n")
    assert ("~" in path.read_text()) == any(override.startswith("~") for override in overrides)
    again = compose(with_experiment_file([f"experiment={path}"]))
    assert task_of(again) == task_of(compose(overrides))
    assert "experiment" not in str(yaml.safe_load(path.read_text()).get("defaults"))


def test_other_arguments_and_names_stay_as_they_are(tmp_path: Path) -> None:
    arguments = ["experiment=mnist_hard", "seed=1", "experiment=absent.yaml"]
    assert with_experiment_file(arguments) == arguments
    with pytest.raises(ConfigError, match="does not exist"):
        with_experiment_file([f"experiment={tmp_path}/absent.yaml"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        with_experiment_file([f"experiment={tmp_path}/list.yaml"])


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_file_parses_and_every_kind_of_trial_composes(name: str, compose: Compose) -> None:
    loader: Any = GlobalHydra.instance().config_loader()
    from hydra.types import RunMode

    config = loader.load_configuration("train", [f"hparams_search={name}"], run_mode=RunMode.MULTIRUN)
    node = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    space, fixed = parse_space(
        node["params"] or {}, [f"hparams_search={name}"], zipped=node["zipped"], conditional=node["conditional"]
    )
    assert space.parameters and node["study_name"] == name
    _check_composes(space, fixed, loader, config)
    for point in node["enqueue"]:
        assert space.check_point(point, "enqueue") == dict(point)
    wanted = [*(node["objectives"] or {}), config.monitor]
    assert all(metric.startswith(("val/", "cost/")) for metric in wanted)
    assert list(config.evaluation.splits) == ["val"], "a trial never measures the test split"


def test_the_groups_of_the_plugin_are_known() -> None:
    Plugins.instance()  # finding a plugin is what registers its groups
    repo = ConfigStore.instance().repo["hydra"]["sweeper"]
    assert set(repo["study_sampler"]) >= {
        f"{name}.yaml" for name in ("tpe", "random", "gp", "cmaes", "qmc", "grid", "nsgaii")
    }
    assert set(repo["study_pruner"]) >= {f"{name}.yaml" for name in ("none", "median", "hyperband", "wilcoxon")}
    theirs = {"sampler", "pruner", "storage"}
    assert not theirs & set(repo), "those may belong to Hydra's own plugin, which is installed beside this one"
    assert set(repo["study_storage"]) == {"journal.yaml", "journal_redis.yaml", "rdb.yaml", "grpc.yaml", "memory.yaml"}


@pytest.mark.parametrize("overrides", [["model=b"], ["~model"], ["model=b", "x=3"], ["~model/act"]])
def test_a_group_within_a_group_goes_with_it(overrides: list[str], tmp_path: Path) -> None:
    """Another application's config, in which one choice brings a group of its own and the other does not."""
    (tmp_path / "conf" / "model" / "act").mkdir(parents=True)
    files = {"app": "defaults: [model: a, _self_]\nx: 1", "model/a": "defaults: [act: relu]\nw: 1", "model/b": "w: 2",
             "model/act/relu": "name: relu"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / "conf" / f"{name}.yaml").write_text(text.replace("defaults: [", "defaults:\n  [") + "\n")
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        compose = composer(GlobalHydra.instance().config_loader(), "app")
        text = experiment_text(overrides, compose, "trial 3")
        deletions = [word for word in text.split() if word.startswith("~")]
        node = yaml.safe_load(text) or {}
        choices = [f"{key.split('/', 1)[1]}={c}" for d in node.get("defaults", [])[:-1] for key, c in d.items()]
        values = [f"{key}={value}" for key, value in node.items() if key == "x"]
        assert task_of(compose([*choices, *values, *deletions])) == task_of(compose(overrides))
