"""The strict root of every command's config: keys outside these fields are refused. Imports no torch.

A group (data, student, teacher, ...) is an open node here; its keys are checked against the signature of its
`_target_` when it is built, and against the group's file when they come from the command line.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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
    """

    splits: list[str] = field(default_factory=lambda: ["test"])
    variants: Any = None
    bias_classes: list[int] = field(default_factory=list)
    weights: str = "last"
    batch_size: int = 2000


@dataclass
class TrainConfig:
    """`distill train`. `name` names the output folder; `ckpt_path` is a file, or `last` for this folder's own."""

    name: str = "train"
    seed: int = 0
    data: Any = MISSING
    student: Any = MISSING
    teacher: Any = MISSING
    reference: Any = MISSING
    signal_transform: Any = MISSING
    method: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ckpt_path: str | None = None
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
class EvaluateConfig:
    """`distill evaluate run=FOLDER`. `data` overrides keys of the run's own data config."""

    name: str = "evaluate"
    run: str | None = None
    split: str = "test"
    data: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    batch_size: int = 2000
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class StudyConfig:
    """`distill study FOLDER`. `preset` is one of the study's own; `overrides` go to every cell, for trying out."""

    name: str = "study"
    folder: str | None = None
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
    "evaluate": EvaluateConfig,
    "study": StudyConfig,
    "report": ReportConfig,
}


def register_schemas() -> None:
    """Make the schemas known to Hydra under `<command>_schema`."""
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=schema)
