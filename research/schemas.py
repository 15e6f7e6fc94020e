"""The strict root of every command's config: keys outside these fields are refused. Imports no torch.

A group (data, student, teacher, ...) is an open node here; its keys are checked against the signature of its
`_target_` when it is built, and against the group's file when they come from the command line.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from research.errors import ConfigError

SPLITS = ("train", "val", "test")
WEIGHTS = ("last", "best")
SOURCES = ("teacher", "reference", "file", "released")
GROUP_OF = {"student": "model", "reference": "teacher", "teacher_template": "template"}  # where key and group differ
MODEL_FORMATS = ("llama2c",)
PREFLIGHTS = ("skip", "warn", "refuse")
_NAME = re.compile(r"[\w.+-]+")


@dataclass
class PathsConfig:
    output_dir: str = "outputs"


@dataclass
class EvaluationConfig:
    """What is measured after training.

    splits        scored once, with the final weights
    variants      name -> overrides of `data`; scores its test split again under the prefix test_<name>
    bias_classes  classes whose logits get one shared offset, fitted on held-out training rows (claims C08, C09)
    weights       last (the final step) or best (by `monitor` on the validation split)

    Of text: problems are answered greedily and, with num_samples > 0, so often again by sampling.
    sampling_temperature, top_p   of those samples
    max_new_tokens                length limit of an answer; null: the data's max_tokens
    val_problems, val_samples     validation problems that are answered at every validation, greedily and, with
                                  val_samples > 0, so often again by sampling: val/accuracy, val/errors,
                                  val/sampled_accuracy
    exposure                      how far student and live teacher (or reference) are apart on either one's prefixes,
                                  and the step of the student's first error: test/kl_on_student_prefixes, ...
    """

    splits: list[str] = field(default_factory=lambda: ["test"])
    variants: Any = None
    bias_classes: list[int] = field(default_factory=list)
    weights: str = "last"
    batch_size: int = 2000
    num_samples: int = 0
    sampling_temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    val_problems: int = 0
    val_samples: int = 0
    exposure: bool = False


@dataclass
class BudgetConfig:
    """What a run may cost; the first limit that is reached ends it. See research.methods.budget.Budget."""

    flops: float | None = None
    tokens: float | None = None
    seconds: float | None = None


@dataclass
class TrainConfig:
    """`distill train`. `name` names the output folder; `ckpt_path` is a file, or `last` for this folder's own.

    init_from         run folder (or checkpoint, or Hugging Face folder) whose weights the student begins with
    teacher_cache     folder in which the teacher's signals for the train split are kept for all runs that name it:
                      written by the first, see research.sweeps.cache_job; null: the teacher is asked at every step
    teacher_template  how the teacher was taught to be asked; none: like the student
    checkpoint_steps  optimizer steps after which last.ckpt is written too; null: at the end of every epoch alone
    preflight         before a language model learns from a teacher: skip, warn, or refuse what would be warned of too;
                      on preflight_problems held-out problems, see research.evaluation.preflight
    """

    name: str = "train"
    seed: int = 0
    data: Any = MISSING
    task: Any = MISSING
    template: Any = MISSING
    teacher_template: Any = MISSING
    student: Any = MISSING
    teacher: Any = MISSING
    reference: Any = MISSING
    signal_transform: Any = MISSING
    method: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    loop: Any = MISSING
    early_stopping: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    init_from: str | None = None
    ckpt_path: str | None = None
    teacher_cache: str | None = None
    checkpoint_steps: int | None = None
    preflight: str = "warn"
    preflight_problems: int = 32
    monitor: str = "val/errors"
    compile: bool = False
    threads: int | None = None
    keep_checkpoints: bool = True
    tags: list[str] = field(default_factory=list)


@dataclass
class CacheConfig:
    """`distill cache`. `cache_dir` null: inside the run's folder; top_k null: every class's logit."""

    name: str = "cache"
    seed: int = 0
    data: Any = MISSING
    teacher: Any = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)
    cache_dir: str | None = None
    split: str = "train"
    top_k: int | None = None
    dtype: str = "float32"
    shard_rows: int = 10_000
    threads: int | None = None


@dataclass
class SamplingConfig:
    """How a student of text is sampled beside its greedy answers; see `EvaluationConfig`."""

    num_samples: int = 0
    sampling_temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None


@dataclass
class ProblemsConfig:
    """What `distill traces` poses, and how its teacher writes.

    split, num_problems, problem_seed   as in `task.problems`; num_problems null: all that the task has. Of a release,
                     split may be all
    num_evaluation   validation and test problems that the filter `contamination` compares with; null: all
    trace_format     how the teacher lays its replies out; null: as its run folder says, else chain_then_answer
    tokenizer        characters, a folder or a hub id; null: the one in the teacher's folder, none for a server
    file             source=file: the traces to read; a row longer than max_characters is set aside. source=released:
                     the name of the release, see `research.tasks.released`
    """

    split: str = "train"
    num_problems: int | None = 1000
    problem_seed: int = 0
    num_evaluation: int | None = None
    trace_format: str | None = None
    tokenizer: str | None = None
    file: str | None = None
    max_characters: int = 1_000_000
    allow_empty_chain: bool = False


@dataclass
class WriterConfig:
    """The language model that writes: a run folder of `distill train`, or a Hugging Face folder."""

    path: str | None = None
    dtype: str = "float32"


@dataclass
class TracesConfig:
    """`distill traces`. `store` null: inside the run's folder. `corruption`: error channel -> share of the traces."""

    name: str = "traces"
    seed: int = 0
    source: str = "teacher"
    task: Any = MISSING
    template: Any = MISSING
    teacher: WriterConfig = field(default_factory=WriterConfig)
    generator: Any = MISSING
    data: ProblemsConfig = field(default_factory=ProblemsConfig)
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(num_samples=1, sampling_temperature=1.0, max_new_tokens=256)
    )
    filters: list[Any] = field(default_factory=list)
    corruption: dict[str, float] = field(default_factory=dict)
    store: str | None = None
    keep_dropped: bool = True
    block_problems: int = 256
    explorer: bool = True
    paths: PathsConfig = field(default_factory=PathsConfig)
    threads: int | None = None


@dataclass
class EvaluateConfig:
    """`distill evaluate run=FOLDER`. `data` overrides keys of the run's own data config.

    preflight  look at the run's student beside a teacher instead: `teacher`, else `reference`, else the run's own
    """

    name: str = "evaluate"
    seed: int = 0
    run: str | None = None
    split: str = "test"
    data: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    batch_size: int = 2000
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    preflight: bool = False
    preflight_problems: int = 32
    teacher: Any = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class ConvertConfig:
    """`distill convert`. `output` null: the folder `model` inside the run's folder."""

    name: str = "convert"
    source: str | None = None
    format: str = "llama2c"
    output: str | None = None
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class StudyConfig:
    """`distill study FOLDER`. `folder` may be a list of several; `preset` is one of the study's own; `overrides` go to
    every train run: a trial."""

    name: str = "study"
    folder: Any = None
    preset: str | None = None
    overrides: list[str] = field(default_factory=list)
    runs_dir: str | None = None
    report: bool = True
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class ReportConfig:
    """`distill report FOLDER`. `preset` reports that preset's own results."""

    name: str = "report"
    folder: str | None = None
    preset: str | None = None
    paths: PathsConfig = field(default_factory=PathsConfig)


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "cache": CacheConfig,
    "traces": TracesConfig,
    "evaluate": EvaluateConfig,
    "convert": ConvertConfig,
    "study": StudyConfig,
    "report": ReportConfig,
}


def register_schemas() -> None:
    """Make the schemas known to Hydra under `<command>_schema`."""
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=schema)


def check_root(cfg: DictConfig, command: str) -> None:
    """Raise ConfigError for a root key that is unknown, was deleted or holds no choice, and for values out of range.

    What a group holds is checked when it is built, by the signature of its target.
    """
    _check_node(cfg, SCHEMAS[command], "")
    if not _NAME.fullmatch(cfg.name):
        raise ConfigError(
            f"name is {cfg.name!r}; expected letters, digits and _ . + -, since it names the output folder"
        )
    if command == "train":
        _check_evaluation(cfg.evaluation)
        expect_one_of("preflight", cfg.preflight, PREFLIGHTS)
    if command in ("cache", "evaluate"):
        expect_one_of("split", cfg.split, SPLITS)
    if command == "convert":
        expect_one_of("format", cfg.format, MODEL_FORMATS)
    if command == "traces":
        expect_one_of("source", cfg.source, SOURCES)
        expect_one_of("data.split", cfg.data.split, (*SPLITS, "all") if cfg.source == "released" else SPLITS)
    for key in ("batch_size", "threads", "shard_rows", "block_problems", "checkpoint_steps", "preflight_problems"):
        _expect_positive(key, cfg.get(key))


def expect_one_of(key: str, given: str, valid: Iterable[str]) -> None:
    """Raise ConfigError naming the nearest where `given` is none of the valid words."""
    valid = list(valid)
    if given not in valid:
        raise ConfigError(f"{key} is {given!r}{nearest(given, valid)}. Valid: {', '.join(valid)}")


def not_chosen(key: str, given: str) -> str:
    """What to say of a plain text where a choice of the group of GROUP_OF stands."""
    group = GROUP_OF[key]
    choice = given if _NAME.fullmatch(given) else "NAME"
    return f"{key} is {given!r}, expected a {group}; write {group}@{key}={choice}"


def nearest(word: str, valid: Iterable[str], prefix: str = "") -> str:
    """ "; nearest valid: ..." where one of the valid words is close to the given one, else nothing."""
    valid = list(valid)
    begun = [name for name in valid if len(word) > 2 and (name.startswith(word) or word.startswith(name))]
    close = difflib.get_close_matches(word, valid, n=1) or begun
    return f"; nearest valid: {prefix}{close[0]}" if close else ""


def _check_node(node: DictConfig, schema: type, prefix: str) -> None:
    known = {item.name: item for item in dataclasses.fields(schema)}
    for key in node:
        if key not in known:
            near = nearest(str(key), known, prefix)
            raise ConfigError(f"unknown key {prefix}{key!s}{near}. Valid keys: {', '.join(known)}")
    for key, item in known.items():
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{prefix}{key} is not chosen; give one of its choices by name, see --help")
        if key not in node:
            raise ConfigError(f"the key {prefix}{key} was deleted, but is needed; leave out ~{prefix}{key}")
        if item.type is Any and key in GROUP_OF and isinstance(node[key], str):
            raise ConfigError(not_chosen(key, node[key]))
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            _check_node(node[key], item.type, f"{prefix}{key}.")


def _check_evaluation(evaluation: DictConfig) -> None:
    for split in evaluation.splits:
        expect_one_of("evaluation.splits", split, SPLITS)
    expect_one_of("evaluation.weights", evaluation.weights, WEIGHTS)
    _expect_positive("evaluation.batch_size", evaluation.batch_size)


def _expect_positive(key: str, given: int | None) -> None:
    if given is not None and given < 1:
        raise ConfigError(f"{key} is {given}; expected at least 1")
