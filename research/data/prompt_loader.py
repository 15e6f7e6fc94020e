"""The loader of prompts: problems for a student to answer while it trains, and stored traces beside them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from research.data.loader import Cut, StepLoader, part_of
from research.records import PromptBatch, PromptRow, StoredRow
from research.seeding import rng_for


class PromptLoader(StepLoader[PromptBatch]):
    """An iterable of ``PromptBatch``; the prompts of a step follow the schedule of all loaders.

    prompts             every problem of the split, in the order of its index
    steps_per_rollout   optimizer steps in a row that share their prompts, and so the rollouts drawn for them
    stored              documents beside the prompts; () for none
    num_stored          documents of a step over all ranks and micro-batches, from an order of their own that goes
                        through all of them before any comes again
    The other arguments are those of :class:`StepLoader`; ``batch_size`` counts prompts.

    Raises ValueError for a schedule without meaning, or stored rows without a number of them.
    """

    def __init__(
        self,
        prompts: Sequence[PromptRow],
        *,
        steps_per_rollout: int = 1,
        stored: Sequence[StoredRow] = (),
        num_stored: int = 0,
        **schedule: Any,
    ) -> None:
        if steps_per_rollout < 1:
            raise ValueError(f"steps_per_rollout={steps_per_rollout}: give at least 1")
        if (num_stored > 0) != (len(stored) > 0):
            raise ValueError(f"num_stored={num_stored} with {len(stored)} stored rows: give both or neither")
        self._prompts, self._stored, self._num_stored = prompts, stored, num_stored
        self._repeats = steps_per_rollout
        self._stored_order: tuple[int, list[int]] = (-1, [])  # the turn that was drawn last, and its order
        super().__init__(len(prompts), **schedule)
        if 0 < num_stored < self._parts:
            raise ValueError(
                f"num_stored={num_stored}, but a step is cut into {self._parts} parts: give that many at least, or 0"
            )
        self._step_bounds = [bounds for bounds in self._step_bounds for _ in range(steps_per_rollout)]

    def _schedule(self) -> dict[str, int]:
        return {**super()._schedule(), "steps_per_rollout": self._repeats, "num_stored": self._num_stored}

    def _rows_of_epoch(self, epoch: int) -> Callable[[Cut], PromptBatch]:
        order = self.order(epoch).tolist()

        def rows(cut: Cut) -> PromptBatch:
            mine = [place for micro_batch in range(self.micro_batches) for place in self._places(cut, micro_batch)]
            step = epoch * self.num_steps + cut.step
            block, repeat = divmod(step, self._repeats)
            stored = self._stored_of(step)
            part = cut.micro_batch * self.world_size + self.rank
            first, last = part_of(0, len(stored), part, self._parts)
            return PromptBatch(
                prompts=tuple(self._prompts[order[place]] for place in range(cut.first, cut.last)),
                step_prompts=tuple(self._prompts[order[place]] for place in mine),
                stored=tuple(stored[first:last]),
                step_stored_tokens=sum(len(row.ids) - row.prompt_length for row in stored),
                step_stored_rows=len(stored),
                block=block,
                repeat=repeat,
                micro_batch=cut.micro_batch,
                step_rows=cut.step_last - cut.step_first,
            )

        return rows

    def _places(self, cut: Cut, micro_batch: int) -> range:
        """This rank's places in the epoch's order of one micro-batch of the step."""
        part = micro_batch * self.world_size + self.rank
        return range(*part_of(cut.step_first, cut.step_last, part, self._parts))

    def _stored_of(self, step: int) -> list[StoredRow]:
        """The stored rows of an optimizer step, counted from the first of the run: a run through whole orders."""
        chosen: list[StoredRow] = []
        place = step * self._num_stored
        while len(chosen) < self._num_stored:
            turn, start = divmod(place, len(self._stored))
            if self._stored_order[0] != turn:
                generator = rng_for(self.seed, "stored", turn)
                self._stored_order = turn, torch.randperm(len(self._stored), generator=generator).tolist()
            rows = self._stored_order[1][start : start + self._num_stored - len(chosen)]
            chosen += [self._stored[row] for row in rows]
            place += len(rows)
        return chosen
