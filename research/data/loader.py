"""The loaders: micro-batches cut from rows that lie in memory, in an order that resumes exactly."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from research.data.views import View
from research.records import ClassBatch
from research.seeding import rng_for

Place = tuple[int, int]  # (epoch, micro-batches of that epoch already done)
BatchT = TypeVar("BatchT")


class Cut(NamedTuple):
    """A micro-batch in the epoch's order: its places [first, last), those of its step, and the numbers of both."""

    first: int
    last: int
    step_first: int
    step_last: int
    step: int
    micro_batch: int


class StepLoader(ABC, Generic[BatchT]):
    """The schedule that all loaders share: which rows make up which optimizer step, on which rank.

    batch_size    rows per *optimizer step*, over all ranks and micro-batches
    micro_batches micro-batches per step and rank (the trainer's ``accumulate_grad_batches``)
    shuffle       True: epoch ``e`` runs in the permutation ``rng_for(seed, "order", e)``; False: in row order
    where         says where an outer loop stands, as (epoch, micro-batches done); without it the loader counts itself

    The rows of a step do not depend on ``rank``, ``world_size`` or ``micro_batches``: each step is a run of
    ``batch_size`` rows of the epoch's order, cut into ``micro_batches * world_size`` near-equal parts. Every row comes
    exactly once per epoch over all ranks: nothing is dropped or repeated. The last step holds the rest; where the rest
    is too small to give every part a row, it joins the step before.

    Iterating starts at the place where the outer loop stands, or, without ``where``, at the loaded state once and at a
    new epoch each time after. The place is read when the first batch is asked for, not at ``iter()``: Lightning makes
    the iterator before it has settled its counters.

    Raises ValueError on arguments that fit no schedule: ``batch_size`` or rows below ``micro_batches * world_size``, a
    rank outside the world.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        batch_size: int,
        micro_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        where: Callable[[], Place] | None = None,
    ) -> None:
        self.num_rows = num_rows  # per epoch, over all ranks
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self._where = where
        self._check()
        self._parts = micro_batches * world_size
        self._step_bounds = _step_bounds(self.num_rows, batch_size, self._parts)
        self._next_start: Place = (0, 0)
        self._place: Place = (0, 0)

    @abstractmethod
    def _rows_of_epoch(self, epoch: int) -> Callable[[Cut], BatchT]:
        """A function from a cut of the epoch's order to the micro-batch of those places."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps per epoch."""
        return len(self._step_bounds)

    def __len__(self) -> int:
        """Micro-batches per epoch on this rank."""
        return self.num_steps * self.micro_batches

    def order(self, epoch: int) -> Tensor:
        """Row numbers [N] in the order in which epoch ``epoch`` visits them, over all ranks; on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_rows)
        return torch.randperm(self.num_rows, generator=rng_for(self.seed, "order", epoch))

    def __iter__(self) -> Iterator[BatchT]:
        # A generator: nothing below runs before the first batch is asked for.
        epoch, done = self._where() if self._where is not None else self._next_start
        self._next_start = (epoch + 1, 0)
        rows_of_epoch = self._rows_of_epoch(epoch)
        for micro_batch in range(done, len(self)):
            batch = rows_of_epoch(self._cut(micro_batch))
            self._place = (epoch, micro_batch + 1)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: epoch and micro-batches done in it, with what they count (an ended epoch is 0 of the next).

        With ``where``, the outer loop's count: a batch that was handed out but never processed, because its step
        raised, comes again.
        """
        epoch, position = self._where() if self._where is not None else self._place
        if position >= len(self):
            epoch, position = epoch + 1, 0
        return {"epoch": epoch, "position": position, **self._schedule()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises ValueError where the state counts other batches than this loader's."""
        here = self._schedule()
        different = [f"{key}: {state.get(key)} saved, {here[key]} now" for key in here if state.get(key) != here[key]]
        if different:
            raise ValueError(
                "the loader's saved place belongs to another schedule of batches, so no exact resume is possible ("
                + "; ".join(different)
                + "): resume with the saved settings, or start a new run from the saved weights"
            )
        self._place = self._next_start = (int(state["epoch"]), int(state["position"]))

    def _schedule(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "rows": self.num_rows,
            "batch_size": self.batch_size,
            "micro_batches": self.micro_batches,
            "world_size": self.world_size,
        }

    def _cut(self, micro_batch: int) -> Cut:
        """This rank's ``micro_batch`` in the epoch's order, and its step."""
        step, within = divmod(micro_batch, self.micro_batches)
        first, last = self._step_bounds[step]
        part = within * self.world_size + self.rank
        return Cut(*part_of(first, last, part, self._parts), first, last, step, within)

    def _check(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"a loader over {self.num_rows} rows: give at least 1")
        if self.micro_batches < 1 or self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"micro_batches={self.micro_batches}, rank={self.rank}, world_size={self.world_size}: give"
                " micro_batches and world_size of at least 1 and a rank from 0 to world_size - 1"
            )
        parts = self.micro_batches * self.world_size
        for name, rows in (("batch_size", self.batch_size), ("rows of the split", self.num_rows)):
            if rows < parts:
                raise ValueError(
                    f"{name} is {rows}, but each optimizer step is cut into {parts} parts ({self.micro_batches}"
                    f" micro-batches on each of {self.world_size} ranks): give at least {parts}, or cut less"
                )


class TensorLoader(StepLoader[ClassBatch]):
    """An iterable of ``ClassBatch`` over in-memory tensors; no dataset, no workers, no Python work per row.

    inputs   [N, ...] float; label_N [N] int64; index_N [N] int64 stable ids; all on one device
    view     augmentation, with the randomness of ``rng_for(seed, "view", e)`` in epoch ``e``, one draw per row
    The other arguments are those of :class:`StepLoader`. Raises ValueError on empty or ragged tensors.
    """

    def __init__(
        self, inputs: Tensor, label_N: Tensor, index_N: Tensor, *, view: View | None = None, **schedule: Any
    ) -> None:
        lengths = {"inputs": len(inputs), "label_N": len(label_N), "index_N": len(index_N)}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"tensors of {lengths} rows: all three must have the same number of rows, at least 1")
        self._inputs, self._label_N, self._index_N, self.view = inputs, label_N, index_N, view
        super().__init__(len(label_N), **schedule)

    def _rows_of_epoch(self, epoch: int) -> Callable[[Cut], ClassBatch]:
        device = self._inputs.device
        order_N = self.order(epoch).to(device) if self.shuffle else None
        label_N = self._label_N if order_N is None else self._label_N[order_N]
        index_N = self._index_N if order_N is None else self._index_N[order_N]
        draw_N = None
        if self.view is not None:
            draw_N = self.view.draw(self.num_rows, rng_for(self.seed, "view", epoch)).to(device)
            draw_N = draw_N if order_N is None else draw_N[order_N]

        def rows(cut: Cut) -> ClassBatch:
            taken = slice(cut.first, cut.last)
            inputs = self._inputs[taken] if order_N is None else self._inputs.index_select(0, order_N[taken])
            if self.view is not None and draw_N is not None:
                inputs = self.view.apply(inputs, draw_N[taken])
            return ClassBatch(inputs, label_N[taken], index_N[taken], cut.step_last - cut.step_first)

        return rows


def part_of(first: int, last: int, part: int, parts: int) -> tuple[int, int]:
    """The places [first, last) of one of ``parts`` near-equal parts of a run of rows."""
    rows = last - first
    return first + rows * part // parts, first + rows * (part + 1) // parts


def _step_bounds(num_rows: int, batch_size: int, parts: int) -> list[tuple[int, int]]:
    """[first, last) of each step; a rest of fewer rows than ``parts`` belongs to the step before it."""
    starts = list(range(0, num_rows, batch_size))
    if len(starts) > 1 and num_rows - starts[-1] < parts:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_rows], strict=True))
