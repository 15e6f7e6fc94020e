"""One tokenizer, and how problems and traces are written with it for the student and for the teacher."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

from research.data.modes import Modes
from research.errors import ConfigError
from research.tasks.base import AbstractTask
from research.text.codec import Codec
from research.text.template import AbstractTemplate
from research.text.tokenizer import build_tokenizer


class Codecs:
    """Both codecs, made when they are first asked for.

    task, modes, trace_format, tokenizer, vocab_size, max_tokens, prompt_loss_weight, max_prompt_tokens, extra_eos   as
            of ``TraceData``
    template, teacher_template   of the student and of the teacher, or factories that want the tokenizer; None: the
                                 teacher is asked as the student is
    texts   what a BPE is trained on; called where there is one

    Raises ConfigError, naming the key, for a tokenizer that cannot write the task.
    """

    def __init__(
        self,
        task: AbstractTask,
        template: AbstractTemplate | Any,
        teacher_template: AbstractTemplate | Any,
        modes: Modes,
        *,
        tokenizer: str,
        vocab_size: int,
        texts: Callable[[], Iterable[str]],
        trace_format: str,
        max_tokens: int,
        prompt_loss_weight: float,
        max_prompt_tokens: int | None,
        extra_eos: Sequence[int | str],
    ) -> None:
        self._task, self._template, self._teacher_template, self._modes = task, template, teacher_template, modes
        self._tokenizer_kind, self._vocab_size, self._texts = tokenizer, vocab_size, texts
        self._options: dict[str, Any] = {
            "trace_format": trace_format,
            "max_tokens": max_tokens,
            "prompt_loss_weight": prompt_loss_weight,
            "max_prompt_tokens": max_prompt_tokens,
            "extra_eos": tuple(extra_eos),
            "allow_empty_chain": modes.mixture is not None,
        }

    @cached_property
    def student(self) -> Codec:
        """The student's, which poses problems in the mode that is asked for."""
        codec = self._codec_of(self._build_tokenizer(), self._template)
        return codec.marked(self._modes.mark(codec.template))

    @cached_property
    def teacher(self) -> Codec:
        """The same tokens and mode, other words around a problem; the student's own where it has no template."""
        if self._teacher_template is None:
            return self.student
        codec = self._codec_of(self.student.tokenizer, self._teacher_template)
        return codec.marked(self._modes.mark(codec.template))

    def _codec_of(self, tokenizer: Any, template: Any) -> Codec:
        template = template(tokenizer=tokenizer) if isinstance(template, partial) else template
        return Codec(tokenizer, template, **self._options)

    def _build_tokenizer(self) -> Any:
        kind, task = self._tokenizer_kind, self._task
        if kind == "characters":
            if task.alphabet is None:
                raise ConfigError(
                    f"data.tokenizer is characters, but {task.name} has open text; give bpe or a pretrained folder"
                )
            written = [getattr(template, "alphabet", "") for template in (self._template, self._teacher_template)]
            written.append(self._modes.alphabet(self._template, task.alphabet))
            return build_tokenizer(kind, alphabet="".join(sorted({*task.alphabet, *"".join(written)})))
        if kind == "bpe":
            return build_tokenizer(kind, texts=self._texts(), vocab_size=self._vocab_size)
        return build_tokenizer(kind)
