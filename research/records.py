"""Frozen records passed between rooms, and the legend of dimensions.

A tensor's name ends in its dimensions:

    B batch   T time   D documents or width   V vocabulary or classes   K kept top-k   N positions (rows of a class
    batch, or graded tokens)   P problems   G samples per problem

``logits`` are unnormalised, ``logprobs`` are natural logs, ``probs`` sum to one. ``loss_mask`` is True where a
position is trained on. ``index`` is the stable id of an item in its split: it joins a batch to a cache and an item to
its record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

PAD_SEGMENT = 0  # the segment id of padding; documents of a row are numbered from 1


@dataclass(frozen=True)
class ClassBatch:
    """One micro-batch of a classification task.

    inputs      float tensor [B, ...], as the student sees them (after any augmentation)
    label_B     int64 true classes
    index_B     int64 stable ids into the split
    step_rows   rows over which the whole optimizer step averages: all its micro-batches on all ranks
    """

    inputs: Tensor
    label_B: Tensor
    index_B: Tensor
    step_rows: int

    def __len__(self) -> int:
        return int(self.label_B.shape[0])

    def network_inputs(self) -> tuple[Tensor, ...]:
        """What a network is called with: ``logits_NV = network(*batch.network_inputs())``."""
        return (self.inputs,)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ClassBatch":
        """The same batch on ``device``; itself where it is there already."""
        if self.inputs.device == torch.device(device):
            return self
        return replace(
            self,
            inputs=self.inputs.to(device, non_blocking=non_blocking),
            label_B=self.label_B.to(device, non_blocking=non_blocking),
            index_B=self.index_B.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of text: rows of one document each or, where packed, of several.

    ids_BT        int64 token ids, padded on the right
    label_BT      int64 the token that the logits at the same place predict (already aligned: nobody shifts again);
                  0 where nothing is predicted, which ``weight_BT`` takes out
    weight_BT     float32 what a place counts in the loss: 1 on completions (EOS included), ``prompt_loss_weight`` on
                  prompts, 0 on padding and at the last token of every document
    completion_BT bool True where the label belongs to a completion: the places that a teacher's signal is matched on
    position_BT   int64 place within its document, from 0
    segment_BT    int64 number of the document within its row, from 1; 0 on padding. No document attends to another
    index_D       int64 stable ids of the documents, row by row, in the order in which they stand in each row
    step_weight   sum of ``weight_BT`` over the whole optimizer step: all its micro-batches on all ranks
    step_completion_tokens   number of True places of ``completion_BT`` over the whole step
    step_rows     documents over the whole step
    """

    ids_BT: Tensor
    label_BT: Tensor
    weight_BT: Tensor
    completion_BT: Tensor
    position_BT: Tensor
    segment_BT: Tensor
    index_D: Tensor
    step_weight: float
    step_completion_tokens: int
    step_rows: int

    def __len__(self) -> int:
        """Documents in this micro-batch."""
        return int(self.index_D.shape[0])

    @property
    def index_B(self) -> Tensor:
        """The documents' ids, under the name that every batch has."""
        return self.index_D

    def network_inputs(self) -> tuple[Tensor, ...]:
        """What a network is called with: ``logits_BTV = network(*batch.network_inputs())``."""
        return (self.ids_BT, self.position_BT, self.segment_BT)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenBatch":
        """The same batch on ``device``; itself where it is there already."""
        if self.ids_BT.device == torch.device(device):
            return self
        names = ("ids_BT", "label_BT", "weight_BT", "completion_BT", "position_BT", "segment_BT", "index_D")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})


@dataclass(frozen=True)
class PromptRow:
    """One problem that a student is to answer while it is trained.

    ids          the problem under the student's template, as token ids: what its rollout starts from
    teacher_ids  the same problem under the teacher's own template, in the same vocabulary
    """

    problem: "Problem"
    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]


@dataclass(frozen=True)
class StoredRow:
    """One stored trace beside the prompts: a document of ids, of which the first ``prompt_length`` are its prompt."""

    ids: tuple[int, ...]
    prompt_length: int
    index: int
    teacher_prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptBatch:
    """One micro-batch of problems to roll out, and stored traces for a step that is taken off policy.

    prompts       of this micro-batch
    step_prompts  of all micro-batches of this optimizer step on this rank, this one's among them: rollouts are drawn
                  for all of them at the first, so that the number of their tokens is known to every denominator
    stored        stored traces of this micro-batch, () where there are none
    step_stored_tokens, step_stored_rows   completion tokens and documents of the step's stored traces, over all ranks
    block, repeat the prompts of block b serve for ``repeats`` optimizer steps in a row, of which this is number
                  ``repeat`` from 0; a block's number names its random streams, on every rank the same
    micro_batch   number of this micro-batch within its step, from 0
    step_rows     prompts over the whole step: all micro-batches, all ranks
    """

    prompts: tuple[PromptRow, ...]
    step_prompts: tuple[PromptRow, ...]
    stored: tuple[StoredRow, ...]
    step_stored_tokens: int
    step_stored_rows: int
    block: int
    repeat: int
    micro_batch: int
    step_rows: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def index_B(self) -> Tensor:
        """The problems' ids, under the name that every batch has."""
        return torch.tensor([row.problem.index for row in self.prompts], dtype=torch.int64)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """Itself: prompts are plain numbers until they are rolled out."""
        return self


Batch = ClassBatch | TokenBatch


class Verdict(StrEnum):
    """What a verifier says of an answer. Only CORRECT earns anything; the others say why not."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"  # no answer was found, or the gold answer itself cannot be read
    TRUNCATED = "truncated"  # the length limit came before the answer
    TIMEOUT = "timeout"  # the verifier was stopped


@dataclass(frozen=True)
class Problem:
    """A problem as a task poses it.

    index    stable id within the split
    text     what is asked, without any template
    answer   the gold answer, as text
    chain    the reference's worked steps, one text; "" where the task has none
    level    how hard it is, in the task's own unit (terms of a sum, digits of a number); None where it has none
    details  plain values that the task's verifier needs beside
    """

    index: int
    text: str
    answer: str
    chain: str = ""
    level: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """Text that somebody wrote for a problem: a teacher, a person, or the student itself.

    problem  the problem's text, without template
    index    the problem's id in the split it came from, or the row of an imported file
    sample   number of the attempt at this problem, from 0
    details  plain values beside: verdict, origin, tokens, logprob, ...
    """

    problem: str
    chain: str
    answer: str
    index: int
    sample: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; stored beside every score that depends on it.

    num_samples     completions per problem
    temperature     0: the most likely token at each place (greedy); else logits are divided by it
    top_p           smallest set of tokens whose probability reaches it; 1: all
    max_new_tokens  length limit of a completion, EOS included
    seed            every completion draws from its own stream of (seed, problem index, sample): no batch changes it
    """

    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    ids       generated token ids, the EOS included where it came; () where a server gives text alone
    text      the same decoded, without EOS
    stop      "eos", or "length" where the limit came first; else the word for why the prompt was never asked
    logprob   sum of the natural-log probabilities of ``ids`` as they were drawn from; None where not known
    logprobs  the same for each of ``ids``; () where not known
    """

    ids: tuple[int, ...]
    text: str
    stop: str
    logprob: float | None = None
    logprobs: tuple[float, ...] = ()

    @property
    def was_asked(self) -> bool:
        """Whether a model wrote it; False where the prompt was refused: no text, and ``stop`` is the reason."""
        return self.stop in ("eos", "length")

    @classmethod
    def refused(cls, reason: str) -> "Completion":
        """What stands for the answer to a prompt that cannot be asked."""
        return cls((), "", reason)

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> "Completion":
        """The completion that ``dataclasses.asdict`` made these plain values of; tuples may be lists by now."""
        return cls(**{**saved, "ids": tuple(saved["ids"]), "logprobs": tuple(saved.get("logprobs", ()))})


@dataclass(frozen=True)
class DenseLogits:
    """The teacher's full distribution: ``softmax(logits_NV)``, never requiring grad; [B, T, V] for a token batch."""

    logits_NV: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.logits_NV.shape[-1])

    def at(self, mask_N: Tensor) -> "DenseLogits":
        """The rows where the mask is True, in order, laid out flat: ``[..., V] -> [N, V]``."""
        return DenseLogits(self.logits_NV[mask_N])


@dataclass(frozen=True)
class HiddenProjection:
    """A distribution never written out: ``softmax(logits)`` with ``logits = cap(hidden_ND @ weight_VD.T + bias_V)``.

    For a teacher nothing requires grad; a student's own hidden states and head come in the same form, with grad.

    hidden_ND  last hidden states, after the final norm; [B, T, D] for a token batch
    weight_VD  the output head, of which only the first ``num_classes`` rows mean something
    softcap    c > 0: ``cap(x) = c tanh(x / c)``; None: ``cap(x) = x``
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None

    @property
    def num_classes(self) -> int:
        return int(self.weight_VD.shape[0])

    def at(self, mask_N: Tensor) -> "HiddenProjection":
        """The rows where the mask is True, in order, laid out flat; the head is shared."""
        return replace(self, hidden_ND=self.hidden_ND[mask_N])


@dataclass(frozen=True)
class TopKLogprobs:
    """The teacher's K largest logprobs (at temperature 1) and the mass of everything else in one bucket.

    ids_NK          int64 class ids, distinct within a row
    logprobs_NK     natural logs, in falling order
    tail_logprob_N  natural log of ``1 - sum(exp(logprobs_NK))``; -inf where nothing is left (K = V)
    num_classes     V, the width of the distribution the rows were cut from
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor
    num_classes: int

    def at(self, mask_N: Tensor) -> "TopKLogprobs":
        """The rows where the mask is True, in order, laid out flat."""
        return replace(
            self,
            ids_NK=self.ids_NK[mask_N],
            logprobs_NK=self.logprobs_NK[mask_N],
            tail_logprob_N=self.tail_logprob_N[mask_N],
        )


TeacherSignal = DenseLogits | HiddenProjection | TopKLogprobs


@dataclass(frozen=True)
class LossSum:
    """One loss component before any mean: the sum over trained positions, and how many there were (or their weight).

    The mean is taken once, in ``methods/base.py``, over the positions of the whole optimizer step.
    """

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """``total / count``; exactly 0, still attached to the graph, where nothing was trained on."""
        return self.total / self.count.clamp(min=1)
