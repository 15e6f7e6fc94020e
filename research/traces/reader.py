"""From what was written to a graded candidate."""

from dataclasses import asdict, replace
from typing import Any

from research.records import Completion, Problem, Trace, Verdict
from research.tasks.grading import Grade, Grader, grade_parts
from research.text.codec import Codec
from research.text.refusals import Refused
from research.text.template import Parsed
from research.traces.candidates import Candidate
from research.traces.corruptions import DETAIL, UNTOUCHED, Corruption


class Reader:
    """Reads and grades completions and reference solutions into candidates."""

    def __init__(self, grader: Grader, codec: Codec | None, corruption: Corruption | None) -> None:
        self.grader, self._codec, self._corruption = grader, codec, corruption

    def written(self, problem: Problem, completion: Completion, sample: int) -> Candidate:
        """The candidate of what a teacher wrote, after the error channel."""
        grade = self.grader.grade(problem, completion)
        details = {**about(problem, "teacher"), "stop": completion.stop}
        trace = Trace(problem.text, grade.chain, grade.answer or "", problem.index, sample, details)
        if grade.answer is not None and self._corruption is not None:
            spoilt = self._corruption.apply(trace)
            if spoilt.details.get(DETAIL, UNTOUCHED) != UNTOUCHED:
                return self._rendered(problem, spoilt)
            trace = spoilt
        candidate = self._graded(trace, completion.text, grade)
        candidate.logprob = completion.logprob
        if completion.ids:
            candidate.tokens = len(completion.ids)
        else:
            count_tokens(candidate, self._codec)
        return candidate

    def reference(self, problem: Problem) -> Candidate:
        """The candidate of the task's own solution, after the error channel."""
        trace = Trace(problem.text, problem.chain, problem.answer, problem.index, details=about(problem, "reference"))
        return self._rendered(problem, trace if self._corruption is None else self._corruption.apply(trace))

    def _rendered(self, problem: Problem, trace: Trace) -> Candidate:
        """The candidate of a chain and an answer, with the text that a teacher would have written for them."""
        text = self.grader.template.completion(trace.chain, trace.answer, self.grader.layout)
        grade = grade_parts(self.grader.task, problem, Parsed(trace.chain, trace.answer or None))
        candidate = self._graded(trace, text, grade)
        count_tokens(candidate, self._codec)
        return candidate

    def _graded(self, trace: Trace, text: str, grade: Grade) -> Candidate:
        details = {**trace.details, "outcome": grade.outcome}
        if grade.steps is not None:
            details["steps"] = asdict(grade.steps)
        candidate = Candidate(replace(trace, details=details), text, grade.verdict, grade.steps)
        if grade.verdict is Verdict.TRUNCATED:
            candidate.barred = "truncated"
        elif grade.answer is None:
            candidate.barred = "no_answer"
        elif not trace.chain.strip() and self.grader.layout != "answer_only":
            candidate.barred = "empty_chain"
        return candidate


def count_tokens(candidate: Candidate, codec: Codec | None) -> None:
    """Count the tokens of a text that came without ids, EOS included; text that has no tokens is barred by reason."""
    if codec is None:
        return
    try:
        candidate.tokens = len(codec.encoder.middle(candidate.text)) + 1
    except Refused as error:
        candidate.barred = candidate.barred or error.reason


def about(problem: Problem, origin: str) -> dict[str, Any]:
    """What a trace keeps of its problem, for whoever reads the store without the task."""
    level = {} if problem.level is None else {"level": problem.level}
    return {"origin": origin, "gold": problem.answer, **level}
