"""Cutting a signal to its top K classes and a tail bucket, and spreading it out again."""

import math

from torch import Tensor

from research.losses.support import best_of
from research.records import DenseLogits, HiddenProjection, TopKLogprobs


def keep_top_k(signal: DenseLogits | HiddenProjection, top_k: int, chunk_rows: int | None = None) -> TopKLogprobs:
    """The K largest logprobs at temperature 1 and the log of the remaining mass, summed in log space.

    chunk_rows  most positions that are looked at at a time; None chooses
    """
    return best_of(signal, top_k, chunk_rows)


def spread_tail(signal: TopKLogprobs) -> Tensor:
    """Logprobs [N, V] of a sparse signal with its tail spread evenly over the classes that were not kept."""
    num_tail = signal.num_classes - signal.ids_NK.shape[-1]
    rest_N1 = signal.tail_logprob_N.unsqueeze(-1) - (math.log(num_tail) if num_tail else 0.0)
    return rest_N1.expand(*signal.tail_logprob_N.shape, signal.num_classes).scatter(
        -1, signal.ids_NK, signal.logprobs_NK
    )
