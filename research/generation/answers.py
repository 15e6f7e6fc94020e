"""What an OpenAI-compatible server answers, read with suspicion."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.records import Completion

STOPS = {"stop": "eos", "eos": "eos", "eos_token": "eos", "length": "length", "max_tokens": "length"}
REASONING_FIELDS = ("reasoning_content", "reasoning")  # where a server's parser puts what stood inside <think>


class Malformed(ValueError):
    """An answer that is not what the protocol promises; asking again may help. ``reason`` is what it counts under."""

    def __init__(self, told: str, reason: str = "no choices") -> None:
        super().__init__(told)
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """The completions of one answer, in the order of their index, and the tokens the server says it used."""

    completions: list[Completion]
    prompt_tokens: int
    tokens: int


def read_answer(document: Any, events: Counter[str]) -> Answer:
    """Completions of a decoded JSON answer of `/completions` or `/chat/completions`.

    ``finish_reason`` "stop" becomes "eos" and "length" stays. Anything else (a content filter, a tool call, none) is
    counted in ``events`` by its name and becomes "length": the text did not come to its own end. An answer without
    usage figures counts no tokens and is counted. Raises Malformed.
    """
    choices = document.get("choices") if isinstance(document, Mapping) else None
    if not isinstance(choices, list) or not choices:
        raise Malformed(f"no choices in {str(document)[:300]}")
    if all(isinstance(choice, Mapping) and isinstance(choice.get("index"), int) for choice in choices):
        choices = sorted(choices, key=lambda choice: choice["index"])
    completions = [_completion(choice, events) for choice in choices]
    usage = document.get("usage")
    match usage:
        case {"prompt_tokens": int(prompt_tokens), "completion_tokens": int(tokens)}:
            return Answer(completions, prompt_tokens, tokens)
    events["answers without usage"] += 1
    return Answer(completions, 0, 0)


def _completion(choice: Any, events: Counter[str]) -> Completion:
    if not isinstance(choice, Mapping):
        raise Malformed(f"a choice is {str(choice)[:100]}; expected an object")
    reason = choice.get("finish_reason")
    stop = STOPS.get(str(reason))
    if stop is None:
        events[f"finish_reason {str(reason)[:40]}"] += 1
    ids = choice.get("token_ids")
    known = tuple(ids) if isinstance(ids, list) and all(isinstance(token, int) for token in ids) else ()
    return Completion(known, _text(choice), stop or "length")


def _text(choice: Mapping[str, Any]) -> str:
    """A completion's text; of a chat, reasoning that the server split off is put back in front, in its tags."""
    if isinstance(choice.get("text"), str):
        return str(choice["text"])
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise Malformed(f"a choice has neither text nor message: {str(choice)[:300]}")
    content = message.get("content")
    reasoning = next((message[name] for name in REASONING_FIELDS if isinstance(message.get(name), str)), "")
    if not isinstance(content, str) and not reasoning:
        raise Malformed(f"a message without content: {str(message)[:300]}")
    content = content if isinstance(content, str) else ""
    return f"<think>{reasoning}</think>{content}" if reasoning else content
