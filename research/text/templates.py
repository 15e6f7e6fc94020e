"""The templates. Text around a problem and its solution, and the rules by which written text is read back.

Reading never searches for a known answer: an answer is what stands at the place the layout gives it, whole and without
the blanks around it. It is None where the mark of that place is missing, where nothing follows the mark, or where the
text goes on to pose a problem of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from research.errors import ConfigError
from research.text.template import LAYOUTS, AbstractTemplate, Parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Instruction:\n"
RESPONSE = "\n\n### Response:\n"
ANSWER_LINE = re.compile(r"^Answer:[ \t]*", re.MULTILINE)
THINK, END_THINK = "<think>", "</think>"
SAMPLE_PROBLEM, SAMPLE_CHAIN, SAMPLE_ANSWER = "Add 2, 3 and 4.", "2 + 3 = 5\n5 + 4 = 9", "It is 9."


class Plain(AbstractTemplate):
    """Symbolic tasks, one character a token: ``17+32-09=49;40#40``.

    The problem may hold anything. Chain and answer hold no ``=``, which asks, and no ``#``, which announces the
    answer; an answer that stands before its chain holds no ``:`` either.

    Reading: the *first* ``#`` ends the chain and everything after it is the answer, so that a second ``#`` spoils the
    answer instead of choosing another. Where the answer comes first or alone, ``#`` must be the first character, and
    the first ``:`` ends the answer. Text with ``=`` in it has no answer.
    """

    alphabet = "=#:;"  # the marks of the modes apart: only students that have modes know them
    step_separator = ";"
    mode_marks: ClassVar[Mapping[str, str]] = {"think": "T", "no_think": "N"}

    def prompt(self, problem: str) -> str:
        return f"{problem}="

    def completion(self, chain: str, answer: str, layout: str) -> str:
        _check_layout(layout)
        if layout == "chain_then_answer":
            return f"{chain}#{answer}"
        return f"#{answer}:{chain}" if layout == "answer_then_chain" else f"#{answer}"

    def marks(self, layout: str) -> tuple[str, ...]:
        return "=", *{"chain_then_answer": "#", "answer_then_chain": ":"}.get(layout, "")

    def parse(self, text: str, layout: str) -> Parsed:
        _check_layout(layout)
        before, mark, after = text.partition("#")
        if layout == "chain_then_answer":
            chain, answer = before, after
        elif before.strip():
            chain, answer, mark = "", "", ""
        else:
            answer, _, chain = after.partition(":") if layout == "answer_then_chain" else (after, "", "")
        return _parsed(chain, answer if mark and "=" not in text else None)


class Alpaca(AbstractTemplate):
    """Instruction and response headers; chain, blank line, ``Answer: `` and the answer (claims C14).

    Reading: a mark is ``Answer:`` at the start of a line. After a chain the *last* mark counts, and everything after it
    is the answer. Where the answer comes first or alone, the text must open with the mark, and the first blank line
    ends the answer or nothing does. Text that goes on to another ``### Instruction:`` has no answer.
    """

    alphabet = "".join(sorted(set(INSTRUCTION + RESPONSE + "Answer: ")))
    step_separator = "\n"

    def prompt(self, problem: str) -> str:
        return f"{INSTRUCTION}{problem}{RESPONSE}"

    def completion(self, chain: str, answer: str, layout: str) -> str:
        _check_layout(layout)
        if layout == "chain_then_answer":
            return f"{chain}\n\nAnswer: {answer}"
        return f"Answer: {answer}\n\n{chain}" if layout == "answer_then_chain" else f"Answer: {answer}"

    def marks(self, layout: str) -> tuple[str, ...]:
        return *(["Answer:"] if layout == "chain_then_answer" else []), INSTRUCTION.rstrip()

    def parse(self, text: str, layout: str) -> Parsed:
        _check_layout(layout)
        if layout == "chain_then_answer":
            marks = list(ANSWER_LINE.finditer(text))
            if not marks:
                return _parsed(text, None)
            chain, answer = text[: marks[-1].start()], text[marks[-1].end() :]
        else:
            text = text.lstrip()
            mark = ANSWER_LINE.match(text)
            if mark is None:
                return _parsed("", None)
            answer, chain = text[mark.end() :], ""
            if layout == "answer_then_chain":
                answer, _, chain = answer.partition("\n\n")
        return _parsed(chain, None if _poses_a_problem(text) else answer)


class Think(AbstractTemplate):
    """The headers of :class:`Alpaca`; the chain between ``<think>`` tags, then the answer. The tags are graded tokens.

    The answer alone follows an empty pair of tags, and so says that it comes without reasoning.

    Reading: the *last* ``</think>`` ends the chain and everything after it is the answer, unless a further ``<think>``
    opens in it: then there is none. Where the answer comes first, it is everything before the *first* ``<think>``.
    Text that goes on to another ``### Instruction:`` has no answer.
    """

    alphabet = "".join(sorted(set(INSTRUCTION + RESPONSE + THINK + END_THINK)))
    step_separator = "\n"

    def prompt(self, problem: str) -> str:
        return f"{INSTRUCTION}{problem}{RESPONSE}"

    def completion(self, chain: str, answer: str, layout: str) -> str:
        return _with_tags(chain, answer, layout)

    def marks(self, layout: str) -> tuple[str, ...]:
        return *_tags(layout), INSTRUCTION.rstrip()

    def parse(self, text: str, layout: str) -> Parsed:
        read = _read_tags(text, layout)
        return Parsed(read.chain, None) if _poses_a_problem(text) else read


@dataclass(frozen=True)
class Turn:
    """What a preflight found out about the assistant's turn of a chat template, for one layout.

    given     the start of the reply that the generation prompt writes already, such as ``<think>`` and a newline
    lead      blanks that the template puts before a reply, and that the model has to write
    tail      blanks that it puts between a reply and ``end``
    end       the special token that ends the turn; None where the template writes none
    rendered  the sample conversation as the template writes it
    """

    given: str
    lead: str
    tail: str
    end: str | None
    rendered: str


class Chat(AbstractTemplate):
    """The chat template of a Hugging Face tokenizer; the reply is laid out and read as in :class:`Think`.

    The prompt is the template's own generation prompt, special tokens included. The reply is appended to it and never
    passed through the template, which may drop the reasoning of earlier turns; where the prompt opens the reasoning
    itself, the reply does not open it again.

    system            text of a system turn; "": none
    options           further values for the template, such as ``enable_thinking`` or ``date_string``
    accept_rewriting  take a template that drops or rewraps the reasoning of a finished turn all the same: prompts and
                      replies are still right, but whoever renders finished conversations with it gets other text

    Raises ConfigError where the tokenizer has no chat template, and in :meth:`check`.
    """

    alphabet = ""  # the tokenizer brings the template's text along
    step_separator = "\n"

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        system: str = "",
        options: Mapping[str, Any] | None = None,
        accept_rewriting: bool = False,
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template; take template=alpaca or template=think")
        self.tokenizer = tokenizer
        self.system = system
        self.options = dict(options or {})
        self.accept_rewriting = accept_rewriting
        self._turns: dict[str, Turn] = {}

    def prompt(self, problem: str) -> str:
        return self._render([("user", problem)], True)

    def completion(self, chain: str, answer: str, layout: str) -> str:
        turn = self.check(layout)
        return turn.lead + _with_tags(chain, answer, layout).removeprefix(turn.given) + turn.tail

    def marks(self, layout: str) -> tuple[str, ...]:
        return _tags(layout)

    def parse(self, text: str, layout: str) -> Parsed:
        return _read_tags(self.check(layout).given + text, layout)

    def check(self, layout: str = "chain_then_answer") -> Turn:
        """The preflight: one sample conversation rendered, once per layout.

        Raises ConfigError, with the rendered text, where the template drops the problem, drops or rewraps the
        reasoning, or where its generation prompt leaves no room for the layout (it closes the reasoning, or opens it
        before an answer that is to come first).
        """
        if layout not in self._turns:
            self._turns[layout] = self._preflight(layout)
        return self._turns[layout]

    def _preflight(self, layout: str) -> Turn:
        prompt, reply = self.prompt(SAMPLE_PROBLEM), _with_tags(SAMPLE_CHAIN, SAMPLE_ANSWER, layout)
        before, found, header = prompt.rpartition(SAMPLE_PROBLEM)
        if not found:
            raise ConfigError(f"the chat template drops the problem. It renders:\n{prompt}")
        opening = reply.partition(SAMPLE_ANSWER if layout == "answer_only" else SAMPLE_CHAIN)[0]
        given = "" if layout == "answer_then_chain" else _overlap(header, opening)
        if THINK in header.removesuffix(given) or END_THINK in header.removesuffix(given):
            raise ConfigError(
                f"the chat template's generation prompt leaves no room for {layout}: it writes reasoning tags of its "
                f"own (see template.options, such as enable_thinking). It renders:\n{prompt}"
            )
        rendered = self._render([("user", SAMPLE_PROBLEM), ("assistant", reply)], False)
        start = (before + found + header).removesuffix(given)
        blanks, kept, rest = rendered.removeprefix(start).partition(reply)
        if rendered.startswith(start) and kept and not blanks.strip():
            end = next((token for token in self._specials() if rest.lstrip().startswith(token)), None)
            return Turn(given, blanks, rest[: len(rest) - len(rest.lstrip())] if end else "", end, rendered)
        if self.accept_rewriting:
            return Turn(given, "", "", None, rendered)
        raise ConfigError(
            "the chat template drops or rewraps the reasoning of a finished turn. "
            f"Given:\n{start}{reply}\nit renders:\n{rendered}\n"
            "Take another template, or set accept_rewriting=true: replies are then appended to its generation prompt"
        )

    def _specials(self) -> list[str]:
        """Special tokens, the longest first, so that none hides behind another that it begins with."""
        return sorted(map(str, self.tokenizer.all_special_tokens), key=len, reverse=True)

    def _render(self, turns: list[tuple[str, str]], generation: bool) -> str:
        told = ([("system", self.system)] if self.system else []) + turns
        messages = [{"role": role, "content": content} for role, content in told]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation, tokenize=False, **self.options
            )
        except Exception as error:  # a template is a program of its own: it raises whatever it likes
            roles = ", ".join(role for role, _ in told)
            raise ConfigError(f"the chat template cannot render turns of {roles}: {error}") from error
        return str(text)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: give one of {', '.join(LAYOUTS)}")


def _parsed(chain: str, answer: str | None) -> Parsed:
    return Parsed(chain.strip(), (answer or "").strip() or None)


def _poses_a_problem(text: str) -> bool:
    return INSTRUCTION.rstrip() in text


def _with_tags(chain: str, answer: str, layout: str) -> str:
    _check_layout(layout)
    if layout == "answer_then_chain":
        return f"{answer}\n\n{THINK}\n{chain}\n{END_THINK}"
    return f"{THINK}\n{chain if layout == 'chain_then_answer' else ''}\n{END_THINK}\n\n{answer}"


def _tags(layout: str) -> tuple[str, ...]:
    """The tags that reading goes by: in the answer that comes first, the opening one alone."""
    return (THINK,) if layout == "answer_then_chain" else (THINK, END_THINK)


def _read_tags(text: str, layout: str) -> Parsed:
    _check_layout(layout)
    if layout == "answer_then_chain":
        answer, mark, chain = text.partition(THINK)
        return _parsed(chain.rpartition(END_THINK)[0] or chain, answer if mark else None)
    chain, mark, answer = text.rpartition(END_THINK)
    if not mark:
        return _parsed(text.lstrip().removeprefix(THINK), None)
    return _parsed(chain.lstrip().removeprefix(THINK), None if THINK in answer else answer)


def _overlap(first: str, second: str) -> str:
    """The longest end of ``first`` that ``second`` starts with."""
    return next((second[:size] for size in range(len(second), 0, -1) if first.endswith(second[:size])), "")
