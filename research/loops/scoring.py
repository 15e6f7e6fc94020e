"""What a finished student scores: the evaluator that fits its data, on every split and variant of the config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from research.data.base import AbstractClassData
from research.data.traces import TraceData
from research.errors import ConfigError
from research.evaluation.bias import evaluate_with_bias
from research.evaluation.completions import Columns, write_samples
from research.evaluation.evaluate import evaluate
from research.evaluation.exposure import measure_exposure
from research.evaluation.sequences import SAMPLED_ITEM_COLUMNS, SequenceEvaluation, evaluate_sequences, is_sampled
from research.evaluation.token_loss import evaluate_tokens
from research.generation.in_process import LocalGenerator
from research.records import Sampling
from research.results.items import write_items
from research.seeding import seed_for
from research.tasks.base import Split
from research.tasks.grading import Grader
from research.teachers.base import AbstractTeacher
from research.teachers.frozen import FrozenTeacher

DataModule = AbstractClassData | TraceData


@dataclass
class Scores:
    """Metrics ``split/name``; artifacts ``items/split`` -> file in the run folder; omitted ``split/name`` -> why."""

    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    items: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def add(self, other: "Scores") -> None:
        """Take in what was measured beside."""
        self.metrics |= other.metrics
        self.artifacts |= other.artifacts
        self.omitted |= other.omitted
        self.items |= other.items


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
            scores.metrics |= result.metrics | obedience(result, source.modes.asked)
            scores.omitted |= result.omitted
            if is_sampled(sampling):
                path = write_samples(run_dir / f"samples_{name}.parquet", result.samples, sampling)
                scores.artifacts[f"samples/{name}"] = path.name
                items |= {column: result.items[column] for column in SAMPLED_ITEM_COLUMNS}
            else:
                items = dict(result.items)
        scores.artifacts[f"items/{name}"] = write_items(run_dir / f"items_{name}.parquet", items).name
    for name, source, split in scored:
        if (source is data or _in_other_mode(data, source)) and source.documents(split):
            scores.metrics |= evaluate_tokens(student, source.scoring_loader(split), split=name).metrics
    return scores


def _in_other_mode(data: TraceData, source: TraceData) -> bool:
    """Whether a variant's documents are the student's own tokens, asked for in a mode."""
    return source.modes.asked is not None and source.facts() == data.facts()


def obedience(evaluation: SequenceEvaluation, mode: str | None) -> dict[str, float]:
    """``split/obedience``: share of completions written in the mode that was asked for, right or wrong.

    With a chain where the mode is think, without any where it is no_think. ``sampled_obedience`` of samples; nothing
    where no mode was asked for.
    """
    if mode is None:
        return {}
    start = f"{evaluation.split}/{'sampled_' if is_sampled(evaluation.sampling) else ''}"
    without_chain = evaluation.metrics[f"{start}outcome_no_chain"]
    return {f"{start}obedience": without_chain if mode == "no_think" else 1.0 - without_chain}


def score_exposure(
    student: nn.Module,
    teacher: AbstractTeacher | None,
    data: TraceData,
    options: Mapping[str, Any],
    run_dir: Path,
    seed: int,
) -> Scores:
    """How far the student is from its live teacher on either one's prefixes, on the test problems.

    Raises ConfigError where there is no live language model to compare with.
    """
    if not isinstance(teacher, FrozenTeacher) or not teacher.is_language_model:
        raise ConfigError(
            "evaluation.exposure compares the student with its teacher's own writing; give teacher=frozen or "
            "teacher@reference=frozen"
        )
    codec = data.codec
    device = next(student.parameters()).device
    exposure = measure_exposure(
        student,
        teacher.to(device).network,
        codec,
        data.teacher_codec,
        Grader(data.task, codec.template, codec.layout),
        data.problems("test"),
        max_new_tokens=options["max_new_tokens"] or data.max_tokens,
        seed=seed_for(seed, "exposure"),
        split="test",
    )
    path = write_samples(run_dir / "exposure_test.parquet", exposure.places, exposure.sampling)
    return Scores(exposure.metrics, {"exposure/test": path.name})


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
    """One pass of the generator over a split's problems, graded by the task's own verifier.

    They are posed in the mode that ``source`` asks for.
    """
    codec = data.codec.marked(source.modes.mark(data.codec.template))
    generator = LocalGenerator(student, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
    grader = Grader(source.task, codec.template, codec.layout)
    return evaluate_sequences(generator, codec, grader, source.problems(split), sampling, split=name)
