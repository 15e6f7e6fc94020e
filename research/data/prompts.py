"""Problems as the student and its teacher are asked them, and stored traces behind the teacher's own prompts."""

from collections import Counter
from collections.abc import Iterable, Sequence

from research.data.splits import DataError
from research.records import Problem, PromptRow, StoredRow, Trace
from research.text.codec import Codec
from research.text.document import Document
from research.text.refusals import Refused, TooLong


def posed(
    problems: Sequence[Problem], codec: Codec, teacher_codec: Codec, task_name: str, modes: Sequence[str | None]
) -> tuple[list[PromptRow], Counter[str]]:
    """The prompts of those problems that can be posed, in order, and how many cannot, by reason.

    A prompt has to leave room for a token of the answer. ``teacher_codec`` is ``codec`` itself where the teacher is
    asked as the student is; ``modes`` says for each problem in which mode both are asked, each in the words of its own
    template. Raises DataError where there is no problem at all, or none that can be posed.
    """
    rows, refused = [], Counter[str]()
    for problem, mode in zip(problems, modes, strict=True):
        try:
            ids = _in_mode(codec, mode).prompt_ids(problem.text)
            teacher_ids = ids if teacher_codec is codec else _in_mode(teacher_codec, mode).prompt_ids(problem.text)
        except Refused as error:
            refused[error.reason] += 1
            continue
        if len(ids) >= codec.max_tokens:
            refused[TooLong.reason] += 1
            continue
        rows.append(PromptRow(problem, tuple(ids), tuple(teacher_ids)))
    if not rows:
        told = ", ".join(f"{count} {reason}" for reason, count in refused.items()) or "there is none"
        raise DataError(
            f"no train problem of {task_name} can be posed ({told}): raise data.num_train or data.max_tokens, or take "
            "another template or tokenizer"
        )
    return rows, refused


def _in_mode(codec: Codec, mode: str | None) -> Codec:
    return codec if mode is None else codec.marked(codec.template.mode_marks[mode])


def stored_rows(
    documents: Iterable[Document], traces: Sequence[Trace], codec: Codec, teacher_codec: Codec, *, in_modes: bool
) -> list[StoredRow]:
    """Train documents, each with the prompt that the teacher would have read instead.

    traces    those that the documents were made of, each at its document's ``index``; not looked at where the teacher
              is asked as the student is
    in_modes  whether each document asks for a mode, which its teacher is then asked for too
    """
    rows = []
    for document in documents:
        prompt = document.ids[: document.prompt_length]
        if teacher_codec is not codec:
            problem = traces[document.index].problem
            mode = _mode_of(prompt, problem, codec) if in_modes else None
            prompt = tuple(_in_mode(teacher_codec, mode).prompt_ids(problem))
        rows.append(StoredRow(document.ids, document.prompt_length, document.index, prompt))
    return rows


def _mode_of(prompt: Sequence[int], problem: str, codec: Codec) -> str:
    """The mode that a prompt asks for: that in whose words it is the problem's."""
    for mode in codec.template.mode_marks:
        if _in_mode(codec, mode).prompt_ids(problem) == list(prompt):
            return str(mode)
    raise RuntimeError(f"the prompt of the problem {problem!r} asks for no mode")
