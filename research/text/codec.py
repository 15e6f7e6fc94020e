"""From a trace to a document of token ids and back: the one place where text meets the student."""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from research.errors import ConfigError
from research.records import Trace
from research.text.document import Document
from research.text.encoder import TextEncoder
from research.text.formats import layout_of
from research.text.refusals import EmptyChain, MissingAnswer, Refused, TooLong, Unreadable
from research.text.template import AbstractTemplate, Parsed
from research.text.templates import SAMPLE_ANSWER, SAMPLE_CHAIN, SAMPLE_PROBLEM, Chat
from research.text.tokenizer import FILLER, tokenizer_sha256

PLACE = "\x00"  # stands in for a part of a text whose place is looked for


class Codec:
    """Encodes traces as documents and reads completions, for one tokenizer, template and trace format.

    A document is prompt, completion, EOS. Prompt and completion are tokenised apart and joined, so that the ids of
    :meth:`prompt_ids` are a prefix of every document of the same problem. Only the prompt may get a BOS, where the
    tokenizer writes one and the template does not.

    trace_format        one of TRACE_FORMATS. Shuffled and swapped chains come from ``formats.arrange``; the filler is
                        put in here, one token for each token of the chain
    max_tokens          longest document, EOS included; longer ones are refused, never cut
    prompt_loss_weight  what a prompt token counts in the loss beside a completion token's 1, in [0, 1]
    max_prompt_tokens   longer prompts lose their beginning (not the BOS) and keep their end, at generation too; None:
                        prompts are never cut
    allow_empty_chain   write a trace without chain as ``answer_only`` instead of refusing it
    extra_eos           further tokens, as ids or text, that end a completion when a model writes them

    layout      one of LAYOUTS
    eos_ids     ids that end a completion. Documents end in the first: the end of the assistant's turn under a chat
                template that has one, else the tokenizer's EOS
    pad_id      id of padding; may be an EOS, since padding is told by its segment and never by its id
    vocab_size  ids lie below it: the least width of a model's logits
    mark        what stands behind every problem; see :meth:`marked`

    Raises ConfigError or ValueError for options that cannot work, and for a chat template whose preflight fails.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: AbstractTemplate,
        *,
        trace_format: str = "chain_then_answer",
        max_tokens: int = 512,
        prompt_loss_weight: float = 0.0,
        max_prompt_tokens: int | None = None,
        allow_empty_chain: bool = False,
        extra_eos: Sequence[int | str] = (),
    ) -> None:
        if not 0 <= prompt_loss_weight <= 1:
            raise ValueError(f"prompt_loss_weight={prompt_loss_weight!r}: give a number from 0 to 1")
        if max_tokens < 3:
            raise ValueError(f"max_tokens={max_tokens!r}: give at least 3, a prompt, an answer and EOS")
        self.layout = layout_of(trace_format)
        self.tokenizer, self.template, self.trace_format = tokenizer, template, trace_format
        self.max_tokens, self.prompt_loss_weight = max_tokens, prompt_loss_weight
        self.max_prompt_tokens, self.allow_empty_chain = max_prompt_tokens, allow_empty_chain
        self.mark = ""
        self.encoder = TextEncoder(tokenizer)
        self._before = self.encoder.special_end(template.prompt(SAMPLE_PROBLEM))
        self.bos_ids = () if isinstance(template, Chat) else self.encoder.bos_ids
        self.eos_ids = self._eos_ids(extra_eos)
        self.pad_id: int = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._filler_id = self._single_token(FILLER) if trace_format == "filler_then_answer" else None
        if max_prompt_tokens is not None:
            self._check_prompt_room(max_prompt_tokens)

    def facts(self) -> dict[str, Any]:
        """What a language model must fit: sizes and special ids of the tokenizer, and its identity."""
        return {
            "vocab_size": self.vocab_size,
            "eos_token_id": list(self.eos_ids) if len(self.eos_ids) > 1 else self.eos_ids[0],
            "pad_token_id": self.pad_id,
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
        }

    # -- writing ------------------------------------------------------------------------------------------------------

    def marked(self, mark: str) -> "Codec":
        """The same codec, which asks for a mode: ``mark`` stands behind every problem; "": behind none."""
        other = copy.copy(self)
        other.mark = mark
        return other

    def prompt(self, problem_text: str) -> str:
        """A problem as it is posed, in words."""
        return self.template.prompt(problem_text + self.mark)

    def prompt_ids(self, problem_text: str) -> list[int]:
        """The ids that generation starts from. Raises ControlToken or UnknownCharacter."""
        self.encoder.refuse_control_tokens(problem_text, "problem")
        ids = self.encoder.start(self.prompt(problem_text))
        if self.max_prompt_tokens is not None:
            ids = ids[-(self.max_prompt_tokens - len(self.bos_ids)) :]
        return [*self.bos_ids, *ids]

    def encode(self, trace: Trace) -> Document:
        """The document of a trace.

        Raises a Refused (a ValueError whose ``reason`` is a word to count by): EmptyChain, MissingAnswer, TooLong,
        UnknownCharacter, ControlToken, Unreadable.
        """
        body = self._completion_ids(trace)
        return self._join(self.prompt_ids(trace.problem), body, trace.index)

    def encode_all(self, traces: Iterable[Trace]) -> tuple[list[Document], Counter[str]]:
        """The documents of those traces that have one, in order, and how many were refused for which reason."""
        refused = Counter[str]()
        return list(self.encode_each(traces, refused)), refused

    def encode_each(self, traces: Iterable[Trace], refused: Counter[str]) -> Iterator[Document]:
        """The same one by one; ``refused`` counts along."""
        for trace in traces:
            try:
                document = self.encode(trace)
            except Refused as error:
                refused[error.reason] += 1
            else:
                yield document

    def join(self, problem_text: str, completion_ids: Sequence[int], index: int) -> Document:
        """The document of a prompt and the ids that a model wrote after it: the same ids, never decoded and re-encoded.

        They count up to their first EOS; without any they stay without, as a truncated completion should.
        Raises what :meth:`prompt_ids` does, and TooLong.
        """
        return self._join(self.prompt_ids(problem_text), self._ended(completion_ids, keep_eos=True), index, eos=())

    # -- reading ------------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion's ids up to their first EOS, without padding; other special tokens stay visible."""
        kept = [token for token in self._ended(ids, keep_eos=False) if token != self.pad_id]
        text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, EOS and padding included: what a page shows token by token."""
        pieces = self.tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
        return [str(piece) for piece in pieces]

    def parse(self, text: str) -> Parsed:
        """Chain and answer of a completion's text; see the template for the rules."""
        return self.template.parse(text, self.layout)

    # -- identity -----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """sha256 of what decides the ids of a trace: where it is equal, equal traces give equal documents.

        ``max_tokens`` and ``prompt_loss_weight`` are no part of it: they say which documents are kept and what they
        weigh.
        """
        told = {
            "tokenizer": tokenizer_sha256(self.tokenizer),
            "template": type(self.template).__name__,
            "prompt": self.prompt(SAMPLE_PROBLEM),
            "completion": [self.template.completion(SAMPLE_CHAIN, SAMPLE_ANSWER, self.layout)],
            "trace_format": self.trace_format,
            "max_prompt_tokens": self.max_prompt_tokens,
            "allow_empty_chain": self.allow_empty_chain,
            "eos_ids": list(self.eos_ids),
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    # -- parts --------------------------------------------------------------------------------------------------------

    def _completion_ids(self, trace: Trace) -> list[int]:
        layout = self._layout_for(trace)
        self.encoder.refuse_control_tokens(trace.chain, "chain")
        self.encoder.refuse_control_tokens(trace.answer, "answer")
        text = self.template.completion(trace.chain, trace.answer, layout)
        read = self.template.parse(text, layout)
        expected = Parsed("" if layout == "answer_only" else trace.chain.strip(), trace.answer.strip())
        if read != expected:
            raise Unreadable(
                f"trace {trace.index}: written with {type(self.template).__name__} in {layout}, chain and answer would "
                f"be read back as {read}, not as {expected}: they hold marks of the template; take another template, "
                "or leave the trace out"
            )
        if self._filler_id is None or layout == "answer_only":
            return self.encoder.middle(text, self._before)
        return self._filled(trace, layout, text)

    def _layout_for(self, trace: Trace) -> str:
        if not trace.answer.strip():
            raise MissingAnswer(f"trace {trace.index} has no answer; give one, or leave it out")
        if trace.chain.strip() or self.layout == "answer_only":
            return self.layout
        if self.allow_empty_chain:
            return "answer_only"
        raise EmptyChain(
            f"trace {trace.index} has no chain, which trace_format={self.trace_format} writes; take "
            "trace_format=answer_only, set allow_empty_chain=true, or leave it out"
        )

    def _filled(self, trace: Trace, layout: str, text: str) -> list[int]:
        """The ids of ``text``, with the filler for every token that lies in the chain and holds nothing else."""
        start = self.template.completion(PLACE, trace.answer, layout).index(PLACE)
        end = start + len(trace.chain)
        ids, spans = self.encoder.middle_spans(text, self._before)
        filler = self._filler_id if self._filler_id is not None else 0
        return [
            filler if start <= first and last <= end else token for token, (first, last) in zip(ids, spans, strict=True)
        ]

    def _join(self, prompt: list[int], body: Sequence[int], index: int, eos: Sequence[int] | None = None) -> Document:
        ids = (*prompt, *body, *(self.eos_ids[:1] if eos is None else eos))
        if len(ids) > self.max_tokens:
            raise TooLong(
                f"trace {index} takes {len(ids)} tokens, {len(prompt)} of them prompt, and max_tokens is "
                f"{self.max_tokens}; raise max_tokens, or leave the trace out"
            )
        return Document(ids, len(prompt), index)

    def _ended(self, ids: Sequence[int], keep_eos: bool) -> list[int]:
        for place, token in enumerate(ids):
            if token in self.eos_ids:
                return list(ids[: place + keep_eos])
        return list(ids)

    def _eos_ids(self, extra: Sequence[int | str]) -> tuple[int, ...]:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no EOS token, so that a student could never learn to stop; "
                'set one first: tokenizer.eos_token = "..."'
            )
        turn_end = self.template.check(self.layout).end if isinstance(self.template, Chat) else None
        tokens: list[int | str] = [*([turn_end] if turn_end else []), self.tokenizer.eos_token_id, *extra]
        ids = [token if isinstance(token, int) else self._special_id(token) for token in tokens]
        return tuple(dict.fromkeys(ids))

    def _special_id(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ConfigError(f"extra_eos holds {token!r}, which is no token of the tokenizer; give a token or its id")
        return int(found)

    def _single_token(self, text: str) -> int:
        try:
            ids = self.encoder.middle(text)
        except Refused:
            ids = []
        if len(ids) != 1:
            raise ConfigError(
                f"trace_format=filler_then_answer: the tokenizer has no single token for the filler {text!r}; "
                "add it to the alphabet, or take another tokenizer"
            )
        return ids[0]

    def _check_prompt_room(self, max_prompt_tokens: int) -> None:
        """Refuse a limit that would cut into what the template writes after the problem."""
        marker = self.template.prompt(SAMPLE_PROBLEM).rpartition(SAMPLE_PROBLEM)[2]
        needed = len(self.bos_ids) + len(self.encoder.middle(marker)) + 1
        if not needed <= max_prompt_tokens < self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens={max_prompt_tokens!r}: give at least {needed}, the template's text after the "
                f"problem and one token of it, and less than max_tokens={self.max_tokens}"
            )
