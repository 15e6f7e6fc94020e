"""The filters of a trace run, as an ordered list in a config: each drop is counted under the first reason against it.

    filters:
      - {name: answer_key}
      - {name: length, max_tokens: 512}
      - {name: duplicates}

A trace that cannot be trained on at all (no answer, cut off at the length limit, no Unicode text) is barred before the
first filter and counted under that name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.arguments import check_names, check_types, missing_arguments
from research.errors import ConfigError
from research.records import Verdict
from research.schemas import nearest
from research.traces.candidates import AbstractFilter, Candidate
from research.traces.overlap import Contamination, Duplicates, Repetition
from research.traces.rows import StoredTrace
from research.traces.scripts import SCRIPT_NAMES, script_of

FENCES = ("```", "~~~", "\\begin{lstlisting}", "\\begin{verbatim}")


class AnswerKey(AbstractFilter):
    """Keeps traces whose answer the verifier found CORRECT; an unreadable gold answer is never that."""

    reason, needs = "answer_key", "verdict"

    def keep(self, candidate: Candidate) -> bool:
        return candidate.verdict is Verdict.CORRECT


class StepVerifier(AbstractFilter):
    """Keeps traces whose every written step follows and that leave out none; it does not look at the answer."""

    reason, needs = "step_verifier", "steps"

    def keep(self, candidate: Candidate) -> bool:
        return candidate.steps is not None and candidate.steps.valid


class Length(AbstractFilter):
    """Keeps completions of ``min_tokens`` to ``max_tokens`` tokens, both included, EOS counted; null: no limit."""

    reason, needs = "length", "tokens"

    def __init__(self, min_tokens: int = 0, max_tokens: int | None = None) -> None:
        if min_tokens < 0 or (max_tokens is not None and max_tokens < max(1, min_tokens)):
            raise ConfigError(
                f"filter length keeps {min_tokens} to {max_tokens} tokens; expected 0 <= min_tokens <= max_tokens"
            )
        self._min, self._max = min_tokens, max_tokens

    def keep(self, candidate: Candidate) -> bool:
        tokens = candidate.tokens or 0
        return tokens >= self._min and (self._max is None or tokens <= self._max)


class ForeignScript(AbstractFilter):
    """Keeps texts of which at most ``max_share`` of the letters stand in another script than ``scripts``.

    Letters of no known script (mathematical alphabets, symbols) count as neither; see :mod:`research.traces.scripts`.
    """

    reason = "foreign_script"

    def __init__(self, scripts: Sequence[str] = ("latin", "greek"), max_share: float = 0.0) -> None:
        for name in scripts:
            if name not in SCRIPT_NAMES:
                near = nearest(name, SCRIPT_NAMES)
                raise ConfigError(
                    f"filter foreign_script: unknown script {name!r}{near}. Valid: {', '.join(SCRIPT_NAMES)}"
                )
        _expect_share("foreign_script", max_share)
        self._scripts, self._max_share = frozenset(scripts), max_share
        self._ascii_is_home = "latin" in self._scripts

    def keep(self, candidate: Candidate) -> bool:
        text = candidate.text
        if self._ascii_is_home and text.isascii():
            return True
        letters = foreign = 0
        for character in text:
            script = script_of(character)
            letters += script is not None
            foreign += script is not None and script not in self._scripts
        return foreign <= self._max_share * letters


class CodeBlocks(AbstractFilter):
    """Keeps texts without a fenced block of code: none of FENCES stands in them."""

    reason = "code_blocks"

    def keep(self, candidate: Candidate) -> bool:
        text = candidate.text
        return not any(fence in text for fence in FENCES)


class LongParagraphs(AbstractFilter):
    """Keeps texts whose paragraphs, parted by blank lines, have at most ``max_characters`` each."""

    reason = "long_paragraphs"

    def __init__(self, max_characters: int = 2000) -> None:
        if max_characters < 1:
            raise ConfigError(f"filter long_paragraphs: max_characters is {max_characters}; expected at least 1")
        self._max = max_characters

    def keep(self, candidate: Candidate) -> bool:
        text = candidate.text
        return len(text) <= self._max or all(len(part.strip()) <= self._max for part in text.split("\n\n"))


FILTERS: dict[str, type[AbstractFilter]] = {
    kind.reason: kind
    for kind in (
        AnswerKey, StepVerifier, Length, Repetition, ForeignScript, CodeBlocks, LongParagraphs, Duplicates,
        Contamination,
    )
}  # fmt: skip


class FilterChain:
    """Filters in their order; the first that says no gives the reason."""

    def __init__(self, filters: Sequence[AbstractFilter] = ()) -> None:
        self.filters = tuple(filters)
        self._steps = [(each.keep, each.reason) for each in self.filters]
        self._memories = [each.remember for each in self.filters if type(each).remember is not AbstractFilter.remember]

    def reason(self, candidate: Candidate) -> str | None:
        """Why the trace is dropped, None where it is kept; kept traces are remembered."""
        if candidate.barred is not None:
            return candidate.barred
        for keep, reason in self._steps:
            if not keep(candidate):
                return reason
        for remember in self._memories:
            remember(candidate)
        return None

    def recall(self, rows: Iterable[StoredTrace]) -> None:
        """Remember what an interrupted run has kept already."""
        if self._memories:
            for row in rows:
                if row.kept:
                    candidate = Candidate(row.trace, row.text, row.verdict)
                    for remember in self._memories:
                        remember(candidate)


def build_filters(
    nodes: Sequence[Mapping[str, Any]] | None,
    *,
    available: Iterable[str] = ("verdict", "steps", "tokens"),
    evaluation_texts: Iterable[str] | None = None,
) -> FilterChain:
    """The filters of a config's list of ``{name: ..., option: ...}``.

    available         what the candidates will have: "verdict", "steps", "tokens"
    evaluation_texts  the problems that no trace may repeat; asked for only where ``contamination`` is in the list

    Raises ConfigError, naming the nearest valid word, for an unknown filter or option, an option of another type, a
    filter that stands in the list twice, and one whose traces lack what it judges by: it would drop or pass them all.
    """
    if not isinstance(nodes, Sequence | None) or isinstance(nodes, str):
        raise ConfigError(f"filters is {nodes!r}; expected a list such as [{{name: answer_key}}]")
    have, made = set(available), []
    for number, node in enumerate(nodes or ()):
        key = f"filters[{number}]"
        kind, options = _kind_of(node, key)
        if kind.needs is not None and kind.needs not in have:
            raise ConfigError(f"{key} is {kind.reason}, which judges by {kind.needs}; {_LACKS[kind.needs]}")
        late = {"evaluation_texts": evaluation_texts} if kind is Contamination else {}
        if late and evaluation_texts is None:
            raise ConfigError(
                f"{key} is contamination, which needs the problems of the evaluation splits; none are known"
            )
        for name in options.keys() & late.keys():
            raise ConfigError(f"{key}.{name} is set by the run itself; leave it out of the config")
        check_names(kind, kind.reason, key, options)
        check_types(kind, key, options)
        for name in missing_arguments(kind, options.keys() | late.keys()):
            raise ConfigError(f"{key}.{name} is not set; {kind.reason} needs it")
        made.append(kind(**options, **late))
    names = [each.reason for each in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"filters has {name} {names.count(name)} times; expected each once: drops are counted by name"
            )
    return FilterChain(made)


_LACKS = {
    "verdict": "these traces have none: nobody verified them",
    "steps": "the task checks no steps, so it would drop every trace",
    "tokens": "nobody counted the tokens of these traces",
}


def _kind_of(node: object, key: str) -> tuple[type[AbstractFilter], dict[str, Any]]:
    if isinstance(node, str):
        node = {"name": node}
    if not isinstance(node, Mapping) or "name" not in node:
        raise ConfigError(f"{key} is {node!r}; expected {{name: FILTER, option: value}}. Filters: {', '.join(FILTERS)}")
    name, options = str(node["name"]), {str(option): value for option, value in node.items() if option != "name"}
    if name not in FILTERS:
        raise ConfigError(f"{key}.name is {name!r}{nearest(name, FILTERS)}. Valid: {', '.join(FILTERS)}")
    return FILTERS[name], options


def _expect_share(name: str, given: float) -> None:
    if not 0 <= given <= 1:
        raise ConfigError(f"filter {name}: max_share is {given}; expected 0 to 1")
