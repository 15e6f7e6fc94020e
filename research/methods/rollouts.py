"""What the student itself writes while it is trained: drawn once for every block of prompts, and kept while it serves.

Every completion draws from its own stream of (run, block, problem, sample), so that nothing of a generator's state has
to be saved: a block that is drawn again from the same weights is the same. A block that serves for several steps is in
the checkpoint, because the weights it was drawn from are gone by then.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.errors import CheckpointError, ConfigError
from research.generation.base import Prompt
from research.generation.cost import GenerationCost
from research.generation.distribution import check_sampling
from research.generation.in_process import LocalGenerator
from research.records import Completion, PromptBatch, PromptRow, Sampling, TokenBatch
from research.seeding import seed_for
from research.text.document import Document, collate

log = logging.getLogger(__name__)

Drawn = dict[int, tuple[Completion, ...]]  # by the problem's index
DRAWN_WITH = ("num_samples", "temperature", "top_p")  # what the rollouts of one block have in common
METHOD_KEYS = {
    "num_samples": "method.num_samples",
    "temperature": "method.sampling_temperature",
    "top_p": "method.top_p",
    "max_new_tokens": "method.max_new_tokens",
}


@dataclass(frozen=True)
class Rollout:
    """One completion of one problem, as the student wrote it."""

    row: PromptRow
    completion: Completion

    @property
    def tokens(self) -> int:
        """Its length, the EOS included."""
        return len(self.completion.ids)


@dataclass(frozen=True)
class StepCounts:
    """Documents of a whole optimizer step and the tokens of their completions, over all micro-batches and ranks."""

    tokens: int
    rows: int


class RolloutBuffer:
    """Draws the rollouts of a block of prompts and hands them out, micro-batch by micro-batch and step by step.

    sampling  of every rollout; its seed is replaced by that of the run and the block. ``max_new_tokens`` is cut to what
              a document, the student and its teacher hold behind the longest prompt

    Raises ConfigError, naming the method's key, for a sampling without meaning.
    """

    def __init__(self, sampling: Sampling) -> None:
        check_sampling(sampling, METHOD_KEYS)
        if sampling.temperature == 0 and sampling.num_samples > 1:
            raise ConfigError(
                f"method.num_samples is {sampling.num_samples} with method.sampling_temperature=0, where all samples "
                "of a problem are the same; give 1, or a temperature above 0"
            )
        self.sampling = sampling
        self._restored: dict[str, Any] | None = None  # how a block from a checkpoint was drawn
        self._block: int | None = None
        self._drawn: Drawn = {}
        self._generator: LocalGenerator | None = None
        self._seed = 0

    def connect(self, network: nn.Module, data: TraceData, teacher_positions: int | None = None) -> None:
        """Sample from this network, as it is at every draw, with the tokens and the seed of these data.

        teacher_positions  tokens of the longest document that the teacher can read; None: any

        Raises ConfigError where the longest prompt leaves a model no position for an answer.
        """
        codec = data.codec
        self._generator = LocalGenerator(network, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
        self._seed = data.seed
        own, its = (max(len(getattr(row, ids)) for row in data.prompts()) for ids in ("ids", "teacher_ids"))
        limits = {
            "data.max_tokens": (data.max_tokens, own),
            "the student's positions": (getattr(network, "max_positions", None), own),
            "the teacher's positions": (teacher_positions, its),
        }
        rooms = {name: (limit - used, used) for name, (limit, used) in limits.items() if limit is not None}
        name, (room, longest) = min(rooms.items(), key=lambda item: item[1][0])
        if room < 1:
            raise ConfigError(
                f"the longest prompt has {longest} tokens, and {name} are {room + longest}, which leaves none for an "
                "answer; take a model with more positions, or shorter problems or templates"
            )
        asked = self.sampling.max_new_tokens
        if room < asked:
            log.info("rollouts end after %d tokens: %s less the longest prompt's %d", room, name, longest)
        self.sampling = replace(self.sampling, max_new_tokens=min(asked, room))

    def ready(self, batch: PromptBatch) -> GenerationCost:
        """Have the rollouts of the batch's block at hand, on every rank; what drawing them cost, over all ranks."""
        if self._block == batch.block:
            self._check_restored()
            return GenerationCost()
        if self._generator is None:
            raise RuntimeError("rollouts were asked for before the method was set up by a trainer")
        sampling = replace(self.sampling, seed=seed_for(self._seed, "rollouts", batch.block))
        prompts = [Prompt(row.problem.index, row.problem.text, row.ids) for row in batch.step_prompts]
        before = self._generator.spent
        written = {one.index: one.completions for one in self._generator.generate(prompts, sampling)}
        self._block, self._drawn, self._restored = batch.block, _from_all_ranks(written), None
        return _over_ranks(self._generator.spent - before)

    def of(self, rows: Sequence[PromptRow]) -> list[Rollout]:
        """The rollouts of these problems, the samples of each side by side; after :meth:`ready`."""
        return [Rollout(row, completion) for row in rows for completion in self._drawn[row.problem.index]]

    def _check_restored(self) -> None:
        """Refuse to go on within a block that was drawn in another way than it is asked for now."""
        drawn, self._restored = self._restored or {}, None
        now = {name: getattr(self.sampling, name) for name in drawn}
        if now != drawn:
            changed = [
                f"{METHOD_KEYS[name]} {drawn[name]}, now {now[name]}" for name in drawn if now[name] != drawn[name]
            ]
            told = ", ".join(changed)
            raise CheckpointError(
                f"the checkpoint lies within a block of rollouts that were drawn with {told}; go on with what they "
                "were drawn with, or from a checkpoint at the end of a block (data.steps_per_rollout)"
            )

    def counts(self) -> StepCounts:
        """Of the rollouts of the block, over all ranks."""
        lengths = [len(one.ids) for completions in self._drawn.values() for one in completions]
        return StepCounts(sum(lengths), len(lengths))

    def state_dict(self) -> dict[str, Any]:
        """The block that was drawn last, in plain values."""
        drawn = {index: [asdict(one) for one in completions] for index, completions in self._drawn.items()}
        asked = self._restored or {name: getattr(self.sampling, name) for name in DRAWN_WITH}
        return {"block": self._block, "drawn": drawn, "sampling": asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved block."""
        self._block, self._restored = state["block"], state.get("sampling")
        self._drawn = {int(index): tuple(map(Completion.from_plain, saved)) for index, saved in state["drawn"].items()}


def as_batch(rollouts: Sequence[Rollout], counts: StepCounts, *, pad_id: int, for_teacher: bool = False) -> TokenBatch:
    """Rollouts as token batch, one a row: the ids that were drawn, never decoded and encoded again.

    for_teacher  the same completions behind the prompts that the teacher was taught to be asked with
    """
    documents = []
    for rollout in rollouts:
        prompt = rollout.row.teacher_ids if for_teacher else rollout.row.ids
        documents.append(Document((*prompt, *rollout.completion.ids), len(prompt), rollout.row.problem.index))
    return _collated(documents, counts, pad_id)


def stored_as_batch(batch: PromptBatch, *, pad_id: int, for_teacher: bool = False) -> TokenBatch:
    """The stored traces of a micro-batch as token batch, behind the student's prompts or the teacher's."""
    documents = []
    for row in batch.stored:
        prompt = row.teacher_prompt_ids if for_teacher else row.ids[: row.prompt_length]
        documents.append(Document((*prompt, *row.ids[row.prompt_length :]), len(prompt), row.index))
    return _collated(documents, StepCounts(batch.step_stored_tokens, batch.step_stored_rows), pad_id)


def sampler_logprobs(rollouts: Sequence[Rollout], like: Tensor) -> Tensor:
    """The natural-log probability of every drawn token under the policy it was drawn from, row by row, [N]."""
    return like.new_tensor([logprob for rollout in rollouts for logprob in rollout.completion.logprobs])


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Each number summed over all ranks, in float64; as it is where there is one."""
    if not _has_ranks():
        return list(values)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def _from_all_ranks(drawn: Drawn) -> Drawn:
    """Every rank's rollouts on every rank: counts are of all of them, and any rank's checkpoint is whole."""
    if not _has_ranks():
        return drawn
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, drawn)
    return {index: completions for one in gathered for index, completions in one.items()}


def _over_ranks(cost: GenerationCost) -> GenerationCost:
    """A rank's cost as that of all: counts are summed, wall time is that of this one."""
    summed = [name for name, value in asdict(cost).items() if not name.endswith("seconds") and value is not None]
    totals = sum_over_ranks([float(getattr(cost, name)) for name in summed])
    kinds = [type(getattr(cost, name)) for name in summed]
    return replace(cost, **{name: kind(total) for name, kind, total in zip(summed, kinds, totals, strict=True)})


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _collated(documents: Sequence[Document], counts: StepCounts, pad_id: int) -> TokenBatch:
    return collate(
        documents,
        prompt_loss_weight=0.0,
        pad_id=pad_id,
        step_weight=float(counts.tokens),
        step_completion_tokens=counts.tokens,
        step_rows=counts.rows,
    )
