"""Whether a teacher and a student speak of the same tokens, end alike, and are asked in ways that fit."""

from collections.abc import Mapping
from typing import Any

from research.data.traces import TraceData
from research.errors import ConfigError
from research.evaluation.findings import Finding, ok, refusal, skipped, warning
from research.evaluation.teacher_folder import TeacherFolder
from research.teachers.base import AbstractTeacher
from research.teachers.served import ServedTeacher
from research.text.codec import Codec
from research.text.templates import END_THINK, SAMPLE_CHAIN, THINK, Chat
from research.text.tokenizer import tokenizer_sha256

PROBED = 256  # most ids that a server is asked to spell
UNREADABLE = "�"  # a token of half a character, which servers spell in ways of their own


def tokens(teacher: AbstractTeacher, folder: TeacherFolder, codec: Codec) -> Finding:
    """Whether an id stands for the same text on both sides: by tokenizer, else id by id, else by a server's words."""
    if isinstance(teacher, ServedTeacher):
        return _served_tokens(teacher, codec)
    if folder.tokenizer is None:
        return skipped("tokens", f"no tokenizer lies beside the teacher's weights ({teacher.identity.source})")
    if tokenizer_sha256(folder.tokenizer) == tokenizer_sha256(codec.tokenizer):
        return ok("tokens", f"one tokenizer of {codec.vocab_size} tokens")
    own, its = _spelled(codec.tokenizer), _spelled(folder.tokenizer)
    return _compared(own, its, "the tokenizers differ elsewhere, every id of the data means the same in both")


def vocabulary(student_width: int | None, teacher: AbstractTeacher, folder: TeacherFolder, codec: Codec) -> Finding:
    """Whether both heads have the data's tokens, and what was cut from a padded one."""
    sizes = {"the tokenizer": codec.vocab_size, "the teacher": teacher.num_classes}
    sizes |= {} if student_width is None else {"the student": student_width}
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if len(set(sizes.values())) > 1:
        return refusal("vocabulary", f"different numbers of tokens: {told}; a divergence compares equal lists")
    padding = (folder.head_rows or codec.vocab_size) - codec.vocab_size
    cut = f"; the teacher's head is padded by {padding} rows, which are cut off" if padding > 0 else ""
    return ok("vocabulary", f"{codec.vocab_size} tokens{cut}")


def end_of_text(folder: TeacherFolder, codec: Codec, teacher_codec: Codec) -> Finding:
    """Whether the token that ends the student's documents ends the teacher's too."""
    own, its = codec.eos_ids[0], teacher_codec.eos_ids[0]
    names = codec.tokenizer.convert_ids_to_tokens
    if own != its:
        return refusal(
            "eos",
            f"the student's documents end in {names(own)!r} ({own}), under its own template the teacher's end in "
            f"{names(its)!r} ({its}): it would never let the student stop; give both a template with one end",
        )
    if folder.eos_ids is not None and own not in folder.eos_ids:
        declared = ", ".join(f"{names(token)!r} ({token})" for token in folder.eos_ids)
        return refusal(
            "eos",
            f"the student's documents end in {names(own)!r} ({own}), the teacher stops at {declared}: it would never "
            "let the student stop; choose a template that ends as the teacher's does",
        )
    return ok("eos", f"both end in {names(own)!r} ({own})")


def templates(folder: TeacherFolder, codec: Codec, teacher_codec: Codec) -> Finding:
    """Whether the teacher is asked as it was taught, and the reasoning of a finished turn is kept."""
    for side, each in (("student", codec), ("teacher", teacher_codec)):
        if isinstance(each.template, Chat) and SAMPLE_CHAIN not in each.template.check(each.layout).rendered:
            return warning("template", f"the {side}'s chat template drops the reasoning of a finished turn")
    name = type(teacher_codec.template).__name__
    if folder.template is not None and folder.template != name:
        return warning(
            "template",
            f"the teacher's run trained under the template {folder.template}, it is asked under {name}; give it its "
            "own with teacher_template",
        )
    if folder.trace_format is not None and folder.trace_format != teacher_codec.trace_format:
        return warning(
            "template",
            f"the teacher's run trained on {folder.trace_format}, the data are {teacher_codec.trace_format}: it has "
            "never seen such text",
        )
    if folder.template is None and getattr(folder.tokenizer, "chat_template", None) and name != "Chat":
        return warning(
            "template", f"the teacher has a chat template of its own and is asked under {name}; see teacher_template"
        )
    return ok("template", f"the teacher is asked under {name}, the student under {type(codec.template).__name__}")


def thinking(prompts: Mapping[str, str], problem: str) -> Finding:
    """Whether both prompts leave the same reasoning tags to be written."""
    modes = {side: thinking_mode(prompt, problem) for side, prompt in prompts.items()}
    if len(set(modes.values())) == 1:
        return ok("thinking", f"both prompts {next(iter(modes.values()))}")
    told = ", the ".join(f"{side}'s prompt {mode}" for side, mode in modes.items())
    return warning(
        "thinking", f"the {told}: what the student writes is no answer to the teacher's prompt; see template.options"
    )


def thinking_mode(prompt: str, problem: str) -> str:
    """What a prompt does with reasoning after it has posed the problem."""
    after = prompt.rpartition(problem)[2]
    if THINK not in after:
        return "leaves reasoning to the answer"
    return "closes the reasoning" if END_THINK in after.rpartition(THINK)[2] else "opens the reasoning"


def codecs(data: TraceData) -> tuple[Codec, Codec] | Finding:
    """The student's and the teacher's codec, or the refusal where a template is of no use."""
    try:
        return data.codec, data.teacher_codec
    except ConfigError as error:
        return refusal("template", str(error))


def _spelled(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _compared(own: Mapping[int, str], its: Mapping[int, str], same: str) -> Finding:
    wrong = sorted(number for number, text in own.items() if its.get(number) != text)
    if not wrong:
        return ok("tokens", same)
    shown = ", ".join(f"{number} is {own[number]!r} here and {its.get(number)!r} there" for number in wrong[:3])
    return refusal(
        "tokens",
        f"{len(wrong)} of {len(own)} ids mean other text to the teacher: {shown}. Give data.tokenizer the teacher's, "
        "or a teacher of the same tokenizer",
    )


def _served_tokens(teacher: ServedTeacher, codec: Codec) -> Finding:
    """A server says what its ids spell; tokens of half a character are left out."""
    step = max(1, -(-codec.vocab_size // PROBED))
    ids = [token for token in range(0, codec.vocab_size, step) if token not in codec.tokenizer.all_special_ids]
    own = dict(zip(ids, codec.pieces(ids), strict=True))
    own = {token: text for token, text in own.items() if text and UNREADABLE not in text}
    its = {token: text for token, text in teacher.pieces(list(own)).items() if text and UNREADABLE not in text}
    if not its:
        return warning("tokens", "the server does not say what its ids spell: nothing shows that they mean the same")
    return _compared({token: own[token] for token in its}, its, f"{len(its)} ids spell the same on the server")
