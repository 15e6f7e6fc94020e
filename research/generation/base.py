"""The generator contract: whatever writes completions, in this process or behind a server."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from research.records import Completion, Sampling


@dataclass(frozen=True)
class Prompt:
    """One prompt: the problem's stable id, its rendered text and, for a generator in this process, its token ids."""

    index: int
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """The completions of one prompt, ``sampling.num_samples`` of them, in order of the sample number."""

    index: int
    completions: tuple[Completion, ...]


class AbstractGenerator(ABC):
    """Writes completions. Subclasses are final.

    identity        plain values that name the writer in manifests: kind, model, weights' sha256, ...
    longest_prompt  tokens of the longest prompt that leaves room for one token behind it; None: not known
    """

    identity: dict[str, Any]
    longest_prompt: int | None = None

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        """Each prompt's completions exactly once, as they become ready, in any order."""
