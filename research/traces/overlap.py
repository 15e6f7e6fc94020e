"""Filters that compare texts: with themselves (loops), with the traces kept before, with the evaluation's problems."""

import re
import unicodedata
from collections.abc import Iterable

from research.errors import ConfigError
from research.traces.candidates import AbstractFilter, Candidate

WORD = re.compile(r"\w+|[^\w\s]")  # a word or number, or a single mark


class Repetition(AbstractFilter):
    """Keeps texts that do not run in a loop.

    The loop share is the share of a text's n-grams of words (``ngram`` words or marks in a row) that stood in the same
    text before: 0 where none comes twice, near 1 in a loop. Kept where it is at most ``max_share``. A text of fewer
    words than ``ngram`` has no n-gram and is kept.
    """

    reason = "repetition"

    def __init__(self, ngram: int = 8, max_share: float = 0.3) -> None:
        _expect_ngram("repetition", ngram)
        if not 0 <= max_share <= 1:
            raise ConfigError(f"filter repetition: max_share is {max_share}; expected 0 to 1")
        self._ngram, self._max_share = ngram, max_share

    def keep(self, candidate: Candidate) -> bool:
        return loop_share(candidate.text, self._ngram, self._max_share) <= self._max_share


def loop_share(text: str, ngram: int, enough: float = 0.0) -> float:
    """The loop share of a text, see :class:`Repetition`; where it is sure to be at most ``enough``, a bound of it."""
    words = WORD.findall(text)
    total = len(words) - ngram + 1
    if total < 1:
        return 0.0
    # every distinct word that begins an n-gram begins a distinct one: a cheap bound that spares most texts the rest
    bound = 1 - len(set(words[:total])) / total
    if bound <= enough:
        return bound
    distinct = len(set(zip(*(words[start : start + total] for start in range(ngram)), strict=True)))
    return 1 - distinct / total


class Duplicates(AbstractFilter):
    """Keeps a text the first time it is kept in a run.

    normalised    compare after Unicode normalisation (NFKC), folding case and runs of white space
    with_problem  the same text for another problem is no duplicate

    Holds 64-bit hashes, about 100 bytes for each kept trace; two different texts among a million are taken for equal
    with probability 3e-8.
    """

    reason = "duplicates"

    def __init__(self, normalised: bool = True, with_problem: bool = True) -> None:
        self._normalised, self._with_problem = normalised, with_problem
        self._seen: set[int] = set()
        self._last: tuple[Candidate | None, int] = (None, 0)  # what was judged is what is remembered, hashed once

    def keep(self, candidate: Candidate) -> bool:
        self._last = (candidate, self._hash(candidate))
        return self._last[1] not in self._seen

    def remember(self, candidate: Candidate) -> None:
        known, digest = self._last
        self._seen.add(digest if known is candidate else self._hash(candidate))

    def _hash(self, candidate: Candidate) -> int:
        text = f"{candidate.trace.problem}\x1f{candidate.text}" if self._with_problem else candidate.text
        if self._normalised:
            text = normalise(text)
        return hash(text)  # keyed and 64 bits wide; it never leaves this process


def normalise(text: str) -> str:
    """NFKC, case folded, every run of white space one blank, none at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.lower().split())


class Contamination(AbstractFilter):
    """Keeps traces that repeat no problem of the evaluation splits.

    evaluation_texts  those problems
    ngram             a trace is dropped where ``ngram`` words in a row, of its problem or of its text, stand in one of
                      them (words and marks, case folded); a shorter evaluation problem only where a trace's problem is
                      the same from end to end
    """

    reason = "contamination"

    def __init__(self, evaluation_texts: Iterable[str], ngram: int = 13) -> None:
        _expect_ngram("contamination", ngram)
        self._ngram = ngram
        self._grams: set[tuple[str, ...]] = set()
        self._whole: set[tuple[str, ...]] = set()
        for text in evaluation_texts:
            words = _words(text)
            self._whole.add(tuple(words))
            self._grams.update(_grams(words, ngram))
        self._known_words = {word for gram in self._grams for word in gram}
        self._last_problem: tuple[str, bool] = ("", True)

    def keep(self, candidate: Candidate) -> bool:
        problem = candidate.trace.problem
        if problem != self._last_problem[0]:  # the samples of one problem come one after the other
            words = _words(problem)
            self._last_problem = (problem, tuple(words) not in self._whole and self._is_clean(words))
        return self._last_problem[1] and self._is_clean(_words(candidate.text))

    def _is_clean(self, words: list[str]) -> bool:
        ngram, known, grams = self._ngram, self._known_words, self._grams
        run = 0  # words in a row that stand in the evaluation problems at all
        for end, word in enumerate(words, start=1):
            run = run + 1 if word in known else 0
            if run >= ngram and tuple(words[end - ngram : end]) in grams:
                return False
        return True


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: list[str], ngram: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(ngram)), strict=False)


def _expect_ngram(name: str, given: int) -> None:
    if given < 1:
        raise ConfigError(f"filter {name}: ngram is {given}; expected at least 1")
