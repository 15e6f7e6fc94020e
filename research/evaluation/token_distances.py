"""Where along one completion student and teacher disagree, token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.evaluation.exposure import completion_logits
from research.losses.divergences import forward_kl, reverse_kl
from research.records import Completion, Problem
from research.text.codec import Codec


@dataclass(frozen=True)
class TokenDistances:
    """What two networks say of the places of one completion; one value per token, temperature 1, nats.

    pieces        each token's own text, an EOS included
    preferred     text of the teacher's likeliest token at that place
    forward_kl    KL(teacher || student) of the distributions that the token was drawn from
    reverse_kl    KL(student || teacher) of them: what ``on_policy`` lowers by default
    student_nll, teacher_nll   -log of the probability that each gives the token that stands there
    """

    pieces: tuple[str, ...]
    preferred: tuple[str, ...]
    forward_kl: tuple[float, ...]
    reverse_kl: tuple[float, ...]
    student_nll: tuple[float, ...]
    teacher_nll: tuple[float, ...]


def token_distances(
    student: nn.Module,
    teacher: nn.Module,
    codec: Codec,
    teacher_codec: Codec,
    problem: Problem,
    completion: Completion,
) -> TokenDistances:
    """Read one completion with both networks, each behind the prompt of its own template, and compare them.

    Modes and gradients of the networks are left as they are. Raises ValueError for a completion without tokens.
    """
    if not completion.ids:
        raise ValueError(f"the completion of problem {problem.index} has no token; give one that was written")
    written = {problem.index: completion}
    student_NV, teacher_NV = (
        completion_logits(network, own, [problem], written)[:, : codec.vocab_size].cpu()
        for network, own in ((student, codec), (teacher, teacher_codec))
    )
    label_N = torch.tensor(completion.ids)
    return TokenDistances(
        pieces=tuple(codec.pieces(completion.ids)),
        preferred=tuple(codec.pieces(teacher_NV.argmax(dim=-1).tolist())),
        forward_kl=tuple(forward_kl(student_NV, teacher_NV).tolist()),
        reverse_kl=tuple(reverse_kl(student_NV, teacher_NV).tolist()),
        student_nll=_nll(student_NV, label_N),
        teacher_nll=_nll(teacher_NV, label_N),
    )


def _nll(logits_NV: Tensor, label_N: Tensor) -> tuple[float, ...]:
    nll_N = -logits_NV.log_softmax(dim=-1).gather(-1, label_N[:, None])[:, 0]
    return tuple(nll_N.tolist())
