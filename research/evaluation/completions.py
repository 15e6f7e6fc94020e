"""From problems to graded completions, and the tables that keep them so that every verdict can be given again."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from research.generation.base import AbstractGenerator, Prompt
from research.metrics.sequences import majority
from research.records import Completion, Problem, Sampling, Verdict
from research.results.items import read_items
from research.results.record import write_atomic
from research.tasks.answers import unboxed
from research.tasks.grading import Grade, Grader
from research.text.refusals import Refused, refuse_overlong
from research.text.template import AbstractTemplate

log = logging.getLogger(__name__)
NOT_KNOWN = -1  # in a column of whole numbers: not checked, not counted, not given
_VOTELESS = (Verdict.UNPARSED, Verdict.TRUNCATED)
_SHORT_MARK = 3  # characters; a shorter prompt mark says something only beside a reference that avoids it

Columns = dict[str, np.ndarray]


class PromptCodec(Protocol):
    """What is needed of ``research.text.codec.Codec`` to write prompts."""

    @property
    def layout(self) -> str: ...

    def prompt_ids(self, problem_text: str, /) -> list[int]: ...


@dataclass(frozen=True)
class Scored:
    """One completion with its grade; ``regurgitates`` as in :func:`regurgitates`."""

    problem: Problem
    sample: int
    completion: Completion
    grade: Grade
    regurgitates: bool

    @property
    def num_tokens(self) -> int:
        """Generated tokens, EOS included; NOT_KNOWN where a server gave text alone."""
        return len(self.completion.ids) or NOT_KNOWN

    @property
    def vote(self) -> str | None:
        """The answer as it counts in a majority, its last box where it has one; None where it was unread or cut off."""
        answer = self.grade.answer
        return None if answer is None or self.grade.verdict in _VOTELESS else unboxed(answer)


def readable(grader: Grader, problems: Sequence[Problem]) -> tuple[list[Problem], tuple[int, ...]]:
    """The problems whose gold answer the task itself calls CORRECT, and the indices of the others.

    A gold answer that cannot be read can reward nothing: such problems are refused, and their number is reported.
    Raises ValueError where there is no problem, none is left, or two share an index.
    """
    indices = [problem.index for problem in problems]
    for index, count in Counter(indices).most_common(1):
        if count > 1:
            raise ValueError(f"the index {index} stands for {count} problems; expected one each")
    kept = [problem for problem in problems if grader.task.is_readable(problem)]
    kept_indices = {problem.index for problem in kept}
    refused = tuple(index for index in indices if index not in kept_indices)
    if not kept:
        shown = [problem.answer for problem in problems[:3]]
        raise ValueError(
            f"no problem to score: of {len(problems)} given, the gold answers of {len(refused)} cannot be read by task "
            f"{grader.task.name!r} (the first are {shown}); look at the split, or choose the task they belong to"
        )
    return kept, refused


def write_completions(
    generator: AbstractGenerator,
    codec: PromptCodec | None,
    template: AbstractTemplate,
    texts: Mapping[int, str],
    sampling: Sampling,
) -> dict[int, tuple[Completion, ...]]:
    """Index -> its completions, for problem texts by index; ``codec`` None for a generator that needs no token ids.

    A prompt that the codec refuses, or that leaves the generator no room for an answer, is not asked. Its completions
    have no text, and ``stop`` is the reason; how many there are of each reason is told in a warning.

    Raises ValueError where the generator leaves a prompt out, answers one twice or one that was not asked, or gives
    other than ``sampling.num_samples`` completions.
    """
    prompts: list[Prompt] = []
    written: dict[int, tuple[Completion, ...]] = {}
    refused = Counter[str]()
    for index, text in texts.items():
        try:
            ids = () if codec is None else tuple(codec.prompt_ids(text))
            refuse_overlong(f"problem {index}", len(ids), generator.longest_prompt)
        except Refused as error:
            refused[error.reason] += 1
            written[index] = (Completion.refused(error.reason),) * sampling.num_samples
            continue
        prompts.append(Prompt(index, template.prompt(text), ids))
    if refused:
        told = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
        log.warning("%s of %s prompts cannot be asked (%s); they have no answer", refused.total(), len(texts), told)
    for answer in generator.generate(prompts, sampling) if prompts else ():
        if answer.index not in texts or answer.index in written:
            raise ValueError(f"the generator answered prompt {answer.index} unasked or twice; expected each once")
        if len(answer.completions) != sampling.num_samples:
            raise ValueError(
                f"the generator gave {len(answer.completions)} completions for prompt {answer.index}; expected "
                f"num_samples={sampling.num_samples}"
            )
        written[answer.index] = answer.completions
    missing = [index for index in texts if index not in written]
    if missing:
        raise ValueError(f"the generator left out {len(missing)} of {len(texts)} prompts, index {missing[:10]}")
    return written


def score(grader: Grader, problem: Problem, completions: Iterable[Completion]) -> list[Scored]:
    """Every completion of a problem, graded."""
    return [
        Scored(problem, sample, completion, grader.grade(problem, completion), marked)
        for sample, completion in enumerate(completions)
        for marked in (regurgitates(grader.template, problem, completion.text),)
    ]


def regurgitates(template: AbstractTemplate, problem: Problem, text: str) -> bool:
    """Whether a completion repeats its problem's text, or opens a prompt of its own (the template's text around one).

    What the reference solution contains too is no sign of either, nor, without a reference chain to compare with, is a
    mark of one or two characters such as ``=``.
    """
    layout = "chain_then_answer" if problem.chain.strip() else "answer_only"
    reference = template.completion(problem.chain, problem.answer, layout)
    head, found, tail = template.prompt(problem.text).partition(problem.text)
    marks = [problem.text.strip(), *((head.strip(), tail.strip()) if found else ())]
    return any(
        mark in text and mark not in reference
        for mark in marks
        if mark and (problem.chain.strip() or len(mark) >= _SHORT_MARK)
    )


def item_columns(answered: Sequence[Scored]) -> Columns:
    """One row per problem, from its one completion; ``wrong`` is ``prediction != label``.

    label 1; prediction 1 where CORRECT; verdict, stop, outcome texts; answer "" where none was read; gold; completion
    the text as written; tokens, chain_valid (0 or 1), num_steps, num_valid, level NOT_KNOWN where not known.
    """
    steps = [scored.grade.steps for scored in answered]
    return {
        "index": _whole(scored.problem.index for scored in answered),
        "label": np.ones(len(answered), np.int64),
        "prediction": _whole(scored.grade.correct for scored in answered),
        "verdict": _texts(scored.grade.verdict.value for scored in answered),
        "answer": _texts(scored.grade.answer or "" for scored in answered),
        "gold": _texts(scored.problem.answer for scored in answered),
        "completion": _texts(scored.completion.text for scored in answered),
        "tokens": _whole(scored.num_tokens for scored in answered),
        "stop": _texts(scored.completion.stop for scored in answered),
        "chain_valid": _whole(NOT_KNOWN if report is None else report.valid for report in steps),
        "num_steps": _whole(NOT_KNOWN if report is None else report.num_steps for report in steps),
        "num_valid": _whole(NOT_KNOWN if report is None else report.num_valid for report in steps),
        "outcome": _texts(scored.grade.outcome for scored in answered),
        "level": _levels(scored.problem for scored in answered),
    }


def voted_columns(answered: Sequence[Sequence[Scored]]) -> Columns:
    """One row per problem, from its samples: label 1; prediction 1 where the majority's answer is CORRECT.

    num_samples, num_right; answer the majority's, "" where no sample has one; gold; level.
    """
    winners = [majority([scored.vote for scored in samples]) for samples in answered]
    won = [None if place is None else samples[place] for place, samples in zip(winners, answered, strict=True)]
    problems = [samples[0].problem for samples in answered]
    return {
        "index": _whole(problem.index for problem in problems),
        "label": np.ones(len(problems), np.int64),
        "prediction": _whole(winner is not None and winner.grade.correct for winner in won),
        "num_samples": _whole(len(samples) for samples in answered),
        "num_right": _whole(sum(scored.grade.correct for scored in samples) for samples in answered),
        "answer": _texts("" if winner is None else winner.vote or "" for winner in won),
        "gold": _texts(problem.answer for problem in problems),
        "level": _levels(problems),
    }


def sample_columns(answered: Sequence[Sequence[Scored]]) -> Columns:
    """One row per completion: index, sample, and of :func:`item_columns` what belongs to a completion."""
    rows = [scored for samples in answered for scored in samples]
    columns = item_columns(rows)
    kept = ("verdict", "answer", "completion", "tokens", "stop", "chain_valid", "num_steps", "num_valid", "outcome")
    sample_N = _whole(scored.sample for scored in rows)
    return {"index": columns["index"], "sample": sample_N, **{name: columns[name] for name in kept}}


def regrade(grader: Grader, problems: Iterable[Problem], columns: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts of a table's completions, given again from ``index``, ``completion`` and ``stop`` alone.

    Raises ValueError where a row belongs to none of ``problems``.
    """
    by_index = {problem.index: problem for problem in problems}
    verdicts = []
    for index, text, stop in zip(columns["index"], columns["completion"], columns["stop"], strict=True):
        if int(index) not in by_index:
            raise ValueError(f"no problem has the index {index}; give the problems that the table was made from")
        verdicts.append(grader.grade(by_index[int(index)], Completion((), str(text), str(stop))).verdict)
    return verdicts


def write_samples(path: str | Path, columns: Mapping[str, np.ndarray], sampling: Sampling) -> Path:
    """Writes a table of completions as zstd parquet, with the sampling they were drawn by in the file's metadata."""
    import pyarrow
    from pyarrow import parquet

    path = Path(path)
    table = pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()})
    sink = pyarrow.BufferOutputStream()
    metadata = {"sampling": json.dumps(asdict(sampling), sort_keys=True)}
    parquet.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sink.getvalue().to_pybytes())
    return path


def read_samples(path: str | Path) -> tuple[Columns, Sampling]:
    """What :func:`write_samples` wrote; raises ValueError where the file does not say how it was sampled."""
    from pyarrow import parquet

    columns = read_items(path)
    stored = (parquet.read_schema(path).metadata or {}).get(b"sampling")
    if stored is None:
        raise ValueError(f"{path}: no sampling in its metadata; expected a table of `write_samples`")
    return columns, replace(Sampling(), **json.loads(stored))


def _whole(values: Iterable[int]) -> np.ndarray:
    return np.fromiter((int(value) for value in values), dtype=np.int64)


def _texts(values: Iterable[str]) -> np.ndarray:
    """Objects, not fixed-width text; half a surrogate pair, which a server may send and no file can hold, becomes ?."""
    return np.array([value.encode("utf-8", "replace").decode("utf-8") for value in values], dtype=object)


def _levels(problems: Iterable[Problem]) -> np.ndarray:
    return _whole(NOT_KNOWN if problem.level is None else problem.level for problem in problems)
