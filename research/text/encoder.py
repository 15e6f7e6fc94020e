"""Text to ids without additions: what stands at the start of a document, and what stands in its middle."""

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from research.errors import ConfigError
from research.text.refusals import ControlToken, UnknownCharacter
from research.text.tokenizer import characters_of

ANCHORS = ("\n", ":", "=", ">", "x")  # text before the middle, tried in this order
PROBE = "a"
RARE = "a\ue000"  # with a private character, in no vocabulary: only those that fall back to bytes can write it

Span = tuple[int, int]


class TextEncoder:
    """The ids of a text, from a tokenizer that may add things of its own at a beginning.

    Many tokenizers write a BOS at the start of every text, and those of the SentencePiece kind also a space. Both
    belong to the start of a document; the parts behind it get neither, so that parts tokenised apart are the document.

    bos_ids  what the tokenizer writes at the start of a text, none or one

    Its methods raise UnknownCharacter for text that the tokenizer has no tokens for. Raises ConfigError for a tokenizer
    written in Python alone, and for one that puts a space before every text and keeps none of a few characters apart
    from what follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} is a tokenizer without tokenizer.json, which does not tell the place of "
                "its tokens; take the fast tokenizer of the same vocabulary"
            )
        self.tokenizer = tokenizer
        self.characters = characters_of(tokenizer)
        self.unknown = tokenizer.unk_token or getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        self.unknown_id = None if self.unknown is None else tokenizer.get_vocab().get(str(self.unknown))
        self.loses_text = self.characters is None and self._lost(RARE, self._raw(RARE))
        self.bos_ids = self._bos()
        self.specials = tuple(sorted({str(token) for token in tokenizer.all_special_tokens}))
        self.anchors = () if self.characters is not None else self._anchors()

    def start(self, text: str) -> list[int]:
        """Ids of a text at the start of a document, without BOS (see ``bos_ids``)."""
        return self._encode(text).ids

    def middle(self, text: str, after: str = "") -> list[int]:
        """Ids of a text that follows other text: nothing is put before it.

        ``after``, the special token that it follows directly, where it does: tokenizers that put a space before every
        text may do so behind a special token as well, and there it belongs to the whole.
        """
        anchor, encoding = self._behind(text, after)
        return encoding.ids[len(self._encode(anchor).ids) :] if anchor else encoding.ids

    def middle_spans(self, text: str, after: str = "") -> tuple[list[int], list[Span]]:
        """The ids of :meth:`middle`, and the characters of ``text`` that each of them stands for, as (start, end)."""
        anchor, encoding = self._behind(text, after)
        skipped, cut = len(self._encode(anchor).ids) if anchor else 0, len(anchor)
        return encoding.ids[skipped:], [(start - cut, end - cut) for start, end in encoding.offsets[skipped:]]

    def _behind(self, text: str, after: str) -> tuple[str, Encoding]:
        """A text that can stand before ``text`` ("" where none is needed), and the encoding of both."""
        if not self.anchors or not text:
            return "", self._encode(text)
        for anchor in (after, *self.anchors) if after else self.anchors:
            before, both = self._encode(anchor).ids, self._encode(anchor + text)
            if both.ids[: len(before)] == before:
                return anchor, both
        raise ConfigError(
            f"{type(self.tokenizer).__name__} puts a space before every text and merges each of "
            f"{self.anchors} with {text[:20]!r}: its ids in the middle of a text cannot be told; take another tokenizer"
        )

    def special_end(self, text: str) -> str:
        """The special token that ``text`` ends in; "" where it ends in none."""
        return next((token for token in self.specials if text.endswith(token)), "")

    def refuse_control_tokens(self, text: str, what: str) -> None:
        """Raise ControlToken where ``text`` spells a special token, which would be encoded as that token."""
        for token in self.specials:
            if token in text:
                raise ControlToken(
                    f"the {what} spells the special token {token!r}: {_clipped(text)}; remove it from the text"
                )

    def _encode(self, text: str) -> Encoding:
        if self.characters is not None and not self.characters.issuperset(text):
            self._refuse_unknown(text, self.characters)
        encoding = self._raw(text)
        if self.loses_text and self._lost(text, encoding):
            raise UnknownCharacter(
                f"the tokenizer has no token for a part of {_clipped(text)}; leave the text out, or take a tokenizer "
                "that falls back to bytes"
            )
        return encoding

    def _raw(self, text: str) -> Encoding:
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:  # left over from somebody's call, or saved with the tokenizer
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return backend.encode(text, add_special_tokens=False)

    def _refuse_unknown(self, text: str, known: frozenset[str]) -> None:
        rest = text
        for token in self.specials:  # those that a template writes
            rest = rest.replace(token, "")
        unknown = "".join(sorted(set(rest) - known))
        if unknown:
            raise UnknownCharacter(
                f"the tokenizer has no token for {unknown!r} in {_clipped(text)}; it knows {''.join(sorted(known))!r}: "
                "add the character to the alphabet, or leave the text out"
            )

    def _lost(self, text: str, encoding: Encoding) -> bool:
        """Whether text went into the unknown token or, under tokenizers without one, left no token at all."""
        if self.unknown_id is not None and self.unknown_id in encoding.ids and str(self.unknown) not in text:
            return True
        covered, gaps = 0, []
        for start, end in encoding.offsets:
            gaps.append(text[covered:start])
            covered = max(covered, end)
        return any(gap.strip() for gap in [*gaps, text[covered:]])

    def _bos(self) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        return () if bos is None or self.tokenizer.encode(PROBE)[:1] != [bos] else (int(bos),)

    def _anchors(self) -> tuple[str, ...]:
        """Texts that can stand before a middle; none are needed where nothing is put before a text."""
        alone, usable, differs = self._encode(PROBE).ids, [], False
        for anchor in ANCHORS:
            try:
                before, both = self._encode(anchor).ids, self._encode(anchor + PROBE).ids
            except UnknownCharacter:
                continue
            if both[: len(before)] == before:
                usable.append(anchor)
                differs = differs or both[len(before) :] != alone
        return tuple(usable) if differs else ()


def _clipped(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}...")
