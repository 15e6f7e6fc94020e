"""What student and teacher say at the places of completions, over the tokens that the tokenizer has.

Heads are padded to round sizes, and student and teacher by other amounts: rows of them that stand for no token are cut
off before anything is compared.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from research.errors import ConfigError
from research.losses.logprobs import working_dtype
from research.losses.policy import entropy
from research.losses.projection import first_classes, project
from research.records import DenseLogits, HiddenProjection, TeacherSignal, TokenBatch, TopKLogprobs
from research.teachers.top_k import keep_top_k, spread_tail

CHUNK_ROWS = 1024  # places whose logits are made at a time, where they are never written out


def logits_at(network: Any, tokens: TokenBatch, vocab_size: int) -> Tensor:
    """The network's logits [N, V] at the completion's places, row by row."""
    logits_BTV: Tensor = network(*tokens.network_inputs())
    return logits_BTV[tokens.completion_BT][:, :vocab_size]


def projection_at(network: Any, tokens: TokenBatch, vocab_size: int) -> HiddenProjection:
    """The hidden states and head that make the same logits, which are never written out."""
    projection: HiddenProjection = network.hidden_projection(*tokens.network_inputs())
    return first_classes(projection.at(tokens.completion_BT), vocab_size)


def signal_at(signal: TeacherSignal, tokens: TokenBatch, vocab_size: int, top_k: int | None) -> TeacherSignal:
    """The teacher's signal at the same places; its ``top_k`` largest probabilities and a tail where that is asked.

    Raises ConfigError where it is asked of a signal that was cut already.
    """
    signal = signal.at(tokens.completion_BT)
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
    return signal if top_k is None else keep_top_k(signal, min(top_k, signal.num_classes))


def drawn_logprobs(student: Tensor | HiddenProjection, label_N: Tensor, sampling_temperature: float) -> Tensor:
    """``log_softmax(logits / sampling_temperature)`` at the drawn tokens, [N]; at 0 as at 1, as the sampler has it.

    Logits that were never written out are made for CHUNK_ROWS places at a time.
    """
    pairs = zip(_logit_chunks(student), label_N.split(CHUNK_ROWS), strict=True)
    return torch.cat([_logprobs_at(logits_NV, some_N, sampling_temperature) for logits_NV, some_N in pairs])


def teacher_logprobs(signal: TeacherSignal, label_N: Tensor, sampling_temperature: float) -> Tensor:
    """The same of the teacher, at the temperature that the student is sampled at.

    A token outside the K of a top-k signal has an equal part of the rest.
    """
    with torch.no_grad(), torch.autocast(label_N.device.type, enabled=False):
        if isinstance(signal, HiddenProjection):
            return drawn_logprobs(signal, label_N, sampling_temperature)
        logits_NV = signal.logits_NV if isinstance(signal, DenseLogits) else spread_tail(signal)
        return drawn_logprobs(logits_NV, label_N, sampling_temperature)


@torch.no_grad()
def mean_entropy(student: Tensor | HiddenProjection) -> float:
    """Mean entropy of the student's next token over all places, nats, at temperature 1."""
    return float(torch.cat([entropy(logits_NV) for logits_NV in _logit_chunks(student)]).mean())


def _logit_chunks(student: Tensor | HiddenProjection) -> Iterator[Tensor]:
    if isinstance(student, Tensor):
        yield from student.split(CHUNK_ROWS)
    else:
        for hidden_ND in student.hidden_ND.split(CHUNK_ROWS):
            yield project(replace(student, hidden_ND=hidden_ND))


def _logprobs_at(logits_NV: Tensor, label_N: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.to(working_dtype(logits_NV))
    if temperature not in (0.0, 1.0):
        logits_NV = logits_NV / temperature
    return logits_NV.gather(-1, label_N.unsqueeze(-1)).squeeze(-1) - logits_NV.logsumexp(dim=-1)
