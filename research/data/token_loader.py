"""The loader of documents: the schedule of all loaders, with packing and length grouping that change no step's content.

Which documents make up an optimizer step is the schedule's alone. Packing lays a step's documents side by side in fewer
rows, and a mean over the step's counts makes padded, packed and accumulated steps one and the same gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from research.data.loader import Cut, StepLoader
from research.records import TokenBatch
from research.seeding import rng_for
from research.text.compact import lengths
from research.text.document import Document, collate, document_counts


class TokenLoader(StepLoader[TokenBatch]):
    """An iterable of ``TokenBatch`` over encoded documents.

    documents           in the order of their index
    pad_id, prompt_loss_weight   as the codec has them
    packed_to           tokens of a row into which several documents are packed; None: one document a row, padded to the
                        longest of the micro-batch
    length_grouping     0: the shuffled order as it is; n: within each run of n steps the documents are sorted by
                        length, and the steps then shuffled: a step pads little, and batches are less random
    device              where batches are put; None: the CPU
    The other arguments are those of :class:`StepLoader`; ``batch_size`` counts documents.

    Raises ValueError where a document is longer than ``packed_to``.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        pad_id: int,
        prompt_loss_weight: float = 0.0,
        packed_to: int | None = None,
        length_grouping: int = 0,
        device: torch.device | None = None,
        **schedule: Any,
    ) -> None:
        longest = int(lengths(documents).max(initial=0))
        if packed_to is not None and longest > packed_to:
            raise ValueError(f"packed_to={packed_to}: the longest document has {longest} tokens; give at least that")
        if length_grouping < 0:
            raise ValueError(f"length_grouping={length_grouping}: give 0 (none) or a number of steps")
        self._documents = documents
        self._pad_id, self._prompt_loss_weight, self._packed_to = pad_id, prompt_loss_weight, packed_to
        self._length_grouping, self._device = length_grouping, device
        super().__init__(len(documents), **schedule)

    def order(self, epoch: int) -> Tensor:
        shuffled_N = super().order(epoch)
        if self._length_grouping == 0 or not self.shuffle:
            return shuffled_N
        length_N = torch.from_numpy(lengths(self._documents))
        group = self._length_grouping * self.batch_size
        sorted_N = torch.cat([part[length_N[part].argsort(stable=True)] for part in shuffled_N.split(group)])
        whole, rest = divmod(self.num_rows, self.batch_size)
        steps = sorted_N[: whole * self.batch_size].view(whole, self.batch_size)
        steps = steps[torch.randperm(whole, generator=rng_for(self.seed, "steps", epoch))]
        return torch.cat([steps.flatten(), sorted_N[self.num_rows - rest :]])

    def _rows_of_epoch(self, epoch: int) -> Callable[[Cut], TokenBatch]:
        order = self.order(epoch).tolist()
        last_step: tuple[int, tuple[float, int, int]] | None = None

        def rows(cut: Cut) -> TokenBatch:
            nonlocal last_step
            if last_step is None or last_step[0] != cut.step_first:
                step = [self._documents[row] for row in order[cut.step_first : cut.step_last]]
                last_step = cut.step_first, document_counts(step, self._prompt_loss_weight)
            weight, completion_tokens, documents = last_step[1]
            batch = collate(
                [self._documents[row] for row in order[cut.first : cut.last]],
                pad_id=self._pad_id,
                prompt_loss_weight=self._prompt_loss_weight,
                packed_to=self._packed_to,
                step_weight=weight,
                step_completion_tokens=completion_tokens,
                step_rows=documents,
            )
            return batch if self._device is None else batch.to(self._device)

        return rows
