"""Which classes a sparse comparison keeps, and what a teacher says of them: its own K best, or those of another side.

Any choice of K classes makes a fair comparison as long as both sides keep their own mass of everything else in the tail
(``sparse.py``): the value is between 0 and the dense one. The teacher's best classes are what a cache or a server can
tell; the student's own best are where a live student puts its mass, and where a reverse KL has its terms. Neither sees
inside its tail: on the student's support a class that only the teacher likes counts as part of the tail's mass, so the
value may be 0 before the two agree.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from research.losses.linear import automatic_chunk_rows
from research.losses.linear_chunks import spans
from research.losses.projection import project
from research.losses.sparse import bucket_logprobs
from research.records import DenseLogits, HiddenProjection, TopKLogprobs


def best_of(signal: DenseLogits | HiddenProjection, top_k: int, chunk_rows: int | None = None) -> TopKLogprobs:
    """The signal cut to its K largest logprobs and a tail, at temperature 1; of equal ones the lower ids come first.

    Rows may have any leading dimensions. A projection is written out ``chunk_rows`` positions at a time (None chooses).
    Summed in log space in float64, so the tail is exact however small. Raises ValueError unless ``1 <= top_k <= V``.
    """
    _check_top_k(top_k, signal.num_classes)
    parts = []
    for logits_NV in _chunks(signal, chunk_rows):
        ids_NK = logits_NV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        parts.append(_buckets(logits_NV, ids_NK))
    return _joined(parts, _rows(signal), signal.num_classes, top_k)


def on_support(signal: DenseLogits | HiddenProjection, ids_NK: Tensor, chunk_rows: int | None = None) -> TopKLogprobs:
    """The signal on classes that another side chose: its logprobs of ``ids_NK``, in falling order, and its own tail.

    ``ids_NK`` are distinct within a row. They need not be the signal's best, so its tail may hold most of its mass.
    Raises ValueError on rows that are not the signal's.
    """
    rows, top_k = _rows(signal), int(ids_NK.shape[-1])
    if ids_NK.shape[:-1] != rows:
        raise ValueError(
            f"the support has rows of shape {tuple(ids_NK.shape[:-1])}, the signal {tuple(rows)}: expected one list of "
            "classes for each row"
        )
    _check_top_k(top_k, signal.num_classes)
    flat_ids_NK, done, parts = ids_NK.reshape(-1, top_k).long(), 0, []
    for logits_NV in _chunks(signal, chunk_rows):
        chosen_NK = flat_ids_NK[done : done + len(logits_NV)]
        order_NK = logits_NV.gather(-1, chosen_NK).argsort(dim=-1, descending=True, stable=True)
        parts.append(_buckets(logits_NV, chosen_NK.gather(-1, order_NK)))
        done += len(logits_NV)
    return _joined(parts, rows, signal.num_classes, top_k)


def on_student_support(
    student: Tensor | HiddenProjection,
    signal: DenseLogits | HiddenProjection,
    top_k: int,
    chunk_rows: int | None = None,
) -> TopKLogprobs:
    """The teacher's signal on the student's own K best classes of each row, for ``soft_target`` of that same student.

    ``student`` is logits ``[..., V]``, or what makes them; no gradient passes through the choice.
    """
    side = DenseLogits(student.detach()) if isinstance(student, Tensor) else student
    return on_support(signal, best_of(side, top_k, chunk_rows).ids_NK, chunk_rows)


def _chunks(signal: DenseLogits | HiddenProjection, chunk_rows: int | None) -> Iterator[Tensor]:
    """The signal's logits [n, V] in float64, some positions at a time, detached."""
    with torch.no_grad(), torch.autocast(_tensor(signal).device.type, enabled=False):
        flat = _tensor(signal).detach().flatten(0, -2)
        size = chunk_rows or automatic_chunk_rows(signal.num_classes, flat.device)
        for part in spans(max(len(flat), 1), size):  # one empty chunk of no rows
            if isinstance(signal, DenseLogits):
                yield flat[part].double()
            else:
                rows = HiddenProjection(flat[part], signal.weight_VD, signal.bias_V, signal.softcap)
                yield project(rows).detach().double()


def _buckets(logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    return ids_NK, bucket_logprobs(logits_NV, ids_NK).float()


def _joined(parts: list[tuple[Tensor, Tensor]], rows: torch.Size, num_classes: int, top_k: int) -> TopKLogprobs:
    ids_NK = torch.cat([ids for ids, _ in parts])
    buckets_NK1 = torch.cat([buckets for _, buckets in parts])
    no_tail_N = buckets_NK1.new_full(ids_NK.shape[:1], -math.inf)
    return TopKLogprobs(
        ids_NK=ids_NK.reshape(*rows, top_k),
        logprobs_NK=buckets_NK1[:, :top_k].reshape(*rows, top_k),
        tail_logprob_N=(buckets_NK1[:, -1] if top_k < num_classes else no_tail_N).reshape(rows),
        num_classes=num_classes,
    )


def _check_top_k(top_k: int, num_classes: int) -> None:
    if not 1 <= top_k <= num_classes:
        raise ValueError(f"top_k={top_k} of {num_classes} classes: expected 1 to {num_classes}")


def _tensor(signal: DenseLogits | HiddenProjection) -> Tensor:
    return signal.logits_NV if isinstance(signal, DenseLogits) else signal.hidden_ND


def _rows(signal: DenseLogits | HiddenProjection) -> torch.Size:
    return _tensor(signal).shape[:-1]
