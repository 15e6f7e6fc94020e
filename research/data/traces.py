"""Problems with their written solutions: what every language method is trained, validated and evaluated on."""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from research.data.codecs import Codecs
from research.data.modes import Modes
from research.data.prompt_loader import PromptLoader
from research.data.prompts import posed, stored_rows
from research.data.schedule import share_of_rank, training_schedule
from research.data.token_loader import TokenLoader
from research.data.train_documents import train_documents
from research.data.train_traces import TrainTraces
from research.errors import ConfigError
from research.records import Problem, PromptRow, StoredRow, Trace
from research.tasks.base import AbstractTask, Split, problems_for
from research.text.codec import Codec
from research.text.compact import CompactDocuments, lengths
from research.text.document import Document
from research.text.formats import TRACE_FORMATS
from research.text.template import AbstractTemplate
from research.text.tokenizer import tokenizer_sha256

SCORED_ROWS = 256  # documents of a batch that is scored and not trained on, where their logits allow it
LOGITS_AT_ONCE = 2**28  # that scoring may write out: 1 GiB in float32


class TraceData(L.LightningDataModule):
    """Traces to train on, and held-out problems to validate and test on.

    task, template    whose problems, and how they are written; see ``research.tasks`` and ``research.text``
    store             folder of a trace store (``distill traces``), a JSONL file, or ``released:NAME`` for real traces
                      in the data folder (see ``research.tasks.released``), ``released:NAME:correct`` for those of them
                      with a right answer; None: the task's own chains
    mixture           several stores in the place of one: a list of {store: FOLDER, weight: W}, or of {store: FOLDER,
                      count: N}, each with a name of its own if wanted; see :class:`Mixture`. By weight, num_train is
                      their total (null: as many as fit without repeating any); by count, the limit that their sum must
                      not pass. ``mixture_seed``: which traces are taken, and how the stores interleave
    trace_format      the arm of every ablation: chain_then_answer | answer_then_chain | answer_only | ...
    prompt_loss_weight   what a prompt's token counts in the loss, 0 to 1
    num_train         traces to train on, the first of the store or of the task; None: all
    num_val, num_test problems of the task's own validation and test splits; None: all
    problem_seed      which problems a generated task draws; ``format_seed``: which chains are shuffled and swapped
    seed              order of the documents
    tokenizer         characters | bpe | a pretrained folder or hub id; vocab_size for bpe, trained on the train texts
    max_tokens        longest document; a longer one is dropped and counted, never cut. So is a trace of a problem that
                      validation or test poses (``held_out``)
    max_prompt_tokens longer prompts lose their beginning, never their end; null: none is cut, and one that leaves no
                      room is dropped and counted
    extra_eos         further tokens that end what a model writes, as ids or text
    batch_size        documents per optimizer step, over all ranks and accumulated micro-batches
    packed_to, length_grouping   see :class:`TokenLoader`
    num_prompts       0: train on traces. n: problems of the train split per optimizer step, for the student to answer
    steps_per_rollout optimizer steps in a row that share their prompts
    num_stored        traces beside the prompts of a step, for a method that takes some steps off policy
    teacher_template  how the teacher was taught to be asked, where that is not ``template``
    modes, mode       two | unmarked, and think | no_think | both, see :class:`Modes`; ``format_seed`` draws the halves

    ``index`` of a train document is the place of its trace in :meth:`traces`, and one document's own: the trace there
    has the index of its problem, which several samples of one problem share, and the number of its sample. For a task's
    own chains the two are one number. ``index`` of another document is that of its problem in the task's split.

    Raises ConfigError and DataError, naming the key, where nothing is left to train on.
    """

    def __init__(
        self,
        *,
        task: AbstractTask,
        template: AbstractTemplate | Any,
        seed: int = 0,
        store: str | None = None,
        mixture: Sequence[Mapping[str, Any]] | None = None,
        mixture_seed: int = 0,
        trace_format: str = "chain_then_answer",
        prompt_loss_weight: float = 0.0,
        num_train: int | None = 20_000,
        num_val: int | None = 500,
        num_test: int | None = 1000,
        problem_seed: int = 0,
        format_seed: int = 0,
        tokenizer: str = "characters",
        vocab_size: int = 1024,
        max_tokens: int = 512,
        batch_size: int = 64,
        packed_to: int | None = None,
        length_grouping: int = 0,
        num_prompts: int = 0,
        steps_per_rollout: int = 1,
        num_stored: int = 0,
        teacher_template: AbstractTemplate | Any = None,
        modes: str | None = None,
        mode: str | None = None,
        max_prompt_tokens: int | None = None,
        extra_eos: Sequence[int | str] = (),
    ) -> None:
        super().__init__()
        _check_least({"batch_size": batch_size, "steps_per_rollout": steps_per_rollout}, least=1)
        _check_least({"max_tokens": max_tokens}, least=2)
        _check_least({"num_val": num_val, "num_test": num_test, "num_prompts": num_prompts, "num_stored": num_stored})
        if num_train is not None and num_train < 1:
            raise ConfigError(f"data.num_train is {num_train}; expected at least 1, or null for all")
        if trace_format not in TRACE_FORMATS:
            raise ConfigError(f"data.trace_format is {trace_format!r}; expected one of {', '.join(TRACE_FORMATS)}")
        self.modes = Modes(modes, mode, trace_format, format_seed)
        self.task, self.seed, self.batch_size = task, seed, batch_size
        self.trace_format, self.packed_to, self.length_grouping = trace_format, packed_to, length_grouping
        self.num_prompts, self.steps_per_rollout, self.num_stored = num_prompts, steps_per_rollout, num_stored
        self.max_tokens, self._prompt_loss_weight = max_tokens, prompt_loss_weight
        self._num = {"train": num_train, "val": num_val, "test": num_test}
        self._problem_seed, self._format_seed = problem_seed, format_seed
        self._source = TrainTraces(
            task, store, mixture, mixture_seed, num_train, answers_alone=trace_format == "answer_only"
        )
        self._codecs = Codecs(
            task,
            template,
            teacher_template,
            self.modes,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            texts=self._texts,
            trace_format=trace_format,
            max_tokens=max_tokens,
            prompt_loss_weight=prompt_loss_weight,
            max_prompt_tokens=max_prompt_tokens,
            extra_eos=extra_eos,
        )
        self._problems: dict[Split, list[Problem]] = {}
        self._documents: dict[Split, Sequence[Document]] = {}
        self._skipped: dict[Split, Counter[str]] = {}
        self._traces: list[Trace] | None = None
        self._prompts: list[PromptRow] | None = None
        self._stored: list[StoredRow] | None = None
        self._refused_prompts: Counter[str] = Counter()

    def list_bad_rows(self, file: Path) -> None:
        """From now on a pass over a JSONL store lists the rows that are no traces in ``file``, line by line."""
        self._source.quarantine = file

    @property
    def store_folders(self) -> tuple[Path, ...]:
        """The trace stores whose traces the train split was read from, as far as it has been read."""
        return self._source.folders

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec:
        """The one place that turns problems and traces into ids and back, for training and generation alike."""
        return self._codecs.student

    @property
    def teacher_codec(self) -> Codec:
        """The codec under the teacher's own template: the same tokens, other words around a problem."""
        return self._codecs.teacher

    @property
    def has_val(self) -> bool:
        """Whether there is a validation split to select on."""
        return self._num["val"] != 0

    def facts(self) -> dict[str, Any]:
        """What a language model must fit: sizes and special ids of the tokenizer, and its identity."""
        return self.codec.facts()

    @property
    def num_validation(self) -> int:
        """Number of validation problems."""
        return len(self.problems("val"))

    def with_traces(self, traces: Sequence[Trace], seed: int) -> "TraceData":
        """The same data with other traces to train on, in an order of ``seed``; problems and codec are shared."""
        other = copy.copy(self)
        other.seed, other._traces, other._source = seed, list(traces), TrainTraces(self.task)
        kept: dict[Split, Sequence[Document]] = {"val": self.documents("val")}
        other._documents, other._skipped, other._stored = kept, {"val": self._skipped["val"]}, None
        return other

    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split, by rising index. Those of train are the task's, whatever the store holds."""
        if split not in self._problems:
            num = self._num[split]
            key = f"data.num_{split}"
            self._problems[split] = problems_for(key, self.task, split, num, self._problem_seed) if num != 0 else []
        return self._problems[split]

    def traces(self) -> list[Trace]:
        """The train traces as they are stored, before the trace format rearranges them; all of them in memory."""
        if self._traces is None:
            self._traces = list(self._passing())
        return self._traces

    def _passing(self) -> Iterator[Trace]:
        """One pass over the train traces, out of memory only where they are there."""
        traces = self._traces
        return self._source.stream(lambda: self.problems("train")) if traces is None else iter(traces)

    def documents(self, split: Split) -> Sequence[Document]:
        """The encoded documents of a split; what could not be encoded is counted in :meth:`summary`."""
        if split not in self._documents:
            documents: Sequence[Document]
            if split == "train":
                documents, skipped = self._train_documents()
            else:
                references = self._source.references(split, self.problems(split))
                documents, skipped = self.codec.encode_all([self.modes.reference(trace) for trace in references])
            self._documents[split], self._skipped[split] = documents, skipped
        return self._documents[split]

    def _train_documents(self) -> tuple[CompactDocuments, Counter[str]]:
        return train_documents(
            self._passing(),
            self.codec,
            self.modes,
            trace_format=self.trace_format,
            format_seed=self._format_seed,
            separator=getattr(self.task, "step_separator", self.codec.template.step_separator),
            held_out=[*self.problems("val"), *self.problems("test")],
            unread=self._source.unread,
        )

    def _texts(self) -> Iterator[str]:
        return (f"{one.problem}\n{one.chain}\n{one.answer}" for one in self._passing())

    def prompts(self) -> list[PromptRow]:
        """Every train problem as the student and the teacher are asked it; see :meth:`summary` for what was refused.

        Raises DataError where there is no problem at all, or none that can be asked.
        """
        if self._prompts is None:
            problems, codecs = self.problems("train"), (self.codec, self.teacher_codec)
            modes = self.modes.of_prompts(len(problems))
            self._prompts, self._refused_prompts = posed(problems, *codecs, self.task.name, modes)
        return self._prompts

    def stored_rows(self) -> list[StoredRow]:
        """The train documents beside the prompts, each with the prompt that the teacher would have read instead."""
        if self._stored is None:
            traces = () if self.teacher_codec is self.codec else self.traces()
            codecs, in_modes = (self.codec, self.teacher_codec), self.modes.mixture == "two"
            self._stored = stored_rows(self.documents("train"), traces, *codecs, in_modes=in_modes)
        return self._stored

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what training and validation need; test problems are drawn when they are asked for."""
        if self.num_prompts:
            self.prompts()
        if self._trains_on_documents:
            self.documents("train")
        self.documents("val")

    @property
    def _trains_on_documents(self) -> bool:
        return not self.num_prompts or bool(self.num_stored)

    # -- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TokenLoader | PromptLoader:
        """Train documents or prompts, shuffled, cut for the trainer's ranks and accumulation."""
        schedule = training_schedule(self.trainer, self.seed)
        if self.num_prompts:
            return PromptLoader(
                self.prompts(),
                batch_size=self.num_prompts,
                steps_per_rollout=self.steps_per_rollout,
                stored=self.stored_rows() if self.num_stored else (),
                num_stored=self.num_stored,
                **schedule,
            )
        options = {"packed_to": self.packed_to, "length_grouping": self.length_grouping}
        return self._loader("train", batch_size=self.batch_size, **options, **schedule)

    def val_dataloader(self) -> TokenLoader | list[TokenLoader]:
        """The reference documents of the validation problems, this rank's share; an empty list where there are none."""
        if not self.documents("val"):
            return []
        share = share_of_rank(self.trainer)
        ranks = share["world_size"]
        return self._loader("val", batch_size=max(ranks, min(SCORED_ROWS, self._rows_at_once("val") * ranks)), **share)

    def loader(self, split: Split, *, batch_size: int | None = None) -> TokenLoader:
        """The documents of a whole split in order, once per epoch."""
        return self._loader(split, batch_size=self.batch_size if batch_size is None else batch_size)

    def scoring_loader(self, split: Split) -> TokenLoader:
        """The same in batches of as many documents as have room for all their logits, see LOGITS_AT_ONCE."""
        return self._loader(split, batch_size=min(SCORED_ROWS, self._rows_at_once(split)))

    def _rows_at_once(self, split: Split) -> int:
        longest = int(lengths(self.documents(split)).max(initial=1))
        return max(1, LOGITS_AT_ONCE // (longest * self.codec.vocab_size))

    def _loader(self, split: Split, **options: Any) -> TokenLoader:
        weight = self._prompt_loss_weight
        return TokenLoader(self.documents(split), pad_id=self.codec.pad_id, prompt_loss_weight=weight, **options)

    # -- identity -----------------------------------------------------------------------------------------------------

    def fingerprint(self, split: Split) -> str:
        """sha256 of a split's documents as they are served: ids, prompt lengths, indices, whatever the order."""
        digest = hashlib.sha256(str(self._prompt_loss_weight).encode())
        if split == "train" and self.num_prompts:
            for row in self.prompts():
                digest.update(f"{row.problem.index}|{row.ids}|{row.teacher_ids}".encode())
            if not self.num_stored:
                return digest.hexdigest()
        for document in self.documents(split):
            digest.update(f"{document.index}|{document.prompt_length}|{document.ids}".encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Rows per split, what was dropped by reason, rows that are no problem, and tokens of the train documents.

        ``mixture``, where there is one: name of each store -> traces taken from it, and documents made of them.
        """
        documents = self.documents("train") if self._trains_on_documents else []
        length_D = lengths(documents)
        asked: dict[str, Any] = {}
        if self.num_prompts:
            asked = {"prompts": len(self.prompts()), "refused_prompts": dict(self._refused_prompts)}
        return {
            "rows": {"train": len(documents), "val": len(self.documents("val")), "test": len(self.problems("test"))},
            **asked,
            "dropped": {split: dict(skipped) for split, skipped in self._skipped.items()},
            "problems_left_out": dict(self.task.left_out),
            "train_tokens": int(length_D.sum()),
            "longest": int(length_D.max(initial=0)),
            "task": self.task.name,
            "trace_format": self.trace_format,
            "tokenizer": tokenizer_sha256(self.codec.tokenizer),
            "store": self._source.store_name,
            **self._source.mixed(document.index for document in documents),
        }


def _check_least(values: Mapping[str, int | None], least: int = 0) -> None:
    """Refuse sizes below the least; None means all there is."""
    for key, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"data.{key} is {value}; expected at least {least}")
