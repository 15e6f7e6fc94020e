"""What a filter looks at, and what a filter is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from research.records import Trace, Verdict
from research.tasks.base import StepReport
from research.traces.rows import StoredTrace


@dataclass(slots=True)
class Candidate:
    """A written trace before the filters.

    trace    problem, chain and answer as they were read out of ``text``
    text     the completion exactly as it was written
    verdict  the verifier's word; None where nobody verified
    steps    the step verifier's report; None where steps cannot be checked or no chain was written
    tokens   length of the completion, EOS included; None where not known
    logprob  natural log of its probability as it was drawn; None where not known
    barred   why it can be no trace at all, whatever the filters say: "no_answer", "truncated", "not_unicode"
    """

    trace: Trace
    text: str
    verdict: Verdict | None = None
    steps: StepReport | None = None
    tokens: int | None = None
    logprob: float | None = None
    barred: str | None = None

    def stored(self, reason: str | None) -> StoredTrace:
        """The row of this trace: kept where there is no reason against it."""
        return StoredTrace(self.trace, self.text, reason is None, reason, self.verdict, self.tokens, self.logprob)


class AbstractFilter(ABC):
    """Says which traces are trained on. Subclasses are final.

    reason       the name it has in a config, and under which its drops are counted
    needs        what a candidate must have for it: "verdict", "steps", "tokens" or nothing
    """

    reason: str
    needs: str | None = None

    @abstractmethod
    def keep(self, candidate: Candidate) -> bool:
        """Whether the trace stays."""

    def remember(self, candidate: Candidate) -> None:  # noqa: B027  # most filters judge each trace by itself
        """Told of every trace that all filters kept, in order, those of an interrupted run included."""
