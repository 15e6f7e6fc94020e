"""Why a trace cannot become a document: one named error each, with the reason under which it is counted."""


class Refused(ValueError):
    """A trace that is not encoded. ``reason`` is the word under which dropped rows are counted."""

    reason = "refused"


class TooLong(Refused):
    """More tokens than a document may have. Nothing is cut: an answer's end is what a completion is for."""

    reason = "too_long"


class EmptyChain(Refused):
    """No chain, in a format that writes one."""

    reason = "empty_chain"


class MissingAnswer(Refused):
    """No answer."""

    reason = "missing_answer"


class UnknownCharacter(Refused):
    """Text that the tokenizer has no token for."""

    reason = "unknown_character"


class ControlToken(Refused):
    """Text that spells one of the tokenizer's special tokens and would be encoded as that token."""

    reason = "control_token"


class Unreadable(Refused):
    """A chain or answer that holds the template's own marks, so that it would not be read back as it was written."""

    reason = "unreadable"


def refuse_overlong(where: str, num_tokens: int, longest: int | None) -> None:
    """Raises TooLong for a prompt of more than ``longest`` tokens; None: no limit is known."""
    if longest is not None and num_tokens > longest:
        raise TooLong(
            f"the prompt of {where} has {num_tokens} tokens, and the model has room for an answer behind {longest} at "
            "most; shorten it, drop it, or take a model with a longer context"
        )
