"""Every YAML under conf/ and experiments/, found recursively: it composes, what it names exists, it builds, it runs."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from research.arguments import check_names, check_types, locate_target
from research.config import ALLOWED_PREFIXES, build, build_logger, build_trainer, make, plain
from research.data.traces import TraceData
from research.errors import ConfigError
from research.loops.self_taught_plan import SelfTaughtPlan
from research.models.weights import save_network, save_tokenizer
from research.results.study import Cell, Study, cells, requirements
from research.results.study_file import read_study
from research.schemas import SCHEMAS, check_root, register_schemas
from research.sweeps.self_taught_job import SelfTaughtLoop
from research.sweeps.traces_parts import build_parts
from research.traces.filters import build_filters

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
FILES = sorted(path.relative_to(CONF).with_name(path.stem) for path in CONF.rglob("*.yaml"))
CHOICES = [path for path in FILES if path.parts[0] != "hydra" and len(path.parts) > 1]
OF_TRACES = ("generator", "filter")  # groups of `distill traces` alone
OF_TRAIN = [str(path) for path in CHOICES if path.parts[0] not in ("experiment", "hparams_search", "paths", *OF_TRACES)]
EXPERIMENTS = [path.name for path in CHOICES if path.parts[0] == "experiment"]
SEARCHES = [path.name for path in CHOICES if path.parts[0] == "hparams_search"]
STUDIES = sorted(path.parent.name for path in (REPOSITORY / "experiments").rglob("study.yaml"))
GROUPS_OF_TRAIN = {"model": "model@student"}
NODES = (
    "data", "task", "template", "teacher", "reference", "signal_transform", "method", "optimizer", "scheduler", "loop",
    "early_stopping", "trainer", "logger", "generator",
)  # fmt: skip
OF_CLASSES = ("digits", "mnist", "speech")  # they are not shrunk, but for their steps
OTHER_SIZES = tuple(f"r1_distill_{size}" for size in ("qwen_7b", "qwen_14b", "qwen_32b", "llama_70b"))  # of one file
# but for their numbers, sum3_sft, sum8_trace, and those of other pretrained networks
ALIKE = ("sum3_teacher", "sum3_base", "sum8_teacher", "qwen2.5_1.5b_gsm8k_on_policy", "r1_distill_llama_8b")
LONG = [name for name in EXPERIMENTS if name.startswith((*OF_CLASSES, *OTHER_SIZES, *ALIKE))]
OPTIONAL_LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
REAL_DATA = {
    "data.mnist.Mnist": "mnist", "spoken_digits.SpokenDigits": "fsdd", "word_problems.Gsm8k": "gsm8k",
    "word_problems.Gsm8kR1": "traces", "word_problems.Svamp": "traces", "commonsense.CommonsenseQa": "traces",
}  # fmt: skip
TEXT = {
    "data": "traces", "task": "sum5", "template": "plain", "model@student": "llama", "method": "sft_trace",
    "data.num_train": "8", "data.num_val": "2", "data.num_test": "2", "data.max_tokens": "2000", "monitor": "val/nll",
}  # fmt: skip
SERVED = ["teacher.base_url='http://127.0.0.1:8000/v1'", "teacher.model=tiny"]
OPEN_TEXT = {
    "template": "alpaca",
    "data.tokenizer": "bpe",
    "data.vocab_size": "300",
    "data.trace_format": "answer_only",
}


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
    for target, folder in REAL_DATA.items():
        if str(cfg.data._target_).endswith(target) or str(cfg.task._target_).endswith(target):
            require_data(folder)


def trainer_builds(cfg: DictConfig, logger: Any = False) -> None:
    """A trainer, or, for one of a GPU where there is none, the refusal that says so."""
    if cfg.trainer.accelerator == "gpu" and not lightning.pytorch.accelerators.CUDAAccelerator.is_available():
        with pytest.raises(ConfigError, match=r"trainer\.accelerator is 'gpu'.*no GPU.*trainer=cpu"):
            build_trainer(cfg.trainer)
    else:
        assert isinstance(build_trainer(cfg.trainer, logger=logger), lightning.Trainer)


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


def yaml_of(path: Path) -> Path:
    """The file of a choice, whose name may hold dots."""
    return (CONF / path).with_name(f"{path.name}.yaml")


@pytest.mark.parametrize("command", SCHEMAS)
def test_p112_every_root_composes_and_its_schema_is_covered(command: str) -> None:
    cfg = composed(command)
    check_nodes(cfg)
    assert cfg.name


@pytest.fixture
def needs(
    digits_teacher: Path, distill: Callable[..., Any], stand_in: Callable[[str], Path], tmp_path: Path
) -> Callable[[str], list[str]]:
    """Overrides without which a choice cannot be built: weights of a teacher, or for text a task and all around it."""
    soft = ["method=soft_target", "teacher=frozen", f"teacher.path='{digits_teacher}'"]

    def cache() -> str:
        done = distill("cache", f"teacher.path='{digits_teacher}'", f"cache_dir='{tmp_path}/cache'", cwd=tmp_path)
        assert done.code == 0, done.err
        return f"{tmp_path}/cache"

    def text(group: str, **changes: str) -> list[str]:
        own = GROUPS_OF_TRAIN.get(group, group)
        return [f"{key}={value}" for key, value in (TEXT | changes).items() if key != own]

    def given(choice: str) -> list[str]:
        group = choice.partition("/")[0]
        pretrained = {"data.tokenizer": f"'{stand_in('Qwen/Qwen2.5')}'"}
        match choice:
            case "teacher/frozen":
                return [f"teacher.path='{digits_teacher}'"]
            case "early_stopping/threshold":
                return ["early_stopping.threshold=20"]
            case "teacher/served":
                return [*text(group), *SERVED]
            case "method/on_policy":
                return [*text(group, data="prompts"), "teacher=served", *SERVED]
            case "teacher/cached":
                return [f"teacher.path='{cache()}'"]
            case "teacher/ensemble":
                return [f"teacher.paths=['{digits_teacher}','{digits_teacher}']"]
            case "signal_transform/virtual" | "signal_transform/permuted" | "method/logit_matching":
                return [override for override in soft if not override.startswith(f"{choice.partition('/')[0]}=")]
            case "method/soft_target":
                return soft[1:]
            case "data/traces" | "data/prompts" | "method/sft_trace" | "loop/self_taught" | "loop/strong_to_weak":
                return text(group)
            case "model/pretrained_lm":
                return [*text(group, **pretrained), f"student.path='{stand_in('Qwen/Qwen2.5')}'"]
            case "template/chat":
                return text(group, **pretrained)
            case "task/none" | "template/none" | "model/mlp" | "model/conv":
                return []
            case "task/gsm8k" | "task/gsm8k_r1" | "task/svamp" | "task/commonsense_qa" | "task/reasoning_gym":
                return text(group, **OPEN_TEXT)
            case "task/free_form":
                pytest.importorskip("math_verify")
                rows = [{"problem": f"What is x + {number}?", "answer": f"x+{number}"} for number in range(60)]
                (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
                return [*text(group, **OPEN_TEXT), f"task.path='{tmp_path}/mine.jsonl'"]
        return text(group) if group in ("task", "template", "model") else []

    return given


@pytest.mark.parametrize("choice", OF_TRAIN)
def test_p112_every_choice_builds(
    choice: str, needs: Callable[[str], list[str]], require_data: Callable[..., Path], tmp_path: Path
) -> None:
    group, _, name = choice.partition("/")
    cfg = composed("train", f"{GROUPS_OF_TRAIN.get(group, group)}={name}", *needs(choice))
    check_nodes(cfg)
    real_data_of(cfg, require_data)
    if choice == "task/reasoning_gym":
        pytest.importorskip("reasoning_gym")
    with torch.device("meta") if group == "model" and name != "pretrained_lm" else nullcontext():
        parts = build(cfg)  # on the meta device: every size, and no memory
    if isinstance(parts.data, TraceData):
        assert len(parts.data.documents("train")) == 8 and parts.data.facts()["vocab_size"] > 2
    else:
        assert parts.data.num_classes == 10
    if choice == "loop/strong_to_weak":
        assert [phase.name for phase in make(cfg.loop, "loop").declared()] == ["off_policy", "on_policy"]
    if choice == "loop/self_taught":
        plan = make(cfg.loop, "loop")
        assert isinstance(plan, SelfTaughtPlan) and SelfTaughtLoop(cfg, parts.data, plan).metrics == {}
    if choice in ("early_stopping/patience", "early_stopping/threshold"):
        assert make(cfg.early_stopping, "early_stopping").monitor == "val/errors"
    if group == "logger" and name in OPTIONAL_LOGGERS:
        _logger_builds_or_names_its_extra(cfg, name, tmp_path)
    else:
        trainer_builds(cfg, build_logger(cfg, tmp_path))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model that writes the characters of sums, as yet untrained."""
    folder = tmp_path_factory.mktemp("writer")
    parts = build(composed("train", *(f"{key}={value}" for key, value in TEXT.items())))
    save_network(folder, parts.method.student, parts.architecture)
    save_tokenizer(folder, parts.data.codec.tokenizer)
    return folder


@pytest.mark.parametrize("choice", [str(path) for path in CHOICES if path.parts[0] in OF_TRACES])
def test_p112_every_choice_of_traces_builds(choice: str, writer: Path, tmp_path: Path) -> None:
    overrides = ["task=sum5", "template=plain", "data.num_problems=4", "data.num_evaluation=4"]
    if choice.startswith("filter/"):
        overrides.append("source=reference")
    elif choice == "generator/server":
        overrides += ["generator.base_url=http://127.0.0.1:1/v1", "generator.model=m"]
    else:
        overrides.append(f"teacher.path='{writer}'")
    cfg = composed("traces", choice.replace("/", "="), *overrides)
    check_nodes(cfg)
    parts = build_parts(cfg, tmp_path)
    assert len(parts.problems) == 4 and len(parts.filters.filters) == len(cfg.filters)
    assert (parts.teacher is None) == choice.startswith("filter/")


def _logger_builds_or_names_its_extra(cfg: DictConfig, name: str, folder: Path) -> None:
    try:
        assert build_logger(cfg, folder)
    except ConfigError as error:
        assert f"research-distillation[{name}]" in str(error)


def test_every_choice_opens_with_what_it_is() -> None:
    for path in CHOICES:
        text = yaml_of(path).read_text()
        if path.parts[0] not in ("paths", "optimizer", "logger", "scheduler"):
            assert text.startswith("#"), f"conf/{path}.yaml has no opening comment"
        if path.parts[0] in ("experiment", "hparams_search"):
            for word in ("Question", "Command", "Hardware", "Expected"):
                assert f"# {word} " in text, f"conf/{path}.yaml does not say its {word}"


def test_p110_no_file_chooses_the_mode_of_hydra() -> None:
    for path in FILES:
        content = yaml.safe_load(yaml_of(path).read_text()) or {}
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
            found = unclear.search(yaml_of(path).read_text())
            assert found is None, f"conf/{path}.yaml: {found and found[0]!r}; quote it, or write true, false or null"


def test_p117_no_key_turns_on_remote_code() -> None:
    for path in FILES:
        assert "trust_remote_code" not in yaml_of(path).read_text()


# -- experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHES)
def test_p112_every_search_composes(name: str) -> None:
    cfg = composed("train", f"hparams_search={name}")
    check_nodes(cfg)
    assert cfg.name == name, "a search's folder carries its name"


@pytest.fixture
def shrunk(
    stand_in: Callable[[str], Path], few_problems: Path, few_traces: Path, require_data: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], list[str]]:  # fmt: skip
    """Overrides that make an experiment of text small: few problems, short answers, stand-ins for what is pretrained.

    As it stands it composes and what it names exists, also where it is skipped then: experiments of classes stay as
    they are, and are skipped without their data.
    """
    monkeypatch.setenv("TRACES_STORE", "store")  # what some take from the environment, where nothing else is given

    def overrides(name: str) -> list[str]:
        cfg = composed("train", f"experiment={name}")
        check_nodes(cfg)
        assert cfg.name == name, "an experiment's folder carries its name"
        if not str(cfg.data._target_).endswith(".TraceData"):
            real_data_of(cfg, require_data)
            return []
        few = ["data.num_train=16", "data.num_test=2", "evaluation.max_new_tokens=6"]
        if cfg.data.num_val > 0:
            few.append("data.num_val=2")
        if cfg.data.get("num_prompts"):
            few.append("data.num_prompts=4")
        if cfg.trainer.accumulate_grad_batches > 1:
            few.append("trainer.accumulate_grad_batches=2")
        if "path" in cfg.student:
            folder = stand_in(cfg.student.path)
            few += [f"student.path='{folder}'", f"data.tokenizer='{folder}'", f"task.data_dir='{few_problems}'"]
        return [*few, f"data.store='{few_traces}'"] if OmegaConf.is_interpolation(cfg.data, "store") else few

    return overrides


@pytest.mark.parametrize("name", LONG)
def test_p112_every_experiment_builds(
    name: str, shrunk: Callable[[str], list[str]], untrained_teacher: Callable[[DictConfig], Path]
) -> None:
    """Those whose run is `slow`; the others build where they run."""
    cfg = composed("train", f"experiment={name}", *shrunk(name))
    for key in ("teacher", "reference"):
        if cfg[key]._target_ is not None:
            cfg[key].path = str(untrained_teacher(cfg))
    parts = build(cfg)
    assert parts.method.student is not None
    trainer_builds(cfg)


@pytest.fixture
def untrained_teacher(tmp_path: Path) -> Callable[[DictConfig], Path]:
    """The folder of a network, as yet untrained, that fits the data of a config."""

    def save(cfg: DictConfig) -> Path:
        alone = cfg.copy()
        alone.teacher = alone.reference = alone.signal_transform = {"_target_": None}
        alone.method = {"_target_": "research.methods.supervised.Supervised"}
        parts = build(alone)
        save_network(tmp_path / "student", parts.method.student, parts.architecture)
        return tmp_path

    return save


RUNS = [pytest.param(name, marks=pytest.mark.slow if name in LONG else []) for name in EXPERIMENTS]


@pytest.mark.parametrize("name", RUNS)
def test_p30_every_experiment_runs_shrunk(
    name: str,
    distill: Callable[..., Any],
    shrunk: Callable[[str], list[str]],
    untrained_teacher: Callable[[DictConfig], Path],
    tmp_path: Path,
) -> None:
    """Two optimizer steps or more and the whole evaluation; `trainer=smoke` holds every experiment to four."""
    small = shrunk(name)
    cfg = composed("train", f"experiment={name}", *small)
    paths = [f"{k}.path='{untrained_teacher(cfg)}'" for k in ("teacher", "reference") if cfg[k]._target_ is not None]
    done = distill("train", f"experiment={name}", "trainer=smoke", "hydra.run.dir=run", *small, *paths, cwd=tmp_path)
    assert done.code == 0, done.err
    record = yaml.safe_load((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "completed" and record["metrics"]["test/errors"] >= 0
    assert record["config"]["trainer"]["max_steps"] == 4
    assert not record["data"].get("summary", {}).get("dropped", {}).get("train")


# -- studies ----------------------------------------------------------------------------------------------------------


Run = tuple[str, tuple[str, ...]]  # command and overrides
ONE_OF_MANY = re.compile(
    r"=(-?\d[\d_]*(\.\d*)?(e[+-]?\d+)?|'\{(requires|arms)\.[^']*')$"
)  # a number, another run's folder


def runs_of(study: Study, presets: Iterable[str | None]) -> dict[Run, Cell]:
    """Every run that differs from the others, by what is run."""
    found: dict[Run, Cell] = {}
    for preset in presets:
        found |= {("train", cell.overrides): cell for cell in cells(study, preset)}
        for item in requirements(study, preset):
            found[item.command, item.overrides] = Cell(item.name, {}, 0, item.overrides, item.key)
    return found


def few_of(runs: dict[Run, Cell]) -> dict[Run, Cell]:
    """Few that hold every override of all, of numbers and other runs one: always that with most that are new."""
    words = {run: {(run[0], ONE_OF_MANY.sub("=", word)) for word in run[1]} for run in runs}
    missing, chosen = set[tuple[str, str]]().union(*words.values()), {}
    while missing:
        run = max(words, key=lambda run: len(words[run] & missing))
        chosen[run], missing = runs[run], missing - words[run]
    return chosen


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STUDIES)
def test_p112_every_run_of_every_study_composes(name: str, every: bool) -> None:
    """Here the study itself, in as few runs as hold all overrides; `slow`: each run, and those of presets."""
    study = read_study(REPOSITORY / "experiments" / name)
    folders = {required: f"/nowhere/{required}" for required in study.requires}
    runs = runs_of(study, (None, *study.presets) if every else (None,))
    for (command, _), cell in (runs if every else few_of(runs)).items():
        cfg = composed(command, *cell.filled(folders, "/nowhere/runs"))
        check_nodes(cfg)
        if command == "traces":
            build_filters(plain(cfg)["filters"], evaluation_texts=[])
        assert cfg.threads == 1, f"{cell.key}: runs lie beside each other, one thread each"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_seeds_enough_for_a_verdict(name: str) -> None:
    """P121: five is the least; what so few can show is in the verdict, as the smallest p that n allows."""
    study = read_study(REPOSITORY / "experiments" / name)
    assert len(study.seeds) >= 5
    text = study.path.read_text()
    assert all(f"# {word} " in text for word in ("Command", "Hardware", "Expected"))
