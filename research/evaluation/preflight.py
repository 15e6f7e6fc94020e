"""Before a student learns from a teacher: do they speak of the same tokens, and is there anything to learn?

A teacher that is asked under the wrong template, stops at another token or means other text by the same ids gives a
loss that falls all the same. What such runs cost is known only afterwards; this costs a second before.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from research.data.traces import TraceData
from research.data.train_traces import reference_trace
from research.evaluation import preflight_text as text
from research.evaluation.completions import score, write_completions
from research.evaluation.findings import LEVELS, Finding, ok, refusal, skipped, warning
from research.evaluation.preflight_distributions import Agreement, CannotBeAsked, Pair, agreement, asking
from research.evaluation.teacher_folder import TeacherFolder, read_teacher_folder
from research.generation.in_process import LocalGenerator
from research.records import Completion, Problem, Sampling
from research.tasks.grading import Grader
from research.teachers.base import AbstractTeacher
from research.teachers.frozen import FrozenTeacher
from research.text.codec import Codec
from research.text.document import Document
from research.text.refusals import Refused

GOOD_OVERLAP = (
    0.97  # arXiv:2604.13016: on-policy distillation succeeds where 97 to 99 % of the mass is on common tokens
)
LIKELY_END = 0.05  # below this the teacher hardly ever ends a finished answer where the data end it
LONGEST_ANSWER = 256  # tokens, where no reference solution says how long answers are


@dataclass(frozen=True)
class Preflight:
    """What was found.

    findings  one line each, with a level of ``findings.LEVELS``
    figures   plain numbers: ``reference/...`` on reference solutions and ``student/...`` on the student's own greedy
              answers, both as in :class:`Agreement`; ``accuracy_student`` and ``accuracy_teacher``, shares of problems
    prompts   the first problem as each side is asked it
    """

    findings: tuple[Finding, ...]
    figures: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def level(self) -> str:
        """The gravest of the findings' levels."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="ok")

    def of_level(self, level: str) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    def lines(self) -> list[str]:
        """The report as it is printed."""
        lines = [f"{finding.level:8s} {finding.name:11s} {finding.told}" for finding in self.findings]
        for side, prompt in self.prompts.items():
            lines += [f"-- the {side}'s prompt", *prompt.splitlines()]
        lines += ["--", *(f"{name:40s} {value:.6g}" for name, value in self.figures.items())]
        return lines

    def plain(self) -> dict[str, Any]:
        """The same as plain values, for a file."""
        return {"level": self.level, **asdict(self)}


def preflight(
    student: nn.Module,
    teacher: AbstractTeacher,
    data: TraceData,
    *,
    num_problems: int = 32,
    device: torch.device | str = "cpu",
    on_policy: bool = True,
) -> Preflight:
    """Looks at a language-model student, its teacher and the data that they are to meet on.

    Refused: ids that mean other text, heads of other sizes, another end of text, a template that is of no use, a
    teacher that cannot be asked. Warned of: a teacher that is weaker than the student (greedy accuracy; where that ties
    or cannot be had, its loss on the reference solutions), too little overlap, a template or thinking mode that the
    teacher was not taught, an end of text that it does not expect.

    ``on_policy``: whether the student is to learn from its own words; too little overlap is warned of there alone.
    ``num_problems`` of validation are taken, of train where there is none. No random number of torch's global generator
    is drawn, and student and data are left as they were.
    """
    started, home = time.perf_counter(), next(student.parameters()).device
    try:
        with torch.random.fork_rng(devices=[]):
            flight = _Flight(student.to(device), teacher.to(device), data, torch.device(device), on_policy)
            return replace(flight.run(num_problems), seconds=time.perf_counter() - started)
    finally:
        student.to(home)


@dataclass(frozen=True)
class _Answered:
    """Completions by problem, how many of them are right, and of how many."""

    written: dict[int, tuple[Completion, ...]]
    right: int
    problems: int

    @property
    def accuracy(self) -> float:
        return self.right / self.problems


class _Flight:
    """The parts of one preflight, in order; what one of them makes impossible the others leave out."""

    codec: Codec
    teacher_codec: Codec

    def __init__(
        self, student: nn.Module, teacher: AbstractTeacher, data: TraceData, device: torch.device, on_policy: bool
    ) -> None:
        self.student, self.teacher, self.data, self.device = student, teacher, data, device
        self.on_policy = on_policy
        self.findings: list[Finding] = []
        self.figures: dict[str, float] = {}

    def run(self, num_problems: int) -> Preflight:
        both = text.codecs(self.data)
        if isinstance(both, Finding):
            return Preflight((both,))
        self.codec, self.teacher_codec = both
        problems = self._problems(num_problems)
        if not problems:
            return Preflight((skipped("problems", f"the task {self.data.task.name} poses none to look at"),))
        prompts = {
            "student": self.codec.prompt(problems[0].text),
            "teacher": self.teacher_codec.prompt(problems[0].text),
        }
        try:
            with asking():
                self._say(problems[0], prompts)
            if not any(finding.level == "refusal" for finding in self.findings):
                self._measure(problems)
        except CannotBeAsked as error:
            self.findings.append(refusal("teacher", str(error)))
        return Preflight(tuple(self.findings), self.figures, prompts)

    def _problems(self, num_problems: int) -> list[Problem]:
        """Those that both sides can be asked, of validation or, where it has none, of train."""
        found = []
        for problem in self.data.problems("val") or self.data.problems("train"):
            try:
                longest = max(len(codec.prompt_ids(problem.text)) for codec in (self.codec, self.teacher_codec))
            except Refused:
                continue
            found += [problem] if longest < self.data.max_tokens else []
            if len(found) == num_problems:
                break
        return found

    def _say(self, problem: Problem, prompts: dict[str, str]) -> None:
        source = self.teacher.identity.source
        folder = read_teacher_folder(source) if isinstance(self.teacher, FrozenTeacher) else TeacherFolder()
        width = getattr(self.student, "vocab_size", None)
        self.findings += [
            text.tokens(self.teacher, folder, self.codec),
            text.vocabulary(width, self.teacher, folder, self.codec),
            text.end_of_text(folder, self.codec, self.teacher_codec),
            text.templates(folder, self.codec, self.teacher_codec),
            text.thinking(prompts, problem.text),
        ]

    def _measure(self, problems: Sequence[Problem]) -> None:
        references = self._references(problems)
        reference = self._agree("reference", references)
        longest = max((len(pair.student.completion_ids) for pair in references), default=0)
        limit = longest + longest // 4 + 4 if references else min(LONGEST_ANSWER, self.data.max_tokens)
        own = self._write(self.student, self.codec, problems, limit)
        its = None
        if own is not None and isinstance(self.teacher, FrozenTeacher):
            with asking():
                its = self._write(self.teacher.network, self.teacher_codec, problems, limit)
        answers = None if own is None else self._agree("student", self._rollouts(problems, own.written))
        self._judge_overlap(answers or reference, "its own answers" if answers else "reference solutions")
        self._judge_gain(own, its, reference)
        if reference is not None and reference.eos_probability is not None:
            self._judge_end(reference.eos_probability)

    def _references(self, problems: Sequence[Problem]) -> list[Pair]:
        """The reference solutions, those that can be written; no pair where the task has none."""
        pairs = []
        for problem in problems:
            try:
                document = self.codec.encode(self.data.modes.reference(reference_trace(problem)))
                pairs.append(self._pair(problem, document.ids[: document.prompt_length], document.completion_ids))
            except Refused:
                continue
        return pairs

    def _rollouts(self, problems: Sequence[Problem], written: dict[int, tuple[Completion, ...]]) -> list[Pair]:
        return [
            self._pair(problem, self.codec.prompt_ids(problem.text), written[problem.index][0].ids)
            for problem in problems
            if problem.index in written and written[problem.index][0].was_asked
        ]

    def _pair(self, problem: Problem, prompt: Sequence[int], completion: Sequence[int]) -> Pair:
        its = self.teacher_codec.prompt_ids(problem.text)
        return Pair(
            Document((*prompt, *completion), len(prompt), problem.index),
            Document((*its, *completion), len(its), problem.index),
        )

    def _agree(self, name: str, pairs: Sequence[Pair]) -> Agreement | None:
        if not any(pair.student.completion_ids for pair in pairs):
            return None
        codec = self.codec
        found = agreement(
            self.student, self.teacher, pairs, pad_id=codec.pad_id, eos_ids=codec.eos_ids, device=self.device
        )
        self.figures |= {f"{name}/{key}": value for key, value in asdict(found).items() if value is not None}
        return found

    def _write(self, network: nn.Module, codec: Codec, problems: Sequence[Problem], limit: int) -> _Answered | None:
        """Greedy answers, graded; None where no gold answer can be read."""
        grader = Grader(self.data.task, codec.template, codec.layout)
        kept = [problem for problem in problems if self.data.task.is_readable(problem)]
        if not kept:
            return None
        generator = LocalGenerator(network, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
        texts = {problem.index: problem.text for problem in kept}
        written = write_completions(generator, codec, codec.template, texts, Sampling(max_new_tokens=limit))
        right = sum(score(grader, problem, written[problem.index])[0].grade.correct for problem in kept)
        return _Answered(written, right, len(kept))

    def _judge_overlap(self, found: Agreement | None, where: str) -> None:
        if found is None:
            self.findings.append(skipped("overlap", "nothing was written to compare on"))
            return
        told = (
            f"on {where} the student's {found.top_k} likeliest tokens hold the teacher's likeliest at "
            f"{found.teacher_top_in_student_top_k:.1%} of {found.places} places, and {found.teacher_share:.1%} of the "
            f"probability of its {found.top_k} ({found.teacher_mass:.1%} of all)"
        )
        low = f"{told}; on-policy distillation is known to work from {GOOD_OVERLAP:.0%} on: train on its traces first"
        is_fit = not self.on_policy or found.teacher_share >= GOOD_OVERLAP
        self.findings.append(ok("overlap", told) if is_fit else warning("overlap", low))

    def _judge_gain(self, own: _Answered | None, its: _Answered | None, reference: Agreement | None) -> None:
        told, gains = [], []
        if own is not None:
            self.figures["accuracy_student"] = own.accuracy
            told.append(f"the student solves {own.right} of {own.problems} problems")
        if own is not None and its is not None:
            self.figures["accuracy_teacher"] = its.accuracy
            told.append(f"the teacher {its.right}")
            gains.append(its.accuracy - own.accuracy)
        else:
            told.append(f"the accuracy of a teacher of kind {self.teacher.identity.kind} is not known here")
        if reference is not None:
            nll = f"teacher {reference.teacher_nll:.4f}, student {reference.student_nll:.4f}"
            told.append(f"nats per token of the reference solutions: {nll}")
            gains.append(reference.student_nll - reference.teacher_nll)
        words, gain = "; ".join(told), next((gain for gain in gains if gain != 0), 0.0)
        self.findings.append(ok("gain", words) if gain >= 0 else warning("gain", f"the teacher is weaker: {words}"))

    def _judge_end(self, probability: float) -> None:
        told = f"after a finished reference solution the teacher ends with probability {probability:.3f}"
        weak = f"{told}: the student would learn to go on; look at its template and its end of text"
        self.findings.append(ok("stopping", told) if probability >= LIKELY_END else warning("stopping", weak))
