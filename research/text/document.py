"""From token ids to tensors: the one place where labels are shifted, places weighed, and documents packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from research.records import PAD_SEGMENT, TokenBatch
from research.text.refusals import TooLong


@dataclass(frozen=True, slots=True)
class Document:
    """One prompt with its completion, as ids.

    ids            the whole document, the EOS of its completion included
    prompt_length  how many of ``ids`` are prompt: at least 1, since the first token of a completion has to be predicted
                   by something; all of them where there is no completion
    index          the stable id of the item it came from

    Raises ValueError where ``prompt_length`` does not lie in 1..len(ids).
    """

    ids: tuple[int, ...]
    prompt_length: int
    index: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.ids):
            raise ValueError(
                f"document {self.index}: prompt_length={self.prompt_length} of {len(self.ids)} tokens; "
                "give 1 to the number of tokens"
            )

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """What follows the prompt."""
        return self.ids[self.prompt_length :]


def document_counts(documents: Sequence[Document], prompt_loss_weight: float) -> tuple[float, int, int]:
    """``(weight, completion_tokens, rows)``: what the documents count for in an optimizer step, see TokenBatch.

    Equal to the sums over their collated batches, however those are cut, padded or packed.
    """
    _check_weight(prompt_loss_weight)
    completion_tokens = sum(len(document.ids) - document.prompt_length for document in documents)
    prompt_tokens = sum(document.prompt_length - 1 for document in documents)
    return completion_tokens + prompt_loss_weight * prompt_tokens, completion_tokens, len(documents)


def collate(
    documents: Sequence[Document],
    *,
    prompt_loss_weight: float,
    pad_id: int,
    step_weight: float | None = None,
    step_completion_tokens: int | None = None,
    step_rows: int | None = None,
    packed_to: int | None = None,
) -> TokenBatch:
    """The documents as one micro-batch, padded on the right to its longest row.

    packed_to  None: one document per row, in the order given. n: documents share rows of at most n tokens, the longest
               first into the first row that has room; each keeps its own positions, from 0, and its own segment
    step_...   the counts of the whole optimizer step; where one is not given, that of these documents

    Raises ValueError for no documents or a weight outside [0, 1], TooLong where a document exceeds ``packed_to``.
    """
    if not documents:
        raise ValueError("no documents to collate: give at least one")
    weight, completion_tokens, rows = document_counts(documents, prompt_loss_weight)
    placed = _one_per_row(documents) if packed_to is None else _packed(documents, packed_to)
    ordered = [documents[number] for row in placed for number in row]
    flat = _Flat.of(ordered, placed)
    completion_N = flat.completion_N
    weight_N = np.where(completion_N, np.float32(1), np.float32(prompt_loss_weight))
    weight_N[flat.last_N] = 0
    return TokenBatch(
        ids_BT=flat.spread(flat.ids_N, pad_id),
        label_BT=flat.spread(flat.label_N, 0),
        weight_BT=flat.spread(weight_N, 0),
        completion_BT=flat.spread(completion_N, False),
        position_BT=flat.spread(flat.position_N, 0),
        segment_BT=flat.spread(flat.segment_N, PAD_SEGMENT),
        index_D=torch.tensor([document.index for document in ordered], dtype=torch.int64),
        step_weight=weight if step_weight is None else step_weight,
        step_completion_tokens=completion_tokens if step_completion_tokens is None else step_completion_tokens,
        step_rows=rows if step_rows is None else step_rows,
    )


@dataclass(frozen=True)
class _Flat:
    """All tokens of a batch in one line (N), document after document, and the cell of [B, T] that each belongs to."""

    ids_N: np.ndarray
    position_N: np.ndarray
    segment_N: np.ndarray
    last_N: np.ndarray
    completion_N: np.ndarray
    cell_N: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def of(cls, ordered: Sequence[Document], placed: Sequence[Sequence[int]]) -> "_Flat":
        length_D = np.array([len(document.ids) for document in ordered])
        prompt_D = np.array([document.prompt_length for document in ordered])
        per_row_B = np.array([len(row) for row in placed])
        row_D = np.repeat(np.arange(len(placed)), per_row_B)
        first_D = np.repeat(np.cumsum(per_row_B) - per_row_B, per_row_B)  # the first document of the same row
        begin_D = np.cumsum(length_D) - length_D
        offset_D = begin_D - begin_D[first_D]
        width, total = int((offset_D + length_D).max()), int(length_D.sum())
        position_N = np.arange(total) - np.repeat(begin_D, length_D)
        last_N = np.zeros(total, dtype=bool)
        last_N[begin_D + length_D - 1] = True
        return cls(
            ids_N=np.fromiter(chain.from_iterable(document.ids for document in ordered), np.int64, total),
            position_N=position_N,
            segment_N=np.repeat(np.arange(len(ordered)) - first_D + 1, length_D),
            last_N=last_N,
            completion_N=(position_N >= np.repeat(prompt_D, length_D) - 1) & ~last_N,
            cell_N=position_N + np.repeat(row_D * width + offset_D, length_D),
            shape=(len(placed), width),
        )

    @property
    def label_N(self) -> np.ndarray:
        """The next token of the same document; 0 at its last."""
        label_N = np.roll(self.ids_N, -1)
        label_N[self.last_N] = 0
        return label_N

    def spread(self, values_N: np.ndarray, fill: float) -> Tensor:
        """The values in their cells of [B, T], ``fill`` in all others."""
        cells = np.full(self.shape[0] * self.shape[1], fill, dtype=values_N.dtype)
        cells[self.cell_N] = values_N
        return torch.from_numpy(cells.reshape(self.shape))


def _one_per_row(documents: Sequence[Document]) -> list[list[int]]:
    return [[number] for number in range(len(documents))]


def _packed(documents: Sequence[Document], packed_to: int) -> list[list[int]]:
    """First fit, longest first: numbers of the documents of each row."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(documents)), key=lambda number: -len(documents[number].ids)):
        length = len(documents[number].ids)
        if length > packed_to:
            raise TooLong(
                f"document {documents[number].index} has {length} tokens and rows are packed to {packed_to}; "
                "raise packed_to, or lower the codec's max_tokens so that such documents are counted and dropped"
            )
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(packed_to)
        rows[row].append(number)
        room[row] -= length
    return rows


def _check_weight(prompt_loss_weight: float) -> None:
    if not 0 <= prompt_loss_weight <= 1:
        raise ValueError(f"prompt_loss_weight={prompt_loss_weight!r}: give a number from 0 (prompt not graded) to 1")
