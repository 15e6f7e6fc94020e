"""What a server says of token ids that it is given: the requests, and the reading of the answers, of two servers.

Row t of a document is the distribution of the token that follows ``ids[0..t]``. Both servers file it under the token
that followed, so that theirs is one place further along; it is moved here and nowhere else.

vLLM     POST /v1/completions with ``prompt_logprobs``: per prompt a list, null for its first token, then objects of
         token id -> {logprob, rank, decoded_token}: the K largest, and the prompt's own token where it is none of them
SGLang   POST /generate with ``return_logprob``, ``logprob_start_len`` and ``top_logprobs_num``: ``meta_info`` holds
         ``input_token_logprobs`` and ``input_top_logprobs``, lists of [logprob, id, text] from the start on, the first
         of them null

Logprobs are at temperature 1, whatever temperature a request names. Servers that take only text, or name tokens by
their text alone (``echo`` with ``logprobs``: OpenAI's own, llama-cpp-python's), cannot be asked: several ids may spell
one text, and text that is encoded again may become other ids.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research.generation.answers import Malformed
from research.generation.client import ServerRefusal

VLLM_MINUS_INFINITY = -9999.0  # what vLLM writes for a logprob that JSON has no number for
ROUNDING = 1e-2  # how far the probabilities of a row may add up past 1

Entry = tuple[int, float]


@dataclass(frozen=True)
class Asked:
    """One document as it is sent; rows are wanted from the place ``first`` to the last but one."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Told:
    """The server's words on one document.

    rows   for each place from ``first`` on, ``top_k`` pairs (id, logprob), the largest first
    texts  for each of these places, what the server says that the token *after* it spells; None where it does not say
    """

    rows: list[list[Entry]]
    texts: list[str | None]


class AbstractProtocol(ABC):
    """How one kind of server is asked. Subclasses are final.

    path  of the endpoint, behind the root of the server (``/v1`` left out)
    own   fields of a request that a config must not set
    """

    path: str
    own: tuple[str, ...]

    @abstractmethod
    def body(self, documents: Sequence[Asked], model: str, num_asked: int) -> dict[str, Any]:
        """The request for the ``num_asked`` largest logprobs of every wanted place."""

    @abstractmethod
    def entries(self, answer: Any, documents: Sequence[Asked]) -> Iterator[tuple[list[list[Entry]], list[str | None]]]:
        """For each document the pairs of each wanted place as the server gives them, and the text of what followed.

        Raises Malformed where the answer is not of these documents, ServerRefusal where the server is of another kind.
        """

    def read(self, answer: Any, documents: Sequence[Asked], num_asked: int, top_k: int, width: int) -> list[Told]:
        """What the answer to ``body(documents, .., num_asked)`` says; ``width`` is the number of tokens.

        A row holds ``num_asked`` pairs, or one more, the token that follows; its largest ``top_k`` are kept. Ids from
        ``width`` on are rows of a head that is padded beyond the tokenizer: they are left out, and the others share the
        probability that is left.

        Raises Malformed for an answer of another length, a row of fewer pairs, an id twice, or values that are no
        logprobs; ServerRefusal where a padded head leaves too few.
        """
        told = []
        for asked, (rows, texts) in zip(documents, self.entries(answer, documents), strict=True):
            following = asked.ids[asked.first + 1 :]
            if len(rows) != len(following):
                raise Malformed(f"{len(rows)} rows for {len(following)} places of a document", "logprobs")
            places = enumerate(zip(rows, following, strict=True), asked.first)
            checked = [(place, _checked(row, token, place, num_asked)) for place, (row, token) in places]
            told.append(Told([_largest(row, place, top_k, width) for place, row in checked], texts))
        return told


class VllmProtocol(AbstractProtocol):
    """``prompt_logprobs`` of `/v1/completions`, as vLLM documents it."""

    path = "v1/completions"
    own = (
        "model", "prompt", "prompt_logprobs", "max_tokens", "temperature", "top_p", "n", "echo", "stream", "logprobs",
        "truncate_prompt_tokens",
    )  # fmt: skip

    def body(self, documents: Sequence[Asked], model: str, num_asked: int) -> dict[str, Any]:
        prompts = [list(asked.ids) for asked in documents]
        return {
            "model": model,
            "prompt": prompts[0] if len(prompts) == 1 else prompts,
            "prompt_logprobs": num_asked,
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
        }

    def entries(self, answer: Any, documents: Sequence[Asked]) -> Iterator[tuple[list[list[Entry]], list[str | None]]]:
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or not choices:
            raise Malformed(f"no choices in {str(answer)[:300]}")
        if len(choices) != len(documents) or not all(isinstance(choice, Mapping) for choice in choices):
            raise Malformed(f"{len(choices)} choices for {len(documents)} documents", "logprobs")
        by_index = {choice.get("index", place): choice for place, choice in enumerate(choices)}
        if sorted(by_index, key=str) != sorted(range(len(documents)), key=str):
            raise Malformed(f"choices of index {sorted(by_index, key=str)} for {len(documents)} documents", "logprobs")
        for number, asked in enumerate(documents):
            listed = by_index[number].get("prompt_logprobs")
            if listed is None:
                raise _other_server("no prompt_logprobs in its answer")
            if not isinstance(listed, list) or len(listed) != len(asked.ids):
                size = len(listed) if isinstance(listed, list) else type(listed).__name__
                raise Malformed(f"prompt_logprobs of length {size} for {len(asked.ids)} tokens", "logprobs")
            wanted = listed[asked.first + 1 :]
            own = [_of_token(row, token) for row, token in zip(wanted, asked.ids[asked.first + 1 :], strict=True)]
            yield [_pairs(row) for row in wanted], own


class SglangProtocol(AbstractProtocol):
    """``return_logprob`` of `/generate`, as SGLang documents it."""

    path = "generate"
    own = (
        "input_ids", "text", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "stream",
        "return_text_in_logprobs",
    )  # fmt: skip

    def body(self, documents: Sequence[Asked], model: str, num_asked: int) -> dict[str, Any]:
        return {
            "input_ids": [list(asked.ids) for asked in documents],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [asked.first for asked in documents],
            "top_logprobs_num": num_asked,
            "return_text_in_logprobs": True,
        }

    def entries(self, answer: Any, documents: Sequence[Asked]) -> Iterator[tuple[list[list[Entry]], list[str | None]]]:
        answers = answer if isinstance(answer, list) else [answer]
        if len(answers) != len(documents):
            raise Malformed(f"{len(answers)} answers for {len(documents)} documents", "logprobs")
        for number, asked in enumerate(documents):
            told = answers[number].get("meta_info") if isinstance(answers[number], Mapping) else None
            if not isinstance(told, Mapping):
                raise Malformed(f"no meta_info in {str(answers[number])[:300]}", "logprobs")
            own, rows = told.get("input_token_logprobs"), told.get("input_top_logprobs")
            if own is None or rows is None:
                raise _other_server("no input_token_logprobs or no input_top_logprobs in its answer")
            expected = asked.ids[asked.first :]
            if not isinstance(own, list) or not isinstance(rows, list) or len(own) != len(rows):
                raise Malformed("input_token_logprobs and input_top_logprobs of different lengths", "logprobs")
            if [_triple(each)[1] for each in own] != list(expected):
                raise Malformed(f"logprobs of {len(own)} tokens that are not the {len(expected)} sent", "logprobs")
            pairs = [[_triple(pair) for pair in _list(row)] for row in rows[1:]]
            texts = [_triple(each)[2] for each in own[1:]]
            yield [[(token, logprob) for logprob, token, _ in row] for row in pairs], texts


PROTOCOLS: dict[str, AbstractProtocol] = {"vllm": VllmProtocol(), "sglang": SglangProtocol()}


def _checked(row: list[Entry], following: int, place: int, num_asked: int) -> list[Entry]:
    """The row itself, where it can be one of this place."""
    where = f"at place {place}"
    if not num_asked <= len(row) <= num_asked + 1:
        raise Malformed(f"{len(row)} logprobs {where} where {num_asked} were asked for", "logprobs")
    tokens = {token for token, _ in row}
    if len(tokens) < len(row):
        raise Malformed(f"a token id twice {where}", "logprobs")
    if len(row) > num_asked and following not in tokens:
        raise Malformed(
            f"the {len(row)} logprobs {where} do not hold the token {following} that follows it: they are not aligned "
            "to the ids that were sent",
            "logprobs",
        )
    if any(not -math.inf <= logprob <= ROUNDING for _, logprob in row):
        raise Malformed(f"values {where} that are no natural logs of probabilities: {row[:3]}", "logprobs")
    mass = math.fsum(math.exp(logprob) for _, logprob in row)
    if not 0 < mass <= 1 + ROUNDING:
        raise Malformed(f"probabilities {where} that add up to {mass:.4g}", "logprobs")
    return row


def _largest(row: list[Entry], place: int, top_k: int, width: int) -> list[Entry]:
    """The largest ``top_k`` pairs of a row among the ids below ``width``; of equals, the smaller id comes first."""
    real = [(token, logprob) for token, logprob in row if token < width]
    if len(real) < len(row):
        lost = math.fsum(math.exp(logprob) for token, logprob in row if token >= width)
        real = [(token, logprob - math.log1p(-min(lost, 1 - 1e-9))) for token, logprob in real]
    if len(real) < top_k:
        raise ServerRefusal(
            f"{len(row) - len(real)} of the {len(row)} likeliest ids at place {place} are {width} or more, which no "
            f"token of the data has (a padded head): {len(real)} are left of teacher.top_k={top_k}. Raise "
            "teacher.spare_k, so that more are asked for"
        )
    return sorted(real, key=lambda pair: (-pair[1], pair[0]))[:top_k]


def _pairs(row: Any) -> list[Entry]:
    if not isinstance(row, Mapping):
        raise Malformed(f"a row of prompt_logprobs is {str(row)[:100]}; expected an object", "logprobs")
    if not all(str(token).isdecimal() for token in row):
        raise _other_server(f"it names tokens by text ({list(row)[:3]})")
    try:
        return [(int(token), _logprob(each["logprob"])) for token, each in row.items()]
    except (TypeError, KeyError) as error:
        raise Malformed(f"a row of prompt_logprobs holds {str(row)[:100]} ({error!r})", "logprobs") from None


def _of_token(row: Any, token: int) -> str | None:
    """What the server says that ``token`` spells."""
    told = row.get(str(token)) if isinstance(row, Mapping) else None
    text = told.get("decoded_token") if isinstance(told, Mapping) else None
    return text if isinstance(text, str) else None


def _triple(given: Any) -> tuple[float, int, str | None]:
    match given:
        case [_, int(token), *_] if token < 0 or isinstance(token, bool):
            pass
        case [logprob, int(token)]:
            return _logprob(logprob), token, None
        case [logprob, int(token), text]:
            return _logprob(logprob), token, text if isinstance(text, str) else None
    raise Malformed(f"{str(given)[:100]} in the place of [logprob, id, text]", "logprobs")


def _list(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise Malformed(f"{str(given)[:100]} in the place of a list", "logprobs")
    return given


def _logprob(given: Any) -> float:
    """A natural log; null, which only the first token of a prompt has, is not a number."""
    if given is None:
        return math.nan
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise Malformed(f"{given!r} in the place of a logprob", "logprobs")
    return -math.inf if given <= VLLM_MINUS_INFINITY else float(given)


def _other_server(found: str) -> ServerRefusal:
    return ServerRefusal(
        f"the teacher's server gives no logprobs of given token ids: {found}. Expected a server of the kind that "
        f"teacher.protocol names, one of {', '.join(PROTOCOLS)}"
    )
