"""Cutting a dense signal to its top K classes and a tail bucket, and spreading it out again."""

import math

from torch import Tensor

from research.losses.sparse import bucket_logprobs
from research.records import DenseLogits, TopKLogprobs


def keep_top_k(signal: DenseLogits, top_k: int) -> TopKLogprobs:
    """The K largest logprobs at temperature 1 and the log of the remaining mass, summed in log space."""
    logits_NV = signal.logits_NV.double()
    ids_NK = logits_NV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    buckets_NK1 = bucket_logprobs(logits_NV, ids_NK).float()
    has_tail = buckets_NK1.shape[-1] > top_k
    return TopKLogprobs(
        ids_NK=ids_NK,
        logprobs_NK=buckets_NK1[:, :top_k],
        tail_logprob_N=buckets_NK1[:, -1] if has_tail else buckets_NK1.new_full(ids_NK.shape[:1], -math.inf),
        num_classes=logits_NV.shape[-1],
    )


def spread_tail(signal: TopKLogprobs) -> Tensor:
    """Logprobs [N, V] of a sparse signal with its tail spread evenly over the classes that were not kept."""
    num_tail = signal.num_classes - signal.ids_NK.shape[-1]
    rest_N1 = signal.tail_logprob_N[:, None] - (math.log(num_tail) if num_tail else 0.0)
    return rest_N1.expand(-1, signal.num_classes).scatter(-1, signal.ids_NK, signal.logprobs_NK)
