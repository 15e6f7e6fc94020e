"""From a composed config of `distill traces` to its source, filters and settings."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from research.config import build_task, build_template, expect_kind, make, plain
from research.errors import ConfigError
from research.generation.base import AbstractGenerator
from research.records import Problem, Sampling
from research.schemas import expect_one_of
from research.tasks.arithmetic import ChainedSums
from research.tasks.base import AbstractTask, problems_for
from research.tasks.drawing import SPLITS
from research.tasks.grading import Grader
from research.tasks.released import RELEASED, read_released
from research.teachers.load import NETWORK_FOLDER, load_network
from research.text.codec import Codec
from research.text.formats import TRACE_FORMATS, layout_of
from research.text.tokenizer import build_tokenizer, tokenizer_sha256
from research.traces.corruptions import Corruption
from research.traces.files import FILES
from research.traces.filters import FilterChain, build_filters
from research.traces.importing import QUARANTINE_FILE, TraceImport
from research.traces.released import ReleasedSource
from research.traces.sources import AbstractSource, FileSource, ReferenceSource, TeacherSource

TRAINING = ("training_flops", "training_tokens", "training_seconds")
_SAMPLING = ("num_samples", "temperature", "top_p", "max_new_tokens")


@dataclass
class Parts:
    """What one trace run is made of; what a source does not need is None."""

    source: AbstractSource
    filters: FilterChain
    codec: Codec | None
    task: AbstractTask | None
    problems: list[Problem]
    teacher: dict[str, Any] | None
    settings: dict[str, Any]


def build_parts(cfg: DictConfig, folder: Path) -> Parts:
    """Source, filters and settings of a trace config. Raises ConfigError where they do not go together."""
    task = build_task(cfg)
    corruption = _corruption(cfg, task)
    if cfg.source == "file":
        return _from_file(cfg, task, folder)
    if cfg.source == "released":
        return _from_release(cfg, task)
    if task is None:
        raise ConfigError(f"source={cfg.source} needs a task, whose problems are solved; give one, such as task=sum5")
    known = _known_of_teacher(cfg)
    trace_format = cfg.data.trace_format or known.get("trace_format") or "chain_then_answer"
    expect_one_of("data.trace_format", trace_format, TRACE_FORMATS)
    codec = _codec(cfg, task, trace_format, known)
    template = _template(cfg, known, codec)
    grader = Grader(task, template, layout_of(trace_format))
    asked = cfg.data
    problems = problems_for("data.num_problems", task, asked.split, asked.num_problems, asked.problem_seed)
    options: dict[str, Any] = {"codec": codec, "corruption": corruption, "block_problems": cfg.block_problems}
    teacher: dict[str, Any] | None = None
    sampling: Sampling | None = None
    source: AbstractSource
    if cfg.source == "reference":
        source = ReferenceSource(problems, grader, **options)
    else:
        sampling = _sampling(cfg)
        generator, training = _generator(cfg, codec)
        teacher = {**generator.identity, "source": cfg.teacher.path, **training}
        source = TeacherSource(problems, generator, grader, sampling, **options)
    filters = _filters(cfg, task, source)
    settings = {
        **_common_settings(cfg),
        "task": {**plain(cfg.task), "name": task.name},
        "split": cfg.data.split,
        "num_problems": len(problems),
        "problems_sha256": _problems_sha256(problems),
        "teacher": _compared(teacher),
        "template": _template_node(cfg, known),
        "trace_format": trace_format,
        "tokenizer": None if codec is None else tokenizer_sha256(codec.tokenizer),
        "sampling": None if sampling is None else {name: getattr(sampling, name) for name in _SAMPLING},
        "corruption": plain(cfg)["corruption"],
    }
    return Parts(source, filters, codec, task, problems, teacher, settings)


def _from_file(cfg: DictConfig, task: AbstractTask | None, folder: Path) -> Parts:
    if not cfg.data.file:
        raise ConfigError(f"source=file needs data.file, a file of traces ({', '.join(FILES)})")
    path = Path(cfg.data.file)
    rows = TraceImport(
        path,
        folder / QUARANTINE_FILE,
        max_characters=cfg.data.max_characters,
        allow_empty_chain=cfg.data.allow_empty_chain,
    )
    kind = cfg.data.tokenizer
    if kind == "characters":
        raise ConfigError("data.tokenizer is characters, but a file has open text; give a pretrained folder, or null")
    node = plain(cfg.template)
    codec = None
    if kind is not None and node.get("_target_"):
        tokenizer = build_tokenizer(kind)
        codec = Codec(tokenizer, _made_template(cfg, tokenizer), allow_empty_chain=True)
    source = FileSource(rows, codec=codec)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    settings = {
        **_common_settings(cfg),
        "file": {"name": path.name, "sha256": sha256},
        "max_characters": cfg.data.max_characters,
        "allow_empty_chain": cfg.data.allow_empty_chain,
        "tokenizer": None if codec is None else tokenizer_sha256(codec.tokenizer),
        "template": node if codec is not None else None,
    }
    return Parts(source, _filters(cfg, task, source), codec, task, [], None, settings)


def _from_release(cfg: DictConfig, task: AbstractTask | None) -> Parts:
    if not cfg.data.file or task is not None:
        raise ConfigError(
            f"source=released needs data.file, the name of a release ({', '.join(RELEASED)}), "
            "and no task: it has its own"
        )
    released = read_released(cfg.data.file)
    splits = SPLITS if cfg.data.split == "all" else (cfg.data.split,)
    source = ReleasedSource(released, splits, block_rows=cfg.block_problems)
    settings = {
        **_common_settings(cfg),
        "released": cfg.data.file,
        "split": cfg.data.split,
        "problems_sha256": _problems_sha256(source.problems),
    }
    return Parts(source, _filters(cfg, released.task, source), None, released.task, source.problems, None, settings)


def _common_settings(cfg: DictConfig) -> dict[str, Any]:
    nodes = plain(cfg)["filters"]
    return {
        "source": cfg.source,
        "seed": cfg.seed,
        "filters": list(nodes),
        "num_evaluation": cfg.data.num_evaluation,
        "keep_dropped": cfg.keep_dropped,
        "block_problems": cfg.block_problems,
    }


def _compared(teacher: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What must stay the same of a teacher: the place it is found at, and what it once cost, may change."""
    if teacher is None:
        return None
    moving = ("base_url", "source", *TRAINING)
    return {name: value for name, value in teacher.items() if name not in moving}


def _filters(cfg: DictConfig, task: AbstractTask | None, source: AbstractSource) -> FilterChain:
    nodes = plain(cfg)["filters"]
    names = [node.get("name") if isinstance(node, Mapping) else node for node in nodes]
    texts: list[str] | None = None
    if "contamination" in names and task is not None:
        texts = [
            problem.text
            for split in ("val", "test")
            if split != cfg.data.split
            for problem in problems_for(
                "data.num_evaluation", task, split, cfg.data.num_evaluation, cfg.data.problem_seed
            )
        ]
    return build_filters(nodes, available=source.gives, evaluation_texts=texts)


def _corruption(cfg: DictConfig, task: AbstractTask | None) -> Corruption | None:
    if not cfg.corruption:
        return None
    if cfg.source in ("file", "released") or not isinstance(task, ChainedSums):
        raise ConfigError("corruption spoils the running totals of chained sums; give task=sum5, or no corruption")
    return Corruption({str(name): rate for name, rate in cfg.corruption.items()}, seed=cfg.seed)


def _sampling(cfg: DictConfig) -> Sampling:
    given = cfg.sampling
    if given.max_new_tokens is None:
        raise ConfigError("sampling.max_new_tokens is null; give the length limit of a completion")
    return Sampling(given.num_samples, given.sampling_temperature, given.top_p, given.max_new_tokens, cfg.seed)


def _known_of_teacher(cfg: DictConfig) -> dict[str, Any]:
    """Template and trace format that the teacher's own run was trained with; nothing for other folders."""
    if cfg.source != "teacher" or not cfg.teacher.path:
        return {}
    path = Path(cfg.teacher.path)
    if not path.exists():
        raise ConfigError(
            f"teacher.path is {path}, which does not exist; "
            "give the folder of a finished run or of a Hugging Face model"
        )
    record = next((place for place in (path / "run.json", path.parent / "run.json") if place.is_file()), None)
    try:
        config = {} if record is None else json.loads(record.read_text())["config"]
        data = config.get("data") or {}
        return {"template": config.get("template"), "trace_format": data.get("trace_format")}
    except (ValueError, KeyError, AttributeError):
        return {}


def _template_node(cfg: DictConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """The template to write with: the config's, or that of the teacher's run; never two different ones."""
    given, trained = plain(cfg.template), dict(known.get("template") or {})
    if not given.get("_target_"):
        given = trained
    if not given.get("_target_"):
        raise ConfigError("template is not chosen; give the one that the traces are written in, such as template=plain")
    if trained.get("_target_") and given != trained:
        raise ConfigError(
            f"template is {given}, but the teacher in {cfg.teacher.path} was trained with {trained}; "
            "leave template out: the teacher's own is taken"
        )
    return given


def _made_template(cfg: DictConfig, tokenizer: Any, node: Mapping[str, Any] | None = None) -> Any:
    template = build_template(cfg) if node is None else make(dict(node), "template")
    return template(tokenizer=tokenizer) if isinstance(template, partial) else template


def _template(cfg: DictConfig, known: Mapping[str, Any], codec: Codec | None) -> Any:
    if codec is not None:
        return codec.template
    template = make(_template_node(cfg, known), "template")
    if isinstance(template, partial):
        raise ConfigError("this template is the tokenizer's own; give data.tokenizer, a folder or a hub id")
    return template


def _codec(cfg: DictConfig, task: AbstractTask, trace_format: str, known: Mapping[str, Any]) -> Codec | None:
    """The teacher's codec, its tokenizer from its folder; None where text is sent to a server or needs no tokens."""
    kind = cfg.data.tokenizer or _tokenizer_folder(cfg)
    if kind is None:
        return None
    node = _template_node(cfg, known)
    if kind == "characters":
        if task.alphabet is None:
            raise ConfigError(f"data.tokenizer is characters, but {task.name} has open text; give a pretrained folder")
        written = getattr(make(node, "template"), "alphabet", "")
        tokenizer = build_tokenizer(kind, alphabet="".join(sorted({*task.alphabet, *written})))
    else:
        tokenizer = build_tokenizer(kind)
    return Codec(tokenizer, _made_template(cfg, tokenizer, node), trace_format=trace_format, max_tokens=2**20)


def stored_codec(settings: Mapping[str, Any], tokenizer_folder: Path) -> Codec | None:
    """The codec that a store was written with; None for one without tokens."""
    if not tokenizer_folder.is_dir() or not settings.get("template"):
        return None
    tokenizer = build_tokenizer(str(tokenizer_folder))
    template = make(dict(settings["template"]), "template")
    template = template(tokenizer=tokenizer) if isinstance(template, partial) else template
    return Codec(
        tokenizer,
        template,
        trace_format=settings.get("trace_format") or "chain_then_answer",
        max_tokens=2**20,
        allow_empty_chain=True,
    )


def _tokenizer_folder(cfg: DictConfig) -> str | None:
    """The folder that holds the teacher's tokenizer; None for a teacher that is not in a folder."""
    if cfg.source != "teacher" or not cfg.teacher.path:
        return None
    path = Path(cfg.teacher.path)
    inside = path / NETWORK_FOLDER
    return str(inside if inside.is_dir() else path)


def _generator(cfg: DictConfig, codec: Codec | None) -> tuple[AbstractGenerator, dict[str, float | None]]:
    """The generator, and what its teacher's training took: TRAINING -> number, None where it is not known."""
    node = plain(cfg.generator)
    if str(node.get("_target_", "")).endswith(".LocalGenerator"):
        if not cfg.teacher.path or codec is None:
            raise ConfigError(
                "teacher.path is not set; give the folder of a finished run or of a Hugging Face model, "
                "or generator=server, or source=reference for the task's own solutions"
            )
        loaded = load_network(cfg.teacher.path, dtype=cfg.teacher.dtype, **codec.facts())
        made = make(node, "generator", network=loaded.network, tokenizer=codec)
        return expect_kind(made, "generator", AbstractGenerator), {name: getattr(loaded, name) for name in TRAINING}
    if cfg.teacher.path:
        raise ConfigError("teacher.path is a model of this process; leave it out with generator=server")
    return expect_kind(make(node, "generator"), "generator", AbstractGenerator), dict.fromkeys(TRAINING)


def _problems_sha256(problems: list[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.index}\x1f{problem.text}\x1f{problem.answer}\x1e".encode())
    return digest.hexdigest()
