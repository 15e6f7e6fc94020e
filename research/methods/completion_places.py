"""What student and teacher say at the places of completions, over the tokens that the tokenizer has.

Heads are padded to round sizes, and student and teacher by other amounts: rows of them that stand for no token are cut
off before anything is compared.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from research.errors import ConfigError
from research.losses.linear import automatic_chunk_rows, linear_logprobs
from research.losses.logprobs import working_dtype
from research.losses.policy import entropy
from research.losses.projection import first_classes, project
from research.losses.sparse import teacher_bucket_logprobs
from research.records import DenseLogits, HiddenProjection, TeacherSignal, TokenBatch, TopKLogprobs
from research.teachers.top_k import keep_top_k

CHUNK_ROWS = 1024  # places whose logits are copied in another precision at a time


def logits_at(network: Any, tokens: TokenBatch, vocab_size: int) -> Tensor:
    """The network's logits [N, V] at the completion's places, row by row."""
    logits_BTV: Tensor = network(*tokens.network_inputs())
    return logits_BTV[tokens.completion_BT][:, :vocab_size]


def projection_at(network: Any, tokens: TokenBatch, vocab_size: int) -> HiddenProjection:
    """The hidden states and head that make the same logits, which are never written out."""
    projection: HiddenProjection = network.hidden_projection(*tokens.network_inputs())
    return first_classes(projection.at(tokens.completion_BT), vocab_size)


def over_tokens(
    signal: TeacherSignal, vocab_size: int, top_k: int | None, chunk_rows: int | None = None
) -> TeacherSignal:
    """The teacher's signal over the same tokens; its ``top_k`` largest probabilities and a tail where that is asked.

    Raises ConfigError where it is asked of a signal that was cut already.
    """
    if isinstance(signal, TopKLogprobs):
        if top_k is not None:
            kept = signal.ids_NK.shape[-1]
            raise ConfigError(
                f"method.teacher_top_k is {top_k}, and this teacher gives its {kept} largest probabilities; leave "
                "method.teacher_top_k null, and choose their number where the teacher is configured"
            )
        return signal
    if isinstance(signal, HiddenProjection):
        signal = first_classes(signal, vocab_size)
    else:
        signal = DenseLogits(signal.logits_NV[:, :vocab_size])
    return signal if top_k is None else keep_top_k(signal, min(top_k, signal.num_classes), chunk_rows)


def drawn_logprobs(
    student: Tensor | HiddenProjection, label_N: Tensor, sampling_temperature: float, **chunks: Any
) -> Tensor:
    """``log_softmax(logits / sampling_temperature)`` at the drawn tokens, [N]; at 0 as at 1, as the sampler has it.

    Logits that were never written out are made some places at a time, once for the values and again for the gradient;
    ``chunks`` are options of ``linear_logprobs``.
    """
    temperature = sampling_temperature or 1.0
    if isinstance(student, HiddenProjection):
        return linear_logprobs(student, label_N, temperature=temperature, **chunks)
    pairs = zip(student.split(CHUNK_ROWS), label_N.split(CHUNK_ROWS), strict=True)
    return torch.cat([_logprobs_at(logits_NV, some_N, temperature) for logits_NV, some_N in pairs])


def teacher_logprobs(
    signal: TeacherSignal, label_N: Tensor, sampling_temperature: float, *, chunk_rows: int | None = None
) -> Tensor:
    """The same of the teacher, at the temperature that the student is sampled at.

    A token outside the K of a top-k signal has an equal part of the rest.
    """
    with torch.no_grad(), torch.autocast(label_N.device.type, enabled=False):
        if isinstance(signal, HiddenProjection):
            return drawn_logprobs(signal, label_N, sampling_temperature, chunk_rows=chunk_rows)
        if isinstance(signal, DenseLogits):
            return drawn_logprobs(signal.logits_NV, label_N, sampling_temperature)
        return _bucket_logprobs_at(signal, label_N, sampling_temperature or 1.0)


@torch.no_grad()
def mean_entropy(student: Tensor | HiddenProjection, *, chunk_rows: int | None = None) -> float:
    """Mean entropy of the student's next token over all places, nats, at temperature 1."""
    return float(torch.cat([entropy(logits_NV) for logits_NV in _logit_chunks(student, chunk_rows)]).mean())


def _logit_chunks(student: Tensor | HiddenProjection, chunk_rows: int | None) -> Iterator[Tensor]:
    if isinstance(student, Tensor):
        yield from student.split(CHUNK_ROWS)
    else:
        rows = chunk_rows or automatic_chunk_rows(student.num_classes, student.hidden_ND.device)
        for hidden_ND in student.hidden_ND.split(rows):
            yield project(replace(student, hidden_ND=hidden_ND))


def _bucket_logprobs_at(signal: TopKLogprobs, label_N: Tensor, temperature: float) -> Tensor:
    """Of a token among the K its own, of any other an equal part of the rest's; nothing is as wide as V."""
    buckets_NK1, kept = teacher_bucket_logprobs(signal, temperature), signal.ids_NK.shape[-1]
    is_it_NK = signal.ids_NK == label_N.unsqueeze(-1)
    kept_N = buckets_NK1[:, :kept].masked_fill(~is_it_NK, -math.inf).amax(dim=-1)
    num_tail = signal.num_classes - kept
    return torch.where(is_it_NK.any(dim=-1), kept_N, buckets_NK1[:, -1] - math.log(num_tail)) if num_tail else kept_N


def _logprobs_at(logits_NV: Tensor, label_N: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.to(working_dtype(logits_NV))
    if temperature != 1:
        logits_NV = logits_NV / temperature
    return logits_NV.gather(-1, label_N.unsqueeze(-1)).squeeze(-1) - logits_NV.logsumexp(dim=-1)
