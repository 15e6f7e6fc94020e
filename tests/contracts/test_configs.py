"""Every YAML under conf/ and experiments/, found recursively: it composes, what it names exists, it builds, it runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from research.arguments import check_names, check_types, locate_target
from research.config import ALLOWED_PREFIXES, build, build_logger, build_trainer, plain
from research.errors import ConfigError
from research.results.study import Cell, Study, cells, requirements
from research.results.study_file import read_study
from research.schemas import SCHEMAS, check_root, register_schemas

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
CHOICES = [path for path in FILES if path.parts[0] != "hydra" and len(path.parts) > 1]
EXPERIMENTS = [path.name for path in CHOICES if path.parts[0] == "experiment"]
STUDIES = sorted(path.parent.name for path in (REPOSITORY / "experiments").rglob("study.yaml"))
GROUPS_OF_TRAIN = {"model": "model@student"}
NODES = ("data", "teacher", "reference", "signal_transform", "method", "optimizer", "scheduler", "trainer", "logger")
OPTIONAL_LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
REAL_DATA = {"mnist": "mnist", "spoken_digits": "fsdd"}


def composed(command: str, *overrides: str) -> DictConfig:
    """The root config as the command would see it."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, overrides=list(overrides))
    check_root(cfg, command)
    return cfg


def check_nodes(cfg: DictConfig) -> None:
    """What `make` checks before it calls a target, for every node, without calling any."""
    for key in NODES:
        node = plain(cfg[key]) if key in cfg else {}
        if not node.get("_target_"):
            continue
        called = locate_target(node["_target_"], key, ALLOWED_PREFIXES)
        given = {name: value for name, value in node.items() if not name.startswith("_") and value is not None}
        check_names(called, node["_target_"], key, given)
        check_types(called, key, given)


def real_data_of(cfg: DictConfig, require_data: Callable[..., Path]) -> None:
    """Skips, with the reason, where this config reads files that are not at hand."""
    for module, folder in REAL_DATA.items():
        if f".{module}." in cfg.data._target_:
            require_data(folder)


def test_data_that_is_announced_and_absent_fails_in_continuous_integration(
    require_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_DATA_DIR", str(tmp_path / "missing"))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="does not exist"):
        require_data("mnist")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="does not exist"):
        require_data("mnist")
    monkeypatch.delenv("RESEARCH_DATA_DIR")
    with pytest.raises(pytest.skip.Exception, match="RESEARCH_DATA_DIR is not set"):
        require_data("mnist")


# -- conf/ ------------------------------------------------------------------------------------------------------------


def test_p112_the_root_configs_are_the_commands() -> None:
    assert {str(path) for path in FILES if len(path.parts) == 1} == set(SCHEMAS)


@pytest.mark.parametrize("command", SCHEMAS)
def test_p112_every_root_composes_and_its_schema_is_covered(command: str) -> None:
    cfg = composed(command)
    check_nodes(cfg)
    assert cfg.name


@pytest.fixture
def needs(digits_teacher: Path, distill: Callable[..., Any], tmp_path: Path) -> Callable[[str], list[str]]:
    """Overrides without which a choice cannot be built: teachers need weights, their users need teachers."""
    soft = ["method=soft_target", "teacher=frozen", f"teacher.path='{digits_teacher}'"]

    def cache() -> str:
        done = distill("cache", f"teacher.path='{digits_teacher}'", f"cache_dir='{tmp_path}/cache'", cwd=tmp_path)
        assert done.code == 0, done.err
        return f"{tmp_path}/cache"

    def given(choice: str) -> list[str]:
        match choice:
            case "teacher/frozen":
                return [f"teacher.path='{digits_teacher}'"]
            case "teacher/cached":
                return [f"teacher.path='{cache()}'"]
            case "teacher/ensemble":
                return [f"teacher.paths=['{digits_teacher}','{digits_teacher}']"]
            case "signal_transform/virtual" | "signal_transform/permuted" | "method/logit_matching":
                return [override for override in soft if not override.startswith(f"{choice.partition('/')[0]}=")]
            case "method/soft_target":
                return soft[1:]
        return []

    return given


@pytest.mark.parametrize("choice", [str(path) for path in CHOICES if path.parts[0] not in ("experiment", "paths")])
def test_p112_every_choice_builds(
    choice: str, needs: Callable[[str], list[str]], require_data: Callable[..., Path], tmp_path: Path
) -> None:
    group, _, name = choice.partition("/")
    cfg = composed("train", f"{GROUPS_OF_TRAIN.get(group, group)}={name}", *needs(choice))
    real_data_of(cfg, require_data)
    assert build(cfg).data.num_classes == 10
    if group == "logger" and name in OPTIONAL_LOGGERS:
        _logger_builds_or_names_its_extra(cfg, name, tmp_path)
    elif group == "trainer" and name == "gpu" and not lightning.pytorch.accelerators.CUDAAccelerator.is_available():
        with pytest.raises(ConfigError, match=r"trainer\.accelerator is 'gpu'.*no GPU.*trainer=cpu"):
            build_trainer(cfg.trainer)
    else:
        assert isinstance(build_trainer(cfg.trainer, logger=build_logger(cfg, tmp_path)), lightning.Trainer)


def _logger_builds_or_names_its_extra(cfg: DictConfig, name: str, folder: Path) -> None:
    try:
        assert build_logger(cfg, folder)
    except ConfigError as error:
        assert f"research-distillation[{name}]" in str(error)


def test_every_choice_opens_with_what_it_is() -> None:
    for path in CHOICES:
        text = (CONF / path).with_suffix(".yaml").read_text()
        if path.parts[0] not in ("paths", "optimizer", "logger", "scheduler"):
            assert text.startswith("#"), f"conf/{path}.yaml has no opening comment"
        if path.parts[0] == "experiment":
            for word in ("Question", "Command", "Hardware", "Expected"):
                assert f"# {word} " in text, f"conf/{path}.yaml does not say its {word}"


def test_p110_no_file_chooses_the_mode_of_hydra() -> None:
    for path in FILES:
        content = yaml.safe_load((CONF / path).with_suffix(".yaml").read_text()) or {}
        assert "mode" not in (content.get("hydra") or {}) and not re.search(r"hydra\.mode", str(content))
        assert path.parts[0] != "hydra" or "mode" not in content


def test_p113_no_choice_or_value_is_read_as_something_else() -> None:
    parser = OverridesParser.create()
    for path in CHOICES:
        read = parser.parse_override(f"{path.parts[0]}={path.name}").value()
        assert read == path.name and isinstance(read, str), f"{path.name} on a command line is {read!r}"
        assert yaml.safe_load(path.name) == path.name
    unclear = re.compile(r":\s+(on|off|yes|no|y|n|None|none|NULL|Null|~|nan|inf)\s*(#.*)?$", re.MULTILINE)
    for path in FILES:
        if len(path.parts) > 1:  # in the defaults list of a root, `none` is the name of a choice
            found = unclear.search((CONF / path).with_suffix(".yaml").read_text())
            assert found is None, f"conf/{path}.yaml: {found and found[0]!r}; quote it, or write true, false or null"


def test_p117_no_key_turns_on_remote_code() -> None:
    for path in FILES:
        assert "trust_remote_code" not in (CONF / path).with_suffix(".yaml").read_text()


# -- experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_p112_every_experiment_composes(name: str) -> None:
    cfg = composed("train", f"experiment={name}")
    check_nodes(cfg)
    assert cfg.name == name, "an experiment's folder carries its name"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_p112_every_experiment_builds(
    name: str, require_data: Callable[..., Path], untrained_teacher: Callable[[DictConfig], Path]
) -> None:
    cfg = composed("train", f"experiment={name}")
    real_data_of(cfg, require_data)
    for key in ("teacher", "reference"):
        if cfg[key]._target_ is not None:
            cfg[key].path = str(untrained_teacher(cfg))
    assert build(cfg).method.student is not None
    assert isinstance(build_trainer(cfg.trainer, logger=False), lightning.Trainer)


@pytest.fixture
def untrained_teacher(tmp_path: Path) -> Callable[[DictConfig], Path]:
    """The folder of a network, as yet untrained, that fits the data of a config."""
    from research.models.weights import save_network

    def save(cfg: DictConfig) -> Path:
        alone = cfg.copy()
        alone.teacher = alone.reference = alone.signal_transform = {"_target_": None}
        alone.method = {"_target_": "research.methods.supervised.Supervised"}
        parts = build(alone)
        save_network(tmp_path / "student", parts.method.student, parts.architecture)
        return tmp_path

    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_p30_every_experiment_runs_shrunk(
    name: str,
    distill: Callable[..., Any],
    require_data: Callable[..., Path],
    untrained_teacher: Callable[[DictConfig], Path],
    tmp_path: Path,
) -> None:
    cfg = composed("train", f"experiment={name}")
    real_data_of(cfg, require_data)
    paths = [f"{k}.path='{untrained_teacher(cfg)}'" for k in ("teacher", "reference") if cfg[k]._target_ is not None]
    done = distill("train", f"experiment={name}", "trainer=smoke", "hydra.run.dir=run", *paths, cwd=tmp_path)
    assert done.code == 0, done.err
    assert yaml.safe_load((tmp_path / "run" / "run.json").read_text())["status"] == "completed"


# -- studies ----------------------------------------------------------------------------------------------------------


def runs_of(study: Study) -> dict[tuple[str, tuple[str, ...]], Cell]:
    """(command, overrides) -> every run of every preset that differs in more than its seed."""
    found = {}
    for preset in (None, *study.presets):
        found |= {("train", cell.overrides): cell for cell in cells(study, preset)}
        for item in requirements(study, preset):
            found[item.command, item.overrides] = Cell(item.name, {}, 0, item.overrides, item.key)
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_p112_every_run_of_every_study_composes(name: str) -> None:
    study = read_study(REPOSITORY / "experiments" / name)
    folders = {required: f"/nowhere/{required}" for required in study.requires}
    for (command, _), cell in runs_of(study).items():
        cfg = composed(command, *cell.filled(folders))
        check_nodes(cfg)
        assert cfg.threads == 1, f"{cell.key}: runs lie beside each other, one thread each"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_seeds_enough_for_a_verdict(name: str) -> None:
    """P121: five is the least; what so few can show is in the verdict, as the smallest p that n allows."""
    study = read_study(REPOSITORY / "experiments" / name)
    assert len(study.seeds) >= 5
    text = study.path.read_text()
    assert all(f"# {word} " in text for word in ("Command", "Hardware", "Expected"))
