"""The template contract: how a problem, a chain and an answer become text, and how written text is read back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

LAYOUTS = ("chain_then_answer", "answer_then_chain", "answer_only")


@dataclass(frozen=True)
class Parsed:
    """What a completion says: its chain ("" where there is none) and its answer, None where none was found."""

    chain: str
    answer: str | None


class AbstractTemplate(ABC):
    """Text around a problem and its solution. Subclasses are final.

    A document is ``prompt(problem) + completion(chain, answer, layout)`` and an EOS token; the two parts are tokenised
    apart, so that the prompt of generation is a prefix of the document of training.

    alphabet        every character that the template itself writes
    step_separator  what stands between two steps of a chain
    mode_marks      mode -> what the prompt says behind the problem to ask for it; see ``formats.MODES``
    """

    alphabet: str
    step_separator: str
    mode_marks: ClassVar[Mapping[str, str]] = {"think": " /think", "no_think": " /no_think"}

    @abstractmethod
    def prompt(self, problem: str) -> str:
        """Everything up to the first character that the model writes itself."""

    @abstractmethod
    def completion(self, chain: str, answer: str, layout: str) -> str:
        """What follows the prompt, without EOS; ``layout`` is one of LAYOUTS."""

    def marks(self, layout: str) -> tuple[str, ...]:
        """What chain and answer may not hold, since reading goes by it; none where the template cannot tell."""
        return ()

    @abstractmethod
    def parse(self, text: str, layout: str) -> Parsed:
        """The inverse of :meth:`completion`, for text that a model wrote, which may hold anything."""
