"""From a composed config to objects: the only caller of `instantiate`.

Every `_target_` is checked against an allowlist before anything is imported, and every key of a node against the
signature of its target, so that a typing error in a file is an error and not a default.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from torch import nn

from research.arguments import check_names, check_types, locate_target, missing_arguments
from research.data.base import AbstractClassData
from research.data.traces import TraceData
from research.errors import ConfigError
from research.methods.base import AbstractMethod, Training
from research.methods.budget import Budget
from research.models.build import DataFacts, build_network, describe
from research.models.weights import check_state
from research.seeding import seed_for
from research.tasks.base import AbstractTask
from research.teachers.base import AbstractTeacher
from research.teachers.load import load_network

ALLOWED_PREFIXES: tuple[str, ...] = (
    "research.data.",
    "research.tasks.",
    "research.text.",
    "research.generation.",
    "research.loops.",
    "research.methods.",
    "research.teachers.",
    "torch.optim.",
    "lightning.Trainer",
    "lightning.pytorch.loggers.",
)
CLASS_TRANSFORMS = "research.teachers.transforms."
UNSET = "???"  # in a YAML file: a key that its reader has to set
DataModule = AbstractClassData | TraceData


@dataclass
class Parts:
    """What one training run is made of."""

    data: DataModule
    method: AbstractMethod
    teacher: AbstractTeacher | None
    reference: AbstractTeacher | None
    architecture: dict[str, Any]


def plain(node: Any) -> dict[str, Any]:
    """A config node as plain resolved containers. Raises ConfigError for an interpolation that leads nowhere."""
    try:
        container = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except InterpolationResolutionError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key} is an interpolation that leads nowhere: {reason}") from None
    return {str(key): value for key, value in container.items()} if isinstance(container, Mapping) else {}


def build(cfg: DictConfig) -> Parts:
    """Datamodule, student, teacher and method of a train config.

    The student's initial weights come from the stream "init" of `seed`, whatever was drawn before. Raises ConfigError
    for a key or value that does not fit, CheckpointError and CacheError for teachers that do not.
    """
    data = build_data(cfg)
    _check_transform(cfg, data)
    facts = data.facts()
    description = plain(cfg.student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(cfg.seed, "init"))
        student = build_network(description, **facts, key="student")
    if cfg.init_from is not None:
        start_from(student, cfg.init_from, facts)
    architecture = describe(description, **facts)
    teacher = build_teacher(cfg, "teacher", facts)
    if plain(cfg.signal_transform).get("_target_"):
        if teacher is None:
            raise ConfigError("signal_transform needs a teacher to transform; choose one with teacher=frozen or cached")
        teacher = make(cfg.signal_transform, "signal_transform", teacher=teacher)
    reference = build_teacher(cfg, "reference", facts)
    if reference is not None and reference.identity.kind == "cached":
        raise ConfigError(
            "teacher@reference=cached holds signals of training rows, and fidelity is measured on others; "
            "choose teacher@reference=frozen or teacher@reference=ensemble"
        )
    training = _training(cfg, student, architecture)
    method = expect_kind(make(cfg.method, "method", training=training, teacher=teacher), "method", AbstractMethod)
    return Parts(data, method, teacher, reference, architecture)


def _check_transform(cfg: DictConfig, data: DataModule) -> None:
    """Raise ConfigError where a control of classifiers' signals meets text."""
    target = str(plain(cfg.signal_transform).get("_target_") or "")
    if isinstance(data, TraceData) and target.startswith(CLASS_TRANSFORMS):
        raise ConfigError(
            f"signal_transform is {target.removeprefix(CLASS_TRANSFORMS)}; these transforms are of classifiers' "
            "signals, and the data are text: give signal_transform=none"
        )


def build_data(cfg: DictConfig, overrides: Mapping[str, Any] | None = None) -> DataModule:
    """The datamodule of a config, with some of its keys replaced; its order and views follow the run's seed.

    overrides  keys of `data`, and those of `task` as :func:`flat_overrides` reads them
    """
    given = flat_overrides(overrides or {})
    for_task = {key.removeprefix("task."): given.pop(key) for key in list(given) if key.startswith("task.")}
    late: dict[str, Any] = {"seed": cfg.seed}
    task, template = build_task(cfg, for_task), build_template(cfg)
    teacher_template = build_template(cfg, "teacher_template") if "teacher_template" in cfg else None
    node = {**plain(cfg.data), **given}
    if str(node.get("_target_", "")).endswith(".TraceData"):
        if task is None or template is None:
            raise ConfigError("data=traces needs a task and a template; choose them, such as task=sum5 template=plain")
        late |= {"task": task, "template": template, "teacher_template": teacher_template}
    elif task is not None:
        raise ConfigError(f"task is {task.name}, which data=traces poses; these data are {node.get('_target_')}")
    return expect_kind(make(node, "data", **late), "data", (AbstractClassData, TraceData))


def flat_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of `data`, the task's own keys as `task.<key>`: a command line nests them (+data.task.num_terms=8)."""
    flat = {key: value for key, value in overrides.items() if key != "task"}
    nested = overrides.get("task", {})
    if not isinstance(nested, Mapping):
        raise ConfigError(f"data.task is {nested!r}; give keys of the task, such as +data.task.num_terms=8")
    return flat | {f"task.{key}": value for key, value in nested.items()}


def build_task(cfg: DictConfig, overrides: Mapping[str, Any] | None = None) -> AbstractTask | None:
    """The task of a config, with some of its keys replaced; None where its `_target_` is null."""
    node = {**plain(cfg.get("task")), **(overrides or {})}
    return expect_kind(make(node, "task"), "task", AbstractTask) if node.get("_target_") else None


def build_template(cfg: DictConfig, key: str = "template") -> Any:
    """The template of a config, or the factory of one that needs the tokenizer; None where its `_target_` is null."""
    node = plain(cfg.get(key))
    return make(node, key) if node.get("_target_") else None


def start_from(student: nn.Module, path: str, facts: Mapping[str, Any]) -> None:
    """Give the student the weights of a trained network of its own architecture.

    Raises CheckpointError where nothing can be read there, or where it was made for other sizes, classes or tokens.
    """
    state = load_network(path, **cast(DataFacts, dict(facts))).network.state_dict()
    check_state(student, state, f"init_from={path}")
    student.load_state_dict(state)


def build_teacher(cfg: DictConfig, key: str, facts: Mapping[str, Any]) -> AbstractTeacher | None:
    """The teacher under `key`, or None where its `_target_` is null."""
    node = plain(cfg[key])
    return expect_kind(make(node, key, **facts), key, AbstractTeacher) if node.get("_target_") else None


def build_trainer(node: Any, **late: Any) -> Any:
    """Lightning's Trainer from its config and what only the run knows (folder, callbacks, logger)."""
    arguments = plain(node)
    if arguments.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        given = arguments["accelerator"]
        raise ConfigError(f"trainer.accelerator is {given!r}, but torch finds no GPU on this machine; give trainer=cpu")
    devices, cores = arguments.get("devices"), os.cpu_count() or 1
    if arguments.get("accelerator") == "cpu" and isinstance(devices, int) and devices > cores:
        raise ConfigError(f"trainer.devices is {devices}, one process each, but this machine has {cores} CPU cores")
    for key in ("val_check_interval", "check_val_every_n_epoch"):
        if arguments.get(key) == 0:
            raise ConfigError(f"trainer.{key} is 0; for no validation give trainer.limit_val_batches=0")
    for key, least, told in (("accumulate_grad_batches", 1, "at least 1"), ("gradient_clip_val", 0, "0 or more")):
        if isinstance(arguments.get(key), int | float) and arguments[key] < least:
            raise ConfigError(f"trainer.{key} is {arguments[key]}; expected {told}")
    try:
        return make(arguments, "trainer", **late)
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise ConfigError(f"Lightning's Trainer refuses its config: {error}") from None


def build_logger(cfg: DictConfig, run_dir: Path) -> Any:
    """The configured logger, writing into the run folder, or False for none.

    Raises ConfigError naming the extra where its optional package is absent.
    """
    node = plain(cfg.logger)
    if not node.get("_target_"):
        return False
    extra = str(node["_target_"]).rpartition(".")[2].removesuffix("Logger").lower()
    try:
        return make(node, "logger", save_dir=str(run_dir / "mlruns" if extra == "mlflow" else run_dir))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"logger={extra} needs a package that is not installed; "
            f"pip install 'research-distillation[{extra}]', or choose logger=csv ({error})"
        ) from None


def make(node: Any, key: str, **late: Any) -> Any:
    """Instantiate one node after checking its target and its keys; `late` adds what the config cannot hold.

    The call itself is ours, so objects in `late` and errors of the target come through as they are. A node with
    `_partial_` gives the factory.
    """
    arguments = plain(node)
    partial = bool(arguments.get("_partial_"))
    called = locate_target(arguments.get("_target_"), key, ALLOWED_PREFIXES)
    given = {name: value for name, value in arguments.items() if name not in ("_target_", "_partial_")}
    check_keys(arguments["_target_"], key, given)
    for name in given.keys() & late.keys():
        raise ConfigError(f"{key}.{name} is set by the run itself; leave it out of the config")
    for name, value in given.items():
        if value == UNSET:
            raise ConfigError(f"{key}.{name} is not set; {arguments['_target_']} needs it")
    # in a factory, null leaves a value to the run
    check_types(called, key, {name: value for name, value in given.items() if not (partial and value is None)})
    if not partial:
        for name in missing_arguments(called, given.keys() | late.keys()):
            raise ConfigError(f"{key}.{name} is not set; {arguments['_target_']} needs it")
    factory = instantiate({**arguments, "_partial_": True}, _convert_="all", _recursive_=False)
    return factory if partial else factory(**late)


def allow_prefix(prefix: str) -> None:
    """Let configs name targets under one more import prefix, such as "my_package."."""
    global ALLOWED_PREFIXES
    if prefix not in ALLOWED_PREFIXES:
        ALLOWED_PREFIXES = (*ALLOWED_PREFIXES, prefix)


def check_keys(target: str, key: str, given: Iterable[str]) -> None:
    """Raise ConfigError naming the nearest valid key where a node has one that its target does not take."""
    check_names(locate_target(target, key, ALLOWED_PREFIXES), target, key, given)


def expect_kind(made: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """`made`, which came of the node `key`, where it is of that kind; else ConfigError."""
    if not isinstance(made, kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(f"{key}._target_ gives a {type(made).__name__}; expected a {names}")
    return made


def _training(cfg: DictConfig, student: nn.Module, architecture: dict[str, Any]) -> Training:
    scheduler = make(cfg.scheduler, "scheduler") if plain(cfg.scheduler).get("_target_") else None
    return Training(student, make(cfg.optimizer, "optimizer"), scheduler, architecture, build_budget(cfg))


def build_budget(cfg: DictConfig) -> Budget | None:
    """What the run may cost; None where nothing is limited."""
    budget = Budget(**plain(cfg.get("budget")))
    return budget if budget.limits else None


def conf_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it once installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"
