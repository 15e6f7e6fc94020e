"""Problems with their written solutions: what every language method is trained, validated and evaluated on."""

import copy
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from research.data.modes import Modes
from research.data.prompt_loader import PromptLoader
from research.data.resume import TrainerPlace
from research.data.splits import DataError
from research.data.token_loader import TokenLoader
from research.errors import ConfigError
from research.records import Problem, PromptRow, StoredRow, Trace, Verdict
from research.tasks.base import AbstractTask, Split
from research.tasks.released import Released, read_released
from research.text.codec import Codec
from research.text.document import Document
from research.text.formats import TRACE_FORMATS, arrange
from research.text.refusals import EmptyChain, Refused, TooLong
from research.text.template import AbstractTemplate
from research.text.tokenizer import build_tokenizer, tokenizer_sha256
from research.traces.mixture import Mixture, training_mixture
from research.traces.reading import read_traces

SPLITS: tuple[Split, ...] = ("train", "val", "test")
RELEASED_PREFIX = "released:"
HELD_OUT = "held_out"  # a trace of a problem that validation or test poses


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
    batch_size        documents per optimizer step, over all ranks and accumulated micro-batches
    packed_to, length_grouping   see :class:`TokenLoader`
    num_prompts       0: train on traces. n: problems of the train split per optimizer step, for the student to answer
    steps_per_rollout optimizer steps in a row that share their prompts
    num_stored        traces beside the prompts of a step, for a method that takes some steps off policy
    teacher_template  how the teacher was taught to be asked, where that is not ``template``
    modes, mode       two | unmarked, and think | no_think: see :class:`Modes`; the half is drawn by ``format_seed``

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
    ) -> None:
        super().__init__()
        least_of = {"batch_size": (batch_size, 1), "num_val": (num_val or 0, 0), "num_test": (num_test or 0, 0)}
        least_of |= {"max_tokens": (max_tokens, 2), "steps_per_rollout": (steps_per_rollout, 1)}
        for key, (value, least) in {**least_of, "num_prompts": (num_prompts, 0), "num_stored": (num_stored, 0)}.items():
            if value < least:
                raise ConfigError(f"data.{key} is {value}; expected at least {least}")
        if num_train is not None and num_train < 1:
            raise ConfigError(f"data.num_train is {num_train}; expected at least 1, or null for all")
        if trace_format not in TRACE_FORMATS:
            raise ConfigError(f"data.trace_format is {trace_format!r}; expected one of {', '.join(TRACE_FORMATS)}")
        if mixture is not None and store is not None:
            raise ConfigError(f"data.store is {store!r} and data.mixture is set; give one of them")
        if mixture is not None and not mixture:
            raise ConfigError("data.mixture is empty; give [{store: FOLDER, weight: W}, ..], or null for none")
        self.modes = Modes(modes, mode, trace_format, format_seed)
        self.task, self.seed, self.batch_size = task, seed, batch_size
        self.trace_format, self.packed_to, self.length_grouping = trace_format, packed_to, length_grouping
        self._template, self._store, self._teacher_template = template, store, teacher_template
        self.num_prompts, self.steps_per_rollout, self.num_stored = num_prompts, steps_per_rollout, num_stored
        self._teacher_codec: Codec | None = None
        self._parts, self._mixture_seed = mixture, mixture_seed
        self._mixture: Mixture | None = None
        self._num = {"train": num_train, "val": num_val, "test": num_test}
        self._problem_seed, self._format_seed = problem_seed, format_seed
        self._tokenizer_kind, self._vocab_size = tokenizer, vocab_size
        self.max_tokens, self._prompt_loss_weight = max_tokens, prompt_loss_weight
        self._problems: dict[Split, list[Problem]] = {}
        self._documents: dict[Split, list[Document]] = {}
        self._skipped: dict[Split, Counter[str]] = {}
        self._unread: Counter[str] = Counter()
        self._released: Released | None = None
        self._traces: list[Trace] | None = None
        self._prompts: list[PromptRow] | None = None
        self._refused_prompts: Counter[str] = Counter()
        self._codec: Codec | None = None

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec:
        """The one place that turns problems and traces into ids and back, for training and generation alike."""
        if self._codec is None:
            codec = self._codec_of(self._build_tokenizer(), self._template)
            self._codec = codec.marked(self.modes.mark(codec.template))
        return self._codec

    @property
    def teacher_codec(self) -> Codec:
        """The codec under the teacher's own template: the same tokens, other words around a problem."""
        if self._teacher_template is None:
            return self.codec
        if self._teacher_codec is None:
            self._teacher_codec = self._codec_of(self.codec.tokenizer, self._teacher_template)
        return self._teacher_codec

    def _codec_of(self, tokenizer: Any, template: Any) -> Codec:
        return Codec(
            tokenizer,
            template(tokenizer=tokenizer) if isinstance(template, partial) else template,
            trace_format=self.trace_format,
            max_tokens=self.max_tokens,
            prompt_loss_weight=self._prompt_loss_weight,
            allow_empty_chain=self.modes.mixture is not None,
        )

    @property
    def has_val(self) -> bool:
        """Whether there is a validation split to select on."""
        return self._num["val"] != 0

    def facts(self) -> dict[str, Any]:
        """What a language model must fit: sizes and special ids of the tokenizer, and its identity."""
        codec = self.codec
        return {
            "vocab_size": codec.vocab_size,
            "eos_token_id": list(codec.eos_ids) if len(codec.eos_ids) > 1 else codec.eos_ids[0],
            "pad_token_id": codec.pad_id,
            "tokenizer_sha256": tokenizer_sha256(codec.tokenizer),
        }

    @property
    def num_validation(self) -> int:
        """Number of validation problems."""
        return len(self.problems("val"))

    def with_traces(self, traces: Sequence[Trace], seed: int) -> "TraceData":
        """The same data with other traces to train on, in an order of ``seed``; problems and codec are shared."""
        other = copy.copy(self)
        other.seed, other._traces, other._store = seed, list(traces), None
        other._parts, other._mixture = None, None
        other._unread = Counter()
        kept: dict[Split, list[Document]] = {"val": self.documents("val")}
        other._documents, other._skipped = kept, {"val": self._skipped["val"]}
        return other

    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split, by rising index. Those of train are the task's, whatever the store holds."""
        if split not in self._problems:
            num = self._num[split]
            self._problems[split] = self.task.problems(split, num, self._problem_seed) if num != 0 else []
        return self._problems[split]

    def traces(self) -> list[Trace]:
        """The train traces as they are stored, before the trace format rearranges them."""
        if self._traces is None:
            if self._parts is not None:
                self._mixture = training_mixture(self._parts, self._num["train"], self._mixture_seed)
                self._traces = list(self._mixture)
            elif self._store:
                self._traces = self._read_store()
            else:
                self._traces = [reference_trace(problem) for problem in self.problems("train")]
            if not self._traces:
                raise DataError(f"no trace to train on in {self._store or self.task.name}")
        return self._traces

    def documents(self, split: Split) -> list[Document]:
        """The encoded documents of a split; what could not be encoded is counted in :meth:`summary`."""
        if split not in self._documents:
            traces = self.traces() if split == "train" else self._references(split)
            given, codec = len(traces), self.codec
            if split != "train":
                traces = [self.modes.reference(trace) for trace in traces]
            if split == "train":
                posed = self._not_held_out(traces)
                kept = [place for place in posed if self.modes.takes(traces[place])]
                codec = codec.marked("")  # the traces bring their marks along
                separator = getattr(self.task, "step_separator", self.codec.template.step_separator)
                arranged = arrange([traces[place] for place in kept], self.trace_format, self._format_seed, separator)
                traces = [replace(trace, index=place) for place, trace in zip(kept, arranged, strict=True)]
                traces = self.modes.training(traces, codec.template)
            documents, skipped = codec.encode_all(traces)
            if split == "train":
                skipped += self._unread + Counter({HELD_OUT: given - len(posed)})
                skipped += Counter({EmptyChain.reason: len(posed) - len(kept)})
            self._documents[split], self._skipped[split] = documents, skipped
            if split == "train" and not documents:
                told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
                raise DataError(f"none of {given} traces can be encoded as {self.trace_format}: {told}")
        return self._documents[split]

    def _references(self, split: Split) -> list[Trace]:
        """The solutions of a held-out split: the task's own; where it has none, the first of each in a release."""
        references = [reference_trace(problem) for problem in self.problems(split)]
        if not str(self._store).startswith(RELEASED_PREFIX) or any(trace.chain for trace in references):
            return references
        released: dict[int, Trace] = {}
        for trace in self._read_release()[0].traces[split]:
            released.setdefault(trace.index, trace)
        return [released.get(trace.index, trace) for trace in references]

    def _not_held_out(self, traces: list[Trace]) -> list[int]:
        """Places of the traces whose problem is none of validation or test.

        Problems are compared by their words: a store of other people's traces does not know this task's splits.
        """
        asked = [*self.problems("val"), *self.problems("test")]
        held_out = {_words(problem.text) for problem in asked}
        return [place for place, trace in enumerate(traces) if _words(trace.problem) not in held_out]

    def prompts(self) -> list[PromptRow]:
        """Every train problem as the student and the teacher are asked it; see :meth:`summary` for what was refused.

        Raises DataError where there is no problem at all, or none that can be asked.
        """
        if self._prompts is None:
            rows, refused = [], Counter[str]()
            for problem in self.problems("train"):
                try:
                    ids = self.codec.prompt_ids(problem.text)
                    teacher_ids = ids if self._teacher_template is None else self.teacher_codec.prompt_ids(problem.text)
                except Refused as error:
                    refused[error.reason] += 1
                    continue
                if len(ids) >= self.max_tokens:
                    refused[TooLong.reason] += 1
                    continue
                rows.append(PromptRow(problem, tuple(ids), tuple(teacher_ids)))
            if not rows:
                told = ", ".join(f"{count} {reason}" for reason, count in refused.items()) or "there is none"
                raise DataError(
                    f"no train problem of {self.task.name} can be posed ({told}): raise data.num_train or "
                    "data.max_tokens, or take another template or tokenizer"
                )
            self._prompts, self._refused_prompts = rows, refused
        return self._prompts

    def stored_rows(self) -> list[StoredRow]:
        """The train documents beside the prompts, each with the prompt that the teacher would have read instead."""
        rows = []
        for document in self.documents("train"):
            prompt = document.ids[: document.prompt_length]
            if self._teacher_template is not None:
                prompt = tuple(self.teacher_codec.prompt_ids(self.traces()[document.index].problem))
            rows.append(StoredRow(document.ids, document.prompt_length, document.index, prompt))
        return rows

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
        trainer = self.trainer
        micro_batches = 1 if trainer is None else trainer.accumulate_grad_batches
        schedule: dict[str, Any] = {
            "micro_batches": micro_batches,
            "rank": 0 if trainer is None else trainer.global_rank,
            "world_size": 1 if trainer is None else trainer.world_size,
            "seed": self.seed,
            "shuffle": not getattr(trainer, "overfit_batches", 0),
            "where": None if trainer is None else TrainerPlace(trainer, micro_batches),
        }
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
        trainer = self.trainer
        world_size = 1 if trainer is None else trainer.world_size
        rank = 0 if trainer is None else trainer.global_rank
        return self._loader("val", batch_size=max(256, world_size), rank=rank, world_size=world_size)

    def loader(self, split: Split, *, batch_size: int | None = None) -> TokenLoader:
        """The documents of a whole split in order, once per epoch."""
        return self._loader(split, batch_size=self.batch_size if batch_size is None else batch_size)

    def _loader(self, split: Split, **options: Any) -> TokenLoader:
        codec = self.codec
        weight = self._prompt_loss_weight
        return TokenLoader(self.documents(split), pad_id=codec.pad_id, prompt_loss_weight=weight, **options)

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
        """Rows per split, what was dropped by reason, and tokens of the train documents.

        ``mixture``, where there is one: name of each store -> traces taken from it, and documents made of them.
        """
        documents = self.documents("train") if self._trains_on_documents else []
        lengths = [len(document.ids) for document in documents] or [0]
        asked: dict[str, Any] = {}
        if self.num_prompts:
            asked = {"prompts": len(self.prompts()), "refused_prompts": dict(self._refused_prompts)}
        return {
            "rows": {"train": len(documents), "val": len(self.documents("val")), "test": len(self.problems("test"))},
            **asked,
            "dropped": {split: dict(skipped) for split, skipped in self._skipped.items()},
            "train_tokens": sum(lengths),
            "longest": max(lengths),
            "task": self.task.name,
            "trace_format": self.trace_format,
            "tokenizer": tokenizer_sha256(self.codec.tokenizer),
            "store": None if self._store is None else Path(self._store).name,
        } | ({"mixture": self._mixed()} if self._mixture is not None else {})

    def _mixed(self) -> dict[str, dict[str, int]]:
        taken = {} if self._mixture is None else self._mixture.summary()
        used = Counter(self.traces()[document.index].details["source"] for document in self.documents("train"))
        return {name: {"traces": count, "documents": used[name]} for name, count in taken.items()}

    def _build_tokenizer(self) -> Any:
        kind = self._tokenizer_kind
        if kind == "characters":
            if self.task.alphabet is None:
                raise ConfigError(
                    f"data.tokenizer is characters, but {self.task.name} has open text; give bpe or a pretrained folder"
                )
            written = [getattr(template, "alphabet", "") for template in (self._template, self._teacher_template)]
            written.append(self.modes.alphabet(self._template, self.task.alphabet))
            return build_tokenizer(kind, alphabet="".join(sorted({*self.task.alphabet, *"".join(written)})))
        if kind == "bpe":
            texts = (f"{t.problem}\n{t.chain}\n{t.answer}" for t in self.traces())
            return build_tokenizer(kind, texts=texts, vocab_size=self._vocab_size)
        return build_tokenizer(kind)

    def _read_store(self) -> list[Trace]:
        store, num = str(self._store), self._num["train"]
        if not store.startswith(RELEASED_PREFIX):
            return read_traces(Path(store), num=num, allow_empty_chain=self.trace_format == "answer_only")
        released, which = self._read_release()
        self._unread = Counter(released.skipped["train"])
        traces = [t for t in released.traces["train"] if not which or t.details["verdict"] == Verdict.CORRECT]
        self._unread["wrong_answer"] += len(released.traces["train"]) - len(traces)
        return traces[:num]

    def _read_release(self) -> tuple[Released, str]:
        """The release that the store names, and which of its traces are asked for: "" (all) or "correct"."""
        name, _, which = str(self._store).removeprefix(RELEASED_PREFIX).partition(":")
        if which not in ("", "correct"):
            raise ConfigError(f"data.store is {self._store!r}; expected released:NAME or released:NAME:correct")
        if self._released is None:
            self._released = read_released(name)
        if self._released.task.name != self.task.name:
            told = f"traces of {self._released.task.name}; the task is {self.task.name}"
            raise ConfigError(f"data.store is {self._store!r}, {told}")
        return self._released, which


def _words(text: str) -> str:
    return " ".join(text.split()).casefold()


def reference_trace(problem: Problem) -> Trace:
    """The task's own solution of a problem, as a trace."""
    return Trace(problem.text, problem.chain, problem.answer, problem.index, details={"origin": "reference"})
