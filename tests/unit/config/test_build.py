"""From config nodes to objects: what `make` refuses, and what a built run is made of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

import research.config as config
from research.data.traces import TraceData
from research.errors import CheckpointError, ConfigError
from research.models.build import rebuild
from research.models.weights import weights_sha256
from research.schemas import register_schemas
from research.teachers.load import load_network
from research.teachers.transforms import VirtualTeacher
from research.text.templates import Alpaca, Plain


@pytest.fixture
def train_config(repository: Path) -> Callable[..., DictConfig]:
    def composed(*overrides: str) -> DictConfig:
        register_schemas()
        with initialize_config_dir(str(repository / "conf"), version_base="1.3"):
            return compose("train", overrides=list(overrides))

    return composed


DIGITS = {"_target_": "research.data.digits.Digits"}


@pytest.mark.parametrize("name", ["_recursive_", "_args_", "_convert_", "_anything_"])
def test_p115_no_node_changes_how_it_is_instantiated(name: str) -> None:
    """With `_recursive_: true` a nested `_target_` would be called on the way, whatever it is."""
    trap = {"_target_": "os.system", "_args_": ["exit 1"]}
    with pytest.raises(ConfigError, match=rf"unknown key data\.{name}"):
        config.make({**DIGITS, name: True, "keep_classes": trap}, "data")


def test_p115_a_nested_target_is_a_value_of_the_wrong_type(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.keep_classes is .* expected a list of int or null"):
        config.make({**DIGITS, "keep_classes": {"_target_": "os.system", "command": "echo trapped"}}, "data")
    assert "trapped" not in capfd.readouterr().out


GROUPS = ("data", "teacher", "reference", "signal_transform", "method", "optimizer", "scheduler", "student")


@pytest.mark.parametrize("group", GROUPS)
def test_p115_foreign_targets_are_refused_in_every_group(
    group: str, train_config: Callable[..., DictConfig], digits_teacher: Path
) -> None:
    cfg = train_config("teacher=frozen", f"teacher.path='{digits_teacher}'")
    OmegaConf.set_struct(cfg, False)
    for target in ("os.system", "logging.os.system", "subprocess.Popen", "builtins.eval"):
        cfg[group] = {"_target_": target, "command": "exit 1"}
        with pytest.raises(ConfigError, match=rf"{group}\._target_ is '{target}'; expected"):
            config.build(cfg)


@pytest.mark.parametrize("group", ["trainer", "logger"])
def test_p115_foreign_trainers_and_loggers_are_refused(group: str, tmp_path: Path) -> None:
    node = {"_target_": "os.system", "command": "exit 1"}
    with pytest.raises(ConfigError, match=rf"{group}\._target_ is 'os.system'"):
        if group == "trainer":
            config.build_trainer(node)
        else:
            config.build_logger(OmegaConf.create({"logger": node}), tmp_path)


def test_p115_a_run_folder_names_only_networks(digits_teacher: Path, tmp_path: Path) -> None:
    """A folder from elsewhere is data, and its architecture.json a claim."""
    stored = json.loads((digits_teacher / "student" / "architecture.json").read_text())
    stored["network"] = {"_target_": "os.system", "command": "exit 1"}
    with pytest.raises(ConfigError, match=r"os\.system"):
        rebuild(stored)
    (tmp_path / "architecture.json").write_text(json.dumps(stored))
    (tmp_path / "model.safetensors").write_bytes((digits_teacher / "student" / "model.safetensors").read_bytes())
    with pytest.raises((ConfigError, CheckpointError), match=r"os\.system"):
        load_network(tmp_path, input_shape=(64,), num_classes=10)


def test_a_key_that_the_run_sets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.seed is set by the run itself"):
        config.make({**DIGITS, "seed": 3}, "data", seed=0)


def test_a_key_that_its_file_leaves_open_is_named() -> None:
    node = {"_target_": "research.tasks.free_form.FreeFormMath", "path": "???", "timeout_s": 5.0}
    with pytest.raises(ConfigError, match=r"task\.path is not set; research\.tasks\.free_form\.FreeFormMath needs it"):
        config.make(node, "task")


def test_a_key_without_which_nothing_works_is_named() -> None:
    node = {"_target_": "research.teachers.load.frozen"}
    with pytest.raises(ConfigError, match=r"teacher\.path is not set; research\.teachers\.load\.frozen needs it"):
        config.make(node, "teacher", input_shape=(64,), num_classes=10)


def test_null_in_a_factory_is_left_to_the_run() -> None:
    node = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True, "T_max": None}
    assert config.make(node, "scheduler").keywords == {"T_max": None}
    with pytest.raises(ConfigError, match=r"scheduler\.T_max is 'long'"):
        config.make({**node, "T_max": "long"}, "scheduler")


def test_a_target_of_another_room_is_refused(train_config: Callable[..., DictConfig]) -> None:
    cfg = train_config()
    cfg.data = {"_target_": "research.teachers.cache.CacheFingerprint"}
    with pytest.raises(ConfigError, match=r"data"):
        config.build_data(cfg)


def test_an_allowed_prefix_may_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": "collections.Counter"}
    with pytest.raises(ConfigError, match="allow_prefix"):
        config.make(node, "data")
    monkeypatch.setattr(config, "ALLOWED_PREFIXES", config.ALLOWED_PREFIXES)
    config.allow_prefix("collections.")
    assert config.make(node, "data") == {}


def test_the_initial_student_depends_on_the_seed_alone(train_config: Callable[..., DictConfig]) -> None:
    def sha256(*overrides: str) -> str:
        return weights_sha256(config.build(train_config(*overrides)).method.student)

    first = sha256("seed=3")
    torch.rand(7)
    assert sha256("seed=3", "data.batch_size=7", "optimizer=sgd") == first
    assert sha256("seed=4") != first


def test_a_signal_transform_without_a_teacher_is_refused(train_config: Callable[..., DictConfig]) -> None:
    with pytest.raises(ConfigError, match="signal_transform needs a teacher"):
        config.build(train_config("signal_transform=permuted"))


@pytest.mark.parametrize(("transform", "name"), [("permuted", "PermutedWrongClasses"), ("virtual", "VirtualTeacher")])
def test_a_control_of_classifiers_is_refused_of_text_before_any_teacher_is_read(
    transform: str, name: str, train_config: Callable[..., DictConfig]
) -> None:
    text = ("experiment=sum3_on_policy", "teacher.path=/nowhere", f"signal_transform={transform}")
    with pytest.raises(ConfigError, match=rf"signal_transform is {name}; these transforms are of classifiers' signals"):
        config.build(train_config(*text))


def test_a_signal_transform_wraps_the_teacher(train_config: Callable[..., DictConfig], digits_teacher: Path) -> None:
    overrides = ("method=soft_target", "teacher=frozen", f"teacher.path='{digits_teacher}'", "signal_transform=virtual")
    assert isinstance(config.build(train_config(*overrides)).teacher, VirtualTeacher)


def test_an_interpolation_that_leads_nowhere_is_named(train_config: Callable[..., DictConfig]) -> None:
    cfg = train_config("signal_transform=virtual")  # its temperature is the method's; hard labels have none
    with pytest.raises(ConfigError, match=r"signal_transform\.temperature is an interpolation that leads nowhere"):
        config.plain(cfg.signal_transform)


def test_more_processes_than_cores_are_refused(train_config: Callable[..., DictConfig]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices is 4096, one process each, but this machine has \d+"):
        config.build_trainer(train_config("trainer.devices=4096").trainer)


def test_the_logger_writes_into_the_run_folder(train_config: Callable[..., DictConfig], tmp_path: Path) -> None:
    """The folder is no part of the config, so that equal runs have equal config hashes."""
    cfg = train_config()
    logger = config.build_logger(cfg, tmp_path)
    assert isinstance(logger, CSVLogger) and Path(logger.log_dir) == tmp_path / "csv"
    assert "save_dir" not in config.plain(cfg.logger)
    assert config.build_logger(train_config("logger=none"), tmp_path) is False


def test_plain_gives_plain_containers() -> None:
    node: Any = OmegaConf.create({"a": [1, {"b": "${a[0]}"}]})
    assert config.plain(node) == {"a": [1, {"b": 1}]}
    assert config.plain(None) == {}


def test_a_student_begins_with_the_weights_of_a_trained_one(
    train_config: Callable[..., DictConfig], digits_teacher: Path, tmp_path: Path
) -> None:
    """init_from: every weight is that of the run, whatever the seed; another architecture or an empty folder is not."""
    begun = config.build(train_config(f"init_from='{digits_teacher}'", "student.hidden=[32]", "seed=9")).method.student
    trained = load_network(digits_teacher, input_shape=(64,), num_classes=10).network
    assert weights_sha256(begun) == weights_sha256(trained)
    with pytest.raises(CheckpointError, match=r"init_from=.* is of another architecture than the configured network"):
        config.build(train_config(f"init_from='{digits_teacher}'", "student.hidden=[16]"))
    with pytest.raises(CheckpointError):
        config.build(train_config(f"init_from='{tmp_path}'"))


def test_a_teacher_has_a_template_of_its_own_where_one_is_given(train_config: Callable[..., DictConfig]) -> None:
    text = ("data=prompts", "task=sum5", "template=plain", "data.num_train=4", "data.num_val=0", "data.num_test=0")
    own = config.build_data(train_config(*text, "template@teacher_template=alpaca", "data.max_tokens=256"))
    assert isinstance(own, TraceData) and own.num_prompts == 64
    assert isinstance(own.codec.template, Plain) and isinstance(own.teacher_codec.template, Alpaca)
    shared = config.build_data(train_config(*text))
    assert isinstance(shared, TraceData) and shared.teacher_codec is shared.codec
