"""The evaluator of written answers: a student writes, the one grader judges, and the numbers keep their sampling."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from research.evaluation.completions import (
    Columns,
    PromptCodec,
    Scored,
    item_columns,
    readable,
    sample_columns,
    score,
    voted_columns,
    write_completions,
)
from research.generation.base import AbstractGenerator
from research.metrics.sequences import consensus_at_k, has_loop, pass_at_k
from research.records import Problem, Sampling, Verdict
from research.tasks.grading import OUTCOMES, Grader

# The frozen surface. What each name means stands in the docstring of :func:`evaluate_sequences`.
ANSWER_NAMES = (
    "problems", "gold_unreadable", "unparsed", "truncated", "timeout", "repetition", "tokens_per_answer",
    "regurgitation",
)  # fmt: skip
CHAIN_NAMES = (
    "step_validity", "chain_valid", "process_valid_pass_at_1", "invalid_given_right", "chain_answer_agreement",
)  # fmt: skip
OUTCOME_NAMES = tuple(f"outcome_{outcome}" for outcome in OUTCOMES)
GREEDY_NAMES = ("accuracy", "errors", *ANSWER_NAMES, *CHAIN_NAMES, *OUTCOME_NAMES)
SAMPLED_NAMES = ("sampled_pass_at_1", *(f"sampled_{name}" for name in (*ANSWER_NAMES, *CHAIN_NAMES, *OUTCOME_NAMES)))
SEQUENCE_ITEM_COLUMNS = (
    "index", "label", "prediction", "verdict", "answer", "gold", "completion", "tokens", "stop", "chain_valid",
    "num_steps", "num_valid", "outcome", "level",
)  # fmt: skip
VOTED_ITEM_COLUMNS = ("index", "label", "prediction", "num_samples", "num_right", "answer", "gold", "level")
SAMPLED_ITEM_COLUMNS = ("num_samples", "num_right")  # beside a greedy answer: pass@k follows from them
SAMPLE_COLUMNS = (
    "index", "sample", "verdict", "answer", "completion", "tokens", "stop", "chain_valid", "num_steps", "num_valid",
    "outcome",
)  # fmt: skip


@dataclass(frozen=True)
class SequenceEvaluation:
    """The numbers of one writer on one split under one sampling.

    metrics    ``split/name`` -> value; never NaN
    items      SEQUENCE_ITEM_COLUMNS -> array, one row per scored problem in ascending index; sampled:
               VOTED_ITEM_COLUMNS
    samples    SAMPLE_COLUMNS -> array, one row per completion
    sampling   how the completions were drawn
    refused    indices of the problems that were not scored: their gold answer cannot be read
    omitted    ``split/name`` -> why that metric does not exist here
    generation_s, grading_s    seconds of wall time
    """

    split: str
    metrics: dict[str, float]
    items: Columns
    samples: Columns
    sampling: Sampling
    refused: tuple[int, ...] = ()
    omitted: dict[str, str] = field(default_factory=dict)
    generation_s: float = 0.0
    grading_s: float = 0.0


def is_sampled(sampling: Sampling) -> bool:
    """Whether scores under this sampling are ``sampled_``: more than one completion, or not the most likely one."""
    return sampling.num_samples > 1 or sampling.temperature > 0


def sample_counts(num_samples: int) -> list[int]:
    """The k of ``sampled_pass_at_<k>``: powers of two up to ``num_samples``, and that number itself."""
    return sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})


def sequence_metric_names(
    sampling: Sampling, levels: Iterable[int] = (), refusals: Iterable[str] = ()
) -> tuple[str, ...]:
    """Every name that a metric can have under ``sampling``, without the split, for problems of these levels.

    refusals  the reasons for which prompts were refused
    """
    start = "sampled_" if is_sampled(sampling) else ""
    by_reason = tuple(f"{start}refused_prompts_{reason}" for reason in sorted(set(refusals)))
    if not is_sampled(sampling):
        by_level = (f"{name}_level_{level}" for level in sorted(set(levels)) for name in ("accuracy", "problems"))
        return (*GREEDY_NAMES, *by_level, *by_reason)
    passes = (f"sampled_pass_at_{k}" for k in sample_counts(sampling.num_samples) if k > 1)
    votes = (f"sampled_cons_at_{k}" for k in sample_counts(sampling.num_samples) if k > 1)
    by_level = (f"sampled_{name}_level_{level}" for level in sorted(set(levels)) for name in ("pass_at_1", "problems"))
    return (*SAMPLED_NAMES, *passes, *votes, *by_level, *by_reason)


def evaluate_sequences(
    generator: AbstractGenerator,
    codec: PromptCodec | None,
    grader: Grader,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    split: str,
) -> SequenceEvaluation:
    """What ``generator`` writes for ``problems``, judged by ``grader``; float64, means over problems unless said.

    With ``num_samples`` 1 and temperature 0 (greedy):

    accuracy, errors       share of problems answered right (pass@1); number of the others, whatever the reason
    problems, gold_unreadable   problems scored; problems refused for an unreadable gold answer: in no other number
    unparsed, truncated, timeout   shares with that verdict; with accuracy and the wrong answers they add up to 1
    refused_prompts_<reason>   where there are any: of the problems, those that could not be asked (``too_long``,
                           ``unknown_character``, ...). They are unparsed and not right
    repetition             share of the completions that were written with a loop, see ``has_loop``
    tokens_per_answer      mean number of generated tokens, EOS included, of the completions that were written
    regurgitation          share of completions that repeat their problem or open a new prompt, see ``regurgitates``
    step_validity          valid steps over written steps, over all completions with a chain: a mean over steps
    chain_valid            share of completions whose chain is wholly valid; without a chain it is not
    process_valid_pass_at_1   share of problems answered right by a valid chain that does not contradict the answer
    invalid_given_right    of the right answers, the share that is not process-valid: what an answer key lets pass.
                           Chains in which nothing could be checked (``outcome_unchecked``) are left out
    chain_answer_agreement    share of completions whose chain ends in the answer given, where both can be read
    outcome_<name>         shares of ``OUTCOMES``; they add up to 1
    accuracy_level_<n>, problems_level_<n>    accuracy on the problems of that level, and their number

    Otherwise every name begins with ``sampled_``, rates are over completions, and ``accuracy`` is replaced by

    sampled_pass_at_<k>    unbiased pass@k from all samples of a problem, for k = 1, 2, 4, .. and n
    sampled_cons_at_<k>    share of problems whose majority answer is right, for the same k above 1; see
                           ``consensus_at_k``. Unread and truncated answers do not vote

    A metric that does not exist here is not in ``metrics`` but, with its reason, in ``omitted``. ``codec`` is None for
    a generator that takes text, such as a server.

    Raises ValueError where no problem can be scored, two share an index, the codec's layout is not the grader's, the
    split's name holds a ``/``, or the generator does not give each prompt its completions once.
    """
    if not split or "/" in split:
        raise ValueError(f"split={split!r}: expected a name without '/', which separates split and metric")
    if codec is not None and codec.layout != grader.layout:
        raise ValueError(
            f"the codec writes the layout {codec.layout!r} and the grader reads {grader.layout!r}: build both from one "
            "trace format"
        )
    kept, refused = readable(grader, problems)
    kept.sort(key=lambda problem: problem.index)
    texts = {problem.index: problem.text for problem in kept}
    started = time.perf_counter()
    written = write_completions(generator, codec, grader.template, texts, sampling)
    generated = time.perf_counter()
    answered = [score(grader, problem, written[problem.index]) for problem in kept]
    graded = time.perf_counter()
    sheet = _Sheet(split, "sampled_" if is_sampled(sampling) else "")
    _add_counts(sheet, answered, len(refused))
    _add_rates(sheet, [scored for samples in answered for scored in samples])
    _add_chains(sheet, [scored for samples in answered for scored in samples], grader)
    firsts = [samples[0] for samples in answered]
    return SequenceEvaluation(
        split=split,
        metrics=sheet.metrics,
        items=voted_columns(answered) if is_sampled(sampling) else item_columns(firsts),
        samples=sample_columns(answered),
        sampling=sampling,
        refused=refused,
        omitted=sheet.omitted,
        generation_s=generated - started,
        grading_s=graded - generated,
    )


class _Sheet:
    """Metrics under their split and prefix; a ratio over nothing goes to ``omitted`` with its reason."""

    def __init__(self, split: str, prefix: str) -> None:
        self.start, self.is_sampled = f"{split}/{prefix}", bool(prefix)
        self.metrics: dict[str, float] = {}
        self.omitted: dict[str, str] = {}

    def add(self, name: str, value: float) -> None:
        self.metrics[self.start + name] = float(value)

    def omit(self, names: Iterable[str], reason: str) -> None:
        self.omitted.update({self.start + name: reason for name in names})

    def ratio(self, name: str, part: float, whole: float, none: str = "there is no completion") -> None:
        self.omit([name], none) if whole == 0 else self.add(name, part / whole)


def _add_counts(sheet: _Sheet, answered: Sequence[Sequence[Scored]], num_refused: int) -> None:
    """Right answers, over all problems and by level."""
    right = [[scored.grade.correct for scored in samples] for samples in answered]
    sheet.add("problems", len(answered))
    sheet.add("gold_unreadable", num_refused)
    stops = Counter(samples[0].completion.stop for samples in answered if not samples[0].completion.was_asked)
    for reason, count in sorted(stops.items()):
        sheet.add(f"refused_prompts_{reason}", count)
    name = "pass_at_1" if sheet.is_sampled else "accuracy"
    sheet.add(name, sum(map(sum, right)) / sum(map(len, right)))
    if sheet.is_sampled:
        _add_samples(sheet, answered, right)
    else:
        sheet.add("errors", sum(not row[0] for row in right))
    levels: dict[int, list[bool]] = defaultdict(list)
    num_problems: dict[int, int] = defaultdict(int)
    for samples, row in zip(answered, right, strict=True):
        level = samples[0].problem.level
        if level is not None:
            levels[level] += row
            num_problems[level] += 1
    for level in sorted(levels):
        sheet.add(f"{name}_level_{level}", sum(levels[level]) / len(levels[level]))
        sheet.add(f"problems_level_{level}", num_problems[level])


def _add_samples(sheet: _Sheet, answered: Sequence[Sequence[Scored]], right: Sequence[Sequence[bool]]) -> None:
    num_samples = len(right[0])
    votes = [[scored.vote for scored in samples] for samples in answered]
    for k in sample_counts(num_samples):
        if k > 1:
            passed = sum(pass_at_k(num_samples, sum(row), k) for row in right)
            agreed = sum(consensus_at_k(row, judged, k) for row, judged in zip(votes, right, strict=True))
            sheet.add(f"pass_at_{k}", passed / len(right))
            sheet.add(f"cons_at_{k}", agreed / len(right))


def _add_rates(sheet: _Sheet, rows: Sequence[Scored]) -> None:
    asked = [row for row in rows if row.completion.was_asked]
    for verdict in (Verdict.UNPARSED, Verdict.TRUNCATED, Verdict.TIMEOUT):
        sheet.ratio(verdict.value, sum(row.grade.verdict is verdict for row in rows), len(rows))
    sheet.ratio("regurgitation", sum(row.regurgitates for row in rows), len(rows))
    for outcome in OUTCOMES:
        sheet.ratio(f"outcome_{outcome}", sum(row.grade.outcome == outcome for row in rows), len(rows))
    if any(not row.completion.ids for row in asked):
        reason = "the generator gave text without token ids"
        sheet.omit(("repetition", "tokens_per_answer"), reason)
        return
    sheet.ratio("repetition", sum(has_loop(row.completion.ids) for row in asked), len(asked))
    sheet.ratio("tokens_per_answer", sum(row.num_tokens for row in asked), len(asked))


def _add_chains(sheet: _Sheet, rows: Sequence[Scored], grader: Grader) -> None:
    if grader.layout == "answer_only":
        sheet.omit(CHAIN_NAMES, "the layout answer_only writes no chain")
        return
    if not grader.task.checks_steps:
        sheet.omit(CHAIN_NAMES, f"the task {grader.task.name!r} cannot check steps")
        return
    reports = [row.grade.steps for row in rows if row.grade.steps is not None]
    num_steps = sum(report.num_steps for report in reports)
    sheet.ratio("step_validity", sum(report.num_valid for report in reports), num_steps, "no completion writes a step")
    sheet.ratio("chain_valid", sum(report.valid for report in reports), len(rows))
    sheet.ratio("process_valid_pass_at_1", sum(row.grade.process_valid for row in rows), len(rows))
    judged = [row.grade for row in rows if row.grade.correct and row.grade.outcome != "unchecked"]
    none = "no right answer has a chain that could be checked"
    sheet.ratio("invalid_given_right", sum(not grade.process_valid for grade in judged), len(judged), none)
    agrees = [row.grade.chain_agrees for row in rows if row.grade.chain_agrees is not None]
    none = "no completion has both an answer and a chain that ends in a value"
    sheet.ratio("chain_answer_agreement", sum(agrees), len(agrees), none)
