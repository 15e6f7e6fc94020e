"""What a finished student scores: the evaluator that fits its data, on every split and variant of the config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from research.data.base import AbstractClassData
from research.data.traces import TraceData
from research.evaluation.bias import evaluate_with_bias
from research.evaluation.completions import Columns, write_samples
from research.evaluation.evaluate import evaluate
from research.evaluation.sequences import SAMPLED_ITEM_COLUMNS, SequenceEvaluation, evaluate_sequences, is_sampled
from research.evaluation.token_loss import evaluate_tokens
from research.generation.in_process import LocalGenerator
from research.records import Sampling
from research.results.items import write_items
from research.tasks.base import Split
from research.tasks.grading import Grader
from research.teachers.base import AbstractTeacher

DataModule = AbstractClassData | TraceData


@dataclass
class Scores:
    """Metrics ``split/name``; artifacts ``items/split`` -> file in the run folder; omitted ``split/name`` -> why."""

    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    items: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def score_classes(
    student: nn.Module,
    data: AbstractClassData,
    variants: Mapping[str, Any],
    options: Mapping[str, Any],
    run_dir: Path,
    reference: AbstractTeacher | None,
    temperature: float,
) -> Scores:
    """Every classification metric of the student, beside a reference network where there is one."""
    scores = Scores()
    scored = [(split, data, split) for split in options["splits"]]
    scored += [(f"test_{name}", other, "test") for name, other in variants.items()]
    for name, source, split in scored:
        result = class_scores(student, source, split, options["batch_size"], reference, temperature, name)
        scores.metrics |= result.metrics
        path = write_items(run_dir / f"items_{name}.parquet", result.items[name])
        scores.artifacts[f"items/{name}"] = path.name
    if options["bias_classes"]:
        scores.metrics |= evaluate_with_bias(student, data, reference, options["bias_classes"], options["batch_size"])
    return scores


def class_scores(
    student: nn.Module,
    data: AbstractClassData,
    split: Split,
    batch_size: int,
    reference: AbstractTeacher | None,
    temperature: float,
    name: str | None = None,
) -> Scores:
    """The same on one split, under a name of its own where it has one; nothing is written."""
    result = evaluate(
        student,
        data.loader(split, batch_size=batch_size),
        split=name or split,
        num_classes=data.num_classes,
        teacher=reference,
        temperature=temperature,
    )
    return Scores(result.metrics, omitted=result.omitted, items={name or split: result.items})


def score_text(
    student: nn.Module,
    data: TraceData,
    variants: Mapping[str, Any],
    options: Mapping[str, Any],
    run_dir: Path,
    seed: int,
) -> Scores:
    """What the student writes to the problems of each split, greedily and, where asked, sampled; and its token loss.

    A variant's problems are posed through the student's own codec: another task or other levels, the same language.
    The items are those of the greedy answers; where problems are sampled too, each with its SAMPLED_ITEM_COLUMNS.
    """
    scores = Scores()
    scored: list[tuple[str, TraceData, Split]] = [(split, data, split) for split in options["splits"]]
    scored += [(f"test_{name}", other, "test") for name, other in variants.items()]
    for name, source, split in scored:
        items: Columns = {}
        for sampling in samplings(options, data, seed):
            result = write_and_grade(student, data, source, split, sampling, name)
            scores.metrics |= result.metrics
            scores.omitted |= result.omitted
            if is_sampled(sampling):
                path = write_samples(run_dir / f"samples_{name}.parquet", result.samples, sampling)
                scores.artifacts[f"samples/{name}"] = path.name
                items |= {column: result.items[column] for column in SAMPLED_ITEM_COLUMNS}
            else:
                items = dict(result.items)
        scores.artifacts[f"items/{name}"] = write_items(run_dir / f"items_{name}.parquet", items).name
    for name, source, split in scored:
        if source is data and data.documents(split):
            scores.metrics |= evaluate_tokens(student, data.loader(split, batch_size=256), split=name).metrics
    return scores


def samplings(options: Mapping[str, Any], data: TraceData, seed: int) -> list[Sampling]:
    """The greedy sampling, and the one that the config asks for beside it."""
    limit = options["max_new_tokens"] or data.max_tokens
    greedy = Sampling(max_new_tokens=limit)
    if not options["num_samples"]:
        return [greedy]
    drawn = Sampling(options["num_samples"], options["sampling_temperature"], options["top_p"], limit, seed)
    return [greedy, drawn]


def write_and_grade(
    student: nn.Module, data: TraceData, source: TraceData, split: Split, sampling: Sampling, name: str
) -> SequenceEvaluation:
    """One pass of the generator over a split's problems, graded by the task's own verifier."""
    codec = data.codec
    generator = LocalGenerator(student, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
    grader = Grader(source.task, codec.template, codec.layout)
    return evaluate_sequences(generator, codec, grader, source.problems(split), sampling, split=name)
