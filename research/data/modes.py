"""Two ways of answering in one student: with a chain of thought or without, as the prompt asks (claims C35)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from research.errors import ConfigError
from research.records import Trace
from research.text.formats import MODES, halves, in_modes, layout_of

MIXTURES, BOTH = ("two", "unmarked"), "both"


@dataclass(frozen=True)
class Modes:
    """What ``data.modes`` and ``data.mode`` say.

    mixture  two       a seeded half of the train traces has a mark in its prompt that asks to think, and its chain; the
                       other half a mark that asks not to, and the answer alone
             unmarked  the same mixture without marks: the control, which cannot know what is asked
             None      no mixture
    mode     one of MODES: how held-out problems and prompts are posed, and what is then measured as obedience. None:
             think where the mixture is ``two``, else nothing is asked. ``both``: a seeded half of the prompts in each
             mode, held-out problems in think; only where the mixture is ``two``

    Raises ConfigError for other words, and for a trace format that cannot leave its chain out.
    """

    mixture: str | None
    mode: str | None
    trace_format: str
    seed: int

    def __post_init__(self) -> None:
        for key, given, valid in (("modes", self.mixture, MIXTURES), ("mode", self.mode, (*MODES, BOTH))):
            if given is not None and given not in valid:
                raise ConfigError(f"data.{key} is {given!r}; expected null or one of {', '.join(valid)}")
        if self.mode == BOTH and self.mixture != "two":
            raise ConfigError(f"data.mode is both with data.modes={self.mixture}; two modes need data.modes=two")
        if self.mixture is not None and layout_of(self.trace_format) != "chain_then_answer":
            raise ConfigError(
                f"data.modes is {self.mixture} with trace_format={self.trace_format}; a chain that may be left out "
                "stands before the answer: give trace_format=chain_then_answer"
            )

    @property
    def asked(self) -> str | None:
        """The mode that held-out problems are posed in; None where nothing is asked."""
        return "think" if self.mode == BOTH else self.mode or ("think" if self.mixture == "two" else None)

    def mark(self, template: Any) -> str:
        """What stands behind a problem that is posed."""
        return "" if self.mixture != "two" or self.asked is None else str(template.mode_marks[self.asked])

    def of_prompts(self, count: int) -> list[str | None]:
        """The mode that each of ``count`` prompts is posed in; None: none is asked for."""
        if self.mixture != "two":
            return [None] * count
        return [*halves(count, self.seed)] if self.mode == BOTH else [self.asked] * count

    def alphabet(self, template: Any, task_alphabet: str) -> str:
        """The marks' characters, for a tokenizer of characters; of both mixtures, so that their students are one size.

        Raises ConfigError where the task's own texts have such a character.
        """
        if self.mixture is None:
            return ""
        marks: Mapping[str, str] = template.mode_marks
        clash = sorted(set("".join(marks.values())) & set(task_alphabet))
        if clash:
            raise ConfigError(
                f"data.modes={self.mixture} marks prompts with {', '.join(marks.values())}, and the task's own texts "
                f"hold {', '.join(clash)}; take another task or template"
            )
        return "".join(marks.values())

    def takes(self, trace: Trace) -> bool:
        """Whether a train trace can be in either mode: one without a chain cannot."""
        return self.mixture is None or bool(trace.chain.strip())

    def training(self, traces: Sequence[Trace], template: Any) -> list[Trace]:
        """The train traces, all of which are taken, in their modes; as they are where there is no mixture."""
        if self.mixture is None:
            return list(traces)
        return in_modes(traces, template.mode_marks if self.mixture == "two" else None, self.seed)

    def reference(self, trace: Trace) -> Trace:
        """A held-out problem's solution as it would be written in the mode that is asked for."""
        return replace(trace, chain="") if self.mixture is not None and self.asked == "no_think" else trace
