"""A teacher behind a server that tells the logprobs of given token ids: vLLM, SGLang."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from research.errors import ConfigError
from research.generation.answers import Malformed
from research.generation.background import in_background
from research.generation.client import CompletionClient, ServerRefusal, ServerUnavailable
from research.generation.connection import Connection
from research.models.build import DataFacts
from research.records import Batch, TokenBatch, TopKLogprobs
from research.seeding import rng_for
from research.teachers.base import AbstractTeacher, TeacherIdentity
from research.teachers.prompt_logprobs import PROTOCOLS, Asked, Told

CARD_FIELDS = ("id", "root", "parent", "owned_by", "max_model_len")  # of a model card, those that do not change by call
FLOAT32_RESOLUTION = 2.0**-24  # the smallest rest that 1 minus a float32 sum of probabilities can show
PROBED_IDS = 256  # most ids of one request that asks what they spell


class Place(NamedTuple):
    """Where a document lies in a batch: its row, and the place in the row of its first token."""

    row: int
    start: int


class ServedTeacher(AbstractTeacher):
    """`TopKLogprobs` at temperature 1 from a server; ids are sent and read, never text.

    base_url      of the server, with or without ``/v1``
    model         the name that the server knows it by
    facts         of the data; their tokenizer must be the model's own, see the preflight. V is its vocabulary
    top_k         K, logprobs of each place. A server has a limit of its own (vLLM: ``--max-logprobs``, 20 unless set)
                  and refuses more
    spare_k       asked for beyond K, for a model whose head is padded beyond the tokenizer: see ``prompt_logprobs.py``
    protocol      vllm | sglang
    documents_per_request, concurrency   documents of one request, and requests under way. A server holds the logprobs
                  of a prompt over its whole vocabulary, in float32: lower them where it runs out of memory
    num_parameters   of the teacher, for the ledger's FLOPs (2 per parameter and token); None: nobody knows them, and a
                  ``budget.flops`` is refused
    extra_body    more fields of every request, in the server's own words
    api_key_env, timeout_s, max_retries, backoff_s, max_wait_s   as of a generator's server

    The row of a place is the distribution of the token that follows it, as a local teacher's logits are. Rows that a
    loss masks out (``completion_BT`` False) are uniform. Documents that share a row are sent apart.

    What a server cannot give: logits, and with them any other temperature. A method that softens gets the K kept
    logprobs softened exactly and the tail as if it were uniform (see ``losses/sparse.py``). A mass of the tail below
    float32's rounding is known only by its upper bound, V - K times the smallest kept probability.

    Raises ConfigError for values without meaning, before anything is sent. ``signal`` raises ServerUnavailable where
    the server stays down or keeps giving other than was asked, ServerRefusal where it will not take a request.

    events  counts over the teacher's life: requests, and "retry: ..." by reason
    """

    def __init__(
        self,
        base_url: str | None,
        model: str | None,
        *,
        top_k: int = 16,
        spare_k: int = 0,
        protocol: str = "vllm",
        documents_per_request: int = 4,
        num_parameters: float | None = None,
        concurrency: int = 4,
        api_key_env: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 8,
        backoff_s: float = 0.5,
        max_wait_s: float = 60.0,
        extra_body: Mapping[str, Any] | None = None,
        **facts: Unpack[DataFacts],
    ) -> None:
        if "vocab_size" not in facts:
            raise ConfigError("teacher=served reads token ids, and these data are classes; choose teacher=frozen")
        if not base_url or not model:
            raise ConfigError(
                "teacher.base_url and teacher.model are not both set; give the address of a server such as "
                "http://127.0.0.1:8000/v1, and the name of its model"
            )
        num_classes = int(facts["vocab_size"])
        if protocol not in PROTOCOLS:
            raise ConfigError(f"teacher.protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
        if not 1 <= top_k <= num_classes:
            raise ConfigError(f"teacher.top_k is {top_k}; expected 1 to {num_classes}, the tokens of the data")
        if documents_per_request < 1 or spare_k < 0:
            given = f"documents_per_request is {documents_per_request} and teacher.spare_k {spare_k}"
            raise ConfigError(f"teacher.{given}; expected at least 1 and at least 0")
        self._protocol, self._model = PROTOCOLS[protocol], model
        self._connection = Connection(
            "teacher",
            base_url,
            api_key_env,
            concurrency,
            timeout_s,
            max_retries,
            backoff_s,
            max_wait_s,
            fixed=dict(extra_body or {}),
            own=self._protocol.own,
        )
        self._root = self._connection.base_url.removesuffix("/v1")
        self.num_classes, self._top_k, self._num_asked = num_classes, top_k, top_k + spare_k
        self._documents_per_request, self._num_parameters = documents_per_request, num_parameters
        self._details = {"protocol": protocol, "model": model, "top_k": top_k, "spare_k": spare_k}
        self.events: Counter[str] = Counter()

    @cached_property
    def identity(self) -> TeacherIdentity:  # type: ignore[override]  # the server is asked when somebody wants to know
        """Who is teaching, as far as a server says: ``sha256`` is of its model's name and card, not of weights.

        Raises ConfigError where the server lists models and not this one, ServerUnavailable where it does not answer.
        """
        card = self._card()
        told = json.dumps({"model": self._model, "card": card}, sort_keys=True)
        return TeacherIdentity(
            kind="served",
            sha256=hashlib.sha256(told.encode()).hexdigest(),
            source=self._connection.base_url,
            details={**self._details, "extra_body": dict(self._connection.fixed), "card": card},
        )

    @property
    def max_positions(self) -> int | None:  # type: ignore[override]  # the server is asked, as for the identity
        """What the server's card says, less the token that it writes behind every document; None: it does not say."""
        told = self.identity.details["card"].get("max_model_len")
        return told - 1 if isinstance(told, int) else None

    def signal(self, batch: TokenBatch) -> TopKLogprobs:
        documents = _wanted(batch)
        shape = (*batch.ids_BT.shape, self._top_k)
        ids_BTK = torch.arange(self._top_k).expand(shape).contiguous()
        logprobs_BTK = torch.full(shape, -math.log(self.num_classes), dtype=torch.float64)
        for (row, start), (asked, told) in self._answers(documents, self._top_k):
            places = slice(start + asked.first, start + asked.first + len(told.rows))
            ids_BTK[row, places] = torch.tensor([[token for token, _ in each] for each in told.rows])
            logprobs_BTK[row, places] = torch.tensor(
                [[logprob for _, logprob in each] for each in told.rows], dtype=torch.float64
            )
        device = batch.ids_BT.device
        return TopKLogprobs(
            ids_NK=ids_BTK.to(device),
            logprobs_NK=logprobs_BTK.float().to(device),
            tail_logprob_N=tail_logprob(logprobs_BTK, self.num_classes).float().to(device),
            num_classes=self.num_classes,
        )

    def flops_of(self, batch: Batch) -> float:
        """2 per parameter and token of the batch where ``num_parameters`` is given, else NaN: nobody counts them here.

        Raises TypeError for a batch that is not text.
        """
        if not isinstance(batch, TokenBatch):
            raise TypeError(f"a served teacher reads text, not a {type(batch).__name__}")
        parameters = math.nan if self._num_parameters is None else self._num_parameters
        return 2.0 * parameters * int((batch.segment_BT > 0).sum())

    def pieces(self, ids: Sequence[int]) -> dict[int, str]:
        """What the server says that each of these ids spells; ids of which it says nothing are left out.

        Raises as ``signal`` does.
        """
        given = list(dict.fromkeys(ids))
        chunks = [given[start : start + PROBED_IDS] for start in range(0, len(given), PROBED_IDS)]
        documents = [(Place(0, 0), Asked((chunk[0], *chunk), 0)) for chunk in chunks]
        found: dict[int, str] = {}
        for _, (asked, told) in self._answers(documents, 1):
            found |= {token: text for token, text in zip(asked.ids[1:], told.texts, strict=True) if text is not None}
        return found

    # -- requests -----------------------------------------------------------------------------------------------------

    def _answers(
        self, documents: Sequence[tuple[Place, Asked]], top_k: int
    ) -> Iterator[tuple[Place, tuple[Asked, Told]]]:
        """What the server says of each document, in the order in which it answers."""
        size, num_asked = self._documents_per_request, top_k + self._num_asked - self._top_k
        chunks = [documents[start : start + size] for start in range(0, len(documents), size)]
        if not chunks:
            return

        async def work(client: CompletionClient, chunk: Sequence[tuple[Place, Asked]]) -> list[Any]:
            sent = [asked for _, asked in chunk]

            def read(answer: Any, events: Counter[str]) -> list[Told]:
                return self._protocol.read(answer, sent, num_asked, top_k, self.num_classes)

            body = {**self._connection.fixed, **self._protocol.body(sent, self._model, num_asked)}
            told = await client.ask(body, _jitter(), read)
            return [(place, pair) for (place, _), pair in zip(chunk, zip(sent, told, strict=True), strict=True)]

        opened = partial(self._connection.opened, f"{self._root}/{self._protocol.path}", self.events)
        results = in_background(opened, work, chunks, min(self._connection.concurrency, len(chunks)))
        try:
            for answers in results:
                yield from answers
        except ServerRefusal as error:
            raise self._explained(error, num_asked) from None
        except ServerUnavailable as error:
            raise ServerUnavailable(
                f"the teacher {self._model} cannot be asked: {error}. Look at the server; a run that was under way "
                "goes on with ckpt_path=last in its own folder"
            ) from None
        finally:
            results.close()

    def _explained(self, error: ServerRefusal, num_asked: int) -> ServerRefusal:
        if error.status is not None and "logprob" in str(error).lower():
            return ServerRefusal(
                f"teacher.top_k{'' if num_asked == self._top_k else ' + spare_k'} asks for {num_asked} logprobs, which "
                f"the server refuses; lower it to the server's limit, or raise that (vLLM: --max-logprobs). {error}",
                error.status,
            )
        return ServerRefusal(f"the teacher {self._model} cannot be asked: {error}", error.status)

    def _card(self) -> dict[str, Any]:
        """The server's own card of the model, cut to what stays the same; {} where it has none to show."""

        async def work(client: CompletionClient, _: None) -> list[Mapping[str, Any]]:
            return await client.ask(None, _jitter(), _read_cards)

        opened = partial(self._connection.opened, f"{self._root}/v1/models", self.events)
        try:
            (cards,) = list(in_background(opened, work, [None], 1))
        except ServerRefusal as error:
            if error.status in (404, 405):
                return {}
            raise
        except ServerUnavailable as error:
            raise ServerUnavailable(f"the teacher {self._model} cannot be asked: {error}") from None
        names = [str(card.get("id")) for card in cards]
        if self._model not in names:
            raise ConfigError(f"teacher.model is {self._model!r}; the server has {', '.join(names) or 'none'}")
        card = cards[names.index(self._model)]
        return {name: card[name] for name in CARD_FIELDS if isinstance(card.get(name), str | int)}


def tail_logprob(logprobs_NK: Tensor, num_classes: int) -> Tensor:
    """Natural log of the probability of everything that was not kept: ``[..., K] -> [...]``, -inf at K = V.

    ``log(1 - sum p)`` in log space. A kept sum of 1 or more, which rounding makes of a very small rest, stands for the
    smallest rest that float32 can show. No class that was left out is likelier than the least of those kept, so that
    the tail is never above V - K times its probability either.
    """
    num_tail = num_classes - logprobs_NK.shape[-1]
    if num_tail == 0:
        return torch.full(logprobs_NK.shape[:-1], -math.inf, dtype=logprobs_NK.dtype, device=logprobs_NK.device)
    kept_N = torch.logsumexp(logprobs_NK, dim=-1).clamp(max=math.log1p(-FLOAT32_RESOLUTION))
    rest_N = torch.log(-torch.expm1(kept_N))
    return torch.minimum(rest_N, logprobs_NK.amin(dim=-1) + math.log(num_tail))


def _wanted(batch: TokenBatch) -> list[tuple[Place, Asked]]:
    """The documents of a batch of which a signal is wanted, from the first such place of each to the last.

    A document that wants its very last place is given one token more: a row is told with the token that follows it.
    """
    documents = []
    columns = (batch.ids_BT, batch.segment_BT, batch.completion_BT)
    for row, (ids_T, segment_T, completion_T) in enumerate(zip(*(column.cpu() for column in columns), strict=True)):
        for segment in range(1, int(segment_T.max()) + 1):
            places_N = (segment_T == segment).nonzero().squeeze(-1)
            wanted_N = places_N[completion_T[places_N]]
            if len(wanted_N) == 0:
                continue
            start, first, last = int(places_N[0]), int(wanted_N[0]), int(wanted_N[-1])
            ids = ids_T[start : last + 1].tolist()
            ids.append(int(ids_T[last + 1]) if last < int(places_N[-1]) else ids[0])
            documents.append((Place(row, start), Asked(tuple(ids), first - start)))
    return documents


def _read_cards(answer: Any, events: Counter[str]) -> list[Mapping[str, Any]]:
    cards = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(cards, list) or not all(isinstance(card, Mapping) for card in cards):
        raise Malformed(f"no list of models in {str(answer)[:300]}", "models")
    return cards


def _jitter() -> torch.Generator:
    """The stream of a request's waits: it changes no number of a run."""
    return rng_for(0, "back-off")
