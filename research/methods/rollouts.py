"""What the student itself writes while it is trained: drawn once for every block of prompts, and kept while it serves.

Every completion draws from its own stream of (run, block, problem, sample), so that nothing of a generator's state has
to be saved: a block that is drawn again from the same weights is the same. A block that serves for several steps is in
the checkpoint, because the weights it was drawn from are gone by then.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.errors import ConfigError
from research.generation.base import Prompt
from research.generation.cost import GenerationCost
from research.generation.distribution import check_sampling
from research.generation.in_process import LocalGenerator
from research.records import Completion, PromptBatch, PromptRow, Sampling, TokenBatch
from research.seeding import seed_for
from research.text.codec import Codec
from research.text.document import Document, collate


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
    """Rollouts of a whole optimizer step, over all micro-batches and ranks."""

    tokens: int
    rows: int


class RolloutBuffer:
    """Draws the rollouts of a block of prompts and hands them out, micro-batch by micro-batch and step by step.

    sampling  of every rollout; its seed is replaced by that of the run and the block. ``max_new_tokens`` is cut to what
              a document and the model's context hold

    Raises ConfigError for a sampling without meaning.
    """

    def __init__(self, sampling: Sampling) -> None:
        check_sampling(sampling)
        self.sampling = sampling
        self.cost = GenerationCost()
        self._block: int | None = None
        self._drawn: dict[int, tuple[Completion, ...]] = {}
        self._counts = StepCounts(0, 0)
        self._generator: LocalGenerator | None = None
        self._seed = 0

    def connect(self, network: nn.Module, data: TraceData) -> None:
        """Sample from this network, as it is at every draw, with the tokens and the seed of these data."""
        codec: Codec = data.codec
        self._generator = LocalGenerator(network, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
        self._seed = data.seed
        longest = max(len(row.ids) for row in data.prompts())
        room = data.max_tokens - longest
        if room < 1:
            raise ConfigError(f"data.max_tokens is {data.max_tokens}; a prompt of {longest} tokens leaves no room")
        self.sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))

    def of(self, batch: PromptBatch) -> list[Rollout]:
        """The rollouts of one micro-batch, the samples of a problem side by side; drawn where they are not yet."""
        if self._block != batch.block:
            self._draw(batch)
        return [Rollout(row, completion) for row in batch.prompts for completion in self._drawn[row.problem.index]]

    def of_step(self, batch: PromptBatch) -> list[Rollout]:
        """The rollouts of the whole step on this rank."""
        return self.of(replace(batch, prompts=batch.step_prompts))

    def counts(self, batch: PromptBatch) -> StepCounts:
        """Tokens and rows of the step's rollouts, over all ranks."""
        self.of(batch)
        return self._counts

    def _draw(self, batch: PromptBatch) -> None:
        if self._generator is None:
            raise RuntimeError("the rollouts were asked for before the method was set up by a trainer")
        sampling = replace(self.sampling, seed=seed_for(self._seed, "rollouts", batch.block))
        prompts = [Prompt(row.problem.index, row.problem.text, row.ids) for row in batch.step_prompts]
        before = self._generator.spent
        written = {one.index: one.completions for one in self._generator.generate(prompts, sampling)}
        self.cost += _over_ranks(self._generator.spent - before)
        self._block, self._drawn = batch.block, written
        tokens = sum(len(one.ids) for completions in written.values() for one in completions)
        total, rows = sum_over_ranks([tokens, len(prompts) * sampling.num_samples])
        self._counts = StepCounts(int(total), int(rows))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The block that has not served to its end, in plain values; its cost so far."""
        drawn = {index: [asdict(one) for one in completions] for index, completions in self._drawn.items()}
        return {"block": self._block, "drawn": drawn, "counts": asdict(self._counts), "cost": asdict(self.cost)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved block."""
        self._block = state["block"]
        self._drawn = {int(index): tuple(_completion(one) for one in saved) for index, saved in state["drawn"].items()}
        self._counts, self.cost = StepCounts(**state["counts"]), GenerationCost(**state["cost"])


def as_batch(rollouts: Sequence[Rollout], counts: StepCounts, *, pad_id: int, for_teacher: bool = False) -> TokenBatch:
    """Rollouts as token batch, one a row: the ids that were drawn, never decoded and encoded again.

    for_teacher  the same completions behind the prompts that the teacher was taught to be asked with
    """
    documents = []
    for rollout in rollouts:
        prompt = rollout.row.teacher_ids if for_teacher else rollout.row.ids
        documents.append(Document((*prompt, *rollout.completion.ids), len(prompt), rollout.row.problem.index))
    return collate(
        documents,
        prompt_loss_weight=0.0,
        pad_id=pad_id,
        step_weight=float(counts.tokens),
        step_completion_tokens=counts.tokens,
        step_rows=counts.rows,
    )


def stored_as_batch(batch: PromptBatch, *, pad_id: int, for_teacher: bool = False) -> TokenBatch:
    """The stored traces of a micro-batch as token batch, behind the student's prompts or the teacher's."""
    documents = []
    for row in batch.stored:
        prompt = row.teacher_prompt_ids if for_teacher else row.ids[: row.prompt_length]
        documents.append(Document((*prompt, *row.ids[row.prompt_length :]), len(prompt), row.index))
    return collate(
        documents,
        prompt_loss_weight=0.0,
        pad_id=pad_id,
        step_weight=float(batch.step_stored_tokens),
        step_completion_tokens=batch.step_stored_tokens,
        step_rows=batch.step_stored_rows,
    )


def sampler_logprobs(rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """The natural-log probability of every drawn token under the policy it was drawn from, row by row, [N]."""
    values = [logprob for rollout in rollouts for logprob in rollout.completion.logprobs]
    return torch.tensor(values, dtype=torch.float32, device=device)


def drawn_logprobs(logits_NV: Tensor, label_N: Tensor, sampling_temperature: float) -> Tensor:
    """The same under the student as it is now: ``log_softmax(logits / sampling_temperature)`` at the drawn tokens."""
    logprobs_NV = torch.log_softmax(logits_NV.float() / (sampling_temperature or 1.0), dim=-1)
    return logprobs_NV.gather(-1, label_N.unsqueeze(-1)).squeeze(-1)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Each number summed over all ranks; as it is where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(values)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def _over_ranks(cost: GenerationCost) -> GenerationCost:
    """A rank's cost as that of all: counts are summed, the seconds are those of this one."""
    counted = {name: value for name, value in asdict(cost).items() if name != "seconds" and value is not None}
    summed = dict(zip(counted, sum_over_ranks([float(value) for value in counted.values()]), strict=True))
    whole = {name: type(value)(summed[name]) for name, value in counted.items()}
    return replace(cost, **whole)


def _completion(saved: dict[str, Any]) -> Completion:
    return Completion(**{**saved, "ids": tuple(saved["ids"]), "logprobs": tuple(saved["logprobs"])})
