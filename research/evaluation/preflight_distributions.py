"""How far two models agree, place by place, on one text that each reads behind its own prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.losses.projection import project
from research.models.modes import eval_mode
from research.records import DenseLogits, HiddenProjection, TeacherSignal, TopKLogprobs
from research.teachers.base import AbstractTeacher
from research.text.document import Document, collate

MOST_COMPARED = 16  # likeliest tokens of each place that are compared
DOCUMENTS_AT_ONCE = 8


class CannotBeAsked(ValueError):
    """A teacher that gives no answer to what a run would ask it."""


@contextmanager
def asking() -> Iterator[None]:
    """Whatever a teacher fails with inside, as a CannotBeAsked with the same words."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CannotBeAsked(str(error)) from error


@dataclass(frozen=True)
class Pair:
    """One completion behind the student's prompt, and the same ids behind the teacher's."""

    student: Document
    teacher: Document


@dataclass(frozen=True)
class Agreement:
    """Means over the places of the completions; probabilities and logs at temperature 1, nats.

    places            how many
    top_k             k, likeliest tokens compared: 16, a quarter of a smaller vocabulary, or what the teacher tells
    teacher_top_in_student_top_k   share of places where the teacher's likeliest token is among the student's k
    teacher_mass, student_mass     each one's probability of the tokens that are among the k of both
    teacher_share     what those hold of the probability of the teacher's own k: 1 where both have the same k
    student_nll, teacher_nll       of the token that stands there. Of a teacher that tells K probabilities alone, a
                      token outside them has its even share of the rest
    eos_probability   the teacher's, of the last token of those completions that end in an EOS; None where none does
    """

    places: int
    top_k: int
    teacher_top_in_student_top_k: float
    teacher_mass: float
    student_mass: float
    teacher_share: float
    student_nll: float
    teacher_nll: float
    eos_probability: float | None


@torch.no_grad()
def agreement(
    student: nn.Module,
    teacher: AbstractTeacher,
    pairs: Sequence[Pair],
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    device: torch.device,
) -> Agreement:
    """What both say of every place of the completions. No random number is drawn; the student's modes are kept.

    Raises ValueError where no completion has a place, CannotBeAsked where the teacher fails.
    """
    sums, ended = torch.zeros(6, dtype=torch.float64), list[float]()
    places = top_k = 0
    with eval_mode(student):
        for logits_NV, signal, label_N in _read(student, teacher, pairs, pad_id, device):
            ids_NK, logprobs_NK = _largest(signal, _num_compared(signal))
            top_k = ids_NK.shape[-1]
            teacher_label_N = _label_logprobs(signal, label_N)
            sums += _compared(logits_NV, ids_NK, logprobs_NK, label_N, teacher_label_N)
            places += len(label_N)
            is_end_N = torch.isin(label_N, torch.tensor(list(eos_ids), device=label_N.device))
            ended += teacher_label_N[is_end_N].exp().tolist()
    if places == 0:
        raise ValueError("no completion has a token to compare; expected at least one")
    top, teacher_mass, student_mass, share, student_nll, teacher_nll = (sums / places).tolist()
    at_end = sum(ended) / len(ended) if ended else None
    return Agreement(places, top_k, top, teacher_mass, student_mass, share, student_nll, teacher_nll, at_end)


def _read(
    student: nn.Module, teacher: AbstractTeacher, pairs: Sequence[Pair], pad_id: int, device: torch.device
) -> Iterator[tuple[Tensor, TeacherSignal, Tensor]]:
    """Student logits [N, V], the teacher's signal and the tokens that stand there, at the places of some documents."""
    kept = [pair for pair in pairs if pair.student.completion_ids]
    for start in range(0, len(kept), DOCUMENTS_AT_ONCE):
        share = kept[start : start + DOCUMENTS_AT_ONCE]
        own = collate([pair.student for pair in share], prompt_loss_weight=0.0, pad_id=pad_id).to(device)
        its = collate([pair.teacher for pair in share], prompt_loss_weight=0.0, pad_id=pad_id).to(device)
        logits_NV = student(*own.network_inputs())[own.completion_BT].float()
        with asking():
            signal = teacher.signal_at(its, its.completion_BT)
        yield logits_NV, signal, own.label_BT[own.completion_BT]


def _compared(
    logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, label_N: Tensor, teacher_label_N: Tensor
) -> Tensor:
    """Sums over places, in the order of the fields of :class:`Agreement`."""
    student_NV = torch.log_softmax(logits_NV, dim=-1)
    own_NK, own_ids_NK = student_NV.topk(ids_NK.shape[-1], dim=-1)
    same_NKK = ids_NK[:, :, None] == own_ids_NK[:, None, :]
    in_student_NK, in_teacher_NK = same_NKK.any(dim=2), same_NKK.any(dim=1)
    probs_NK = logprobs_NK.double().exp()
    common_N = (probs_NK * in_student_NK).sum(dim=-1)
    parts = (
        in_student_NK[:, 0].double(),
        common_N,
        (own_NK.double().exp() * in_teacher_NK).sum(dim=-1),
        common_N / probs_NK.sum(dim=-1),
        -student_NV.gather(-1, label_N[:, None])[:, 0].double(),
        -teacher_label_N.double(),
    )
    return torch.stack([part.sum() for part in parts]).cpu()


def _num_compared(signal: TeacherSignal) -> int:
    most = min(MOST_COMPARED, max(1, signal.num_classes // 4))
    return min(most, signal.ids_NK.shape[-1]) if isinstance(signal, TopKLogprobs) else most


def _largest(signal: TeacherSignal, top_k: int) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest tokens and their logprobs, [N, top_k] each."""
    if isinstance(signal, TopKLogprobs):
        return signal.ids_NK[:, :top_k], signal.logprobs_NK[:, :top_k]
    kept = torch.log_softmax(_logits(signal).float(), dim=-1).topk(top_k, dim=-1)
    return kept.indices, kept.values


def _label_logprobs(signal: TeacherSignal, label_N: Tensor) -> Tensor:
    """Natural log of what the teacher gives each token."""
    if not isinstance(signal, TopKLogprobs):
        return torch.log_softmax(_logits(signal).float(), dim=-1).gather(-1, label_N[:, None])[:, 0]
    is_kept_NK = signal.ids_NK == label_N[:, None]
    num_tail = max(signal.num_classes - signal.ids_NK.shape[-1], 1)
    share_N = signal.tail_logprob_N - torch.log(torch.tensor(float(num_tail)))
    kept_N = signal.logprobs_NK.masked_fill(~is_kept_NK, -torch.inf).amax(dim=-1)
    return torch.where(is_kept_NK.any(dim=-1), kept_N, share_N)


def _logits(signal: DenseLogits | HiddenProjection) -> Tensor:
    return signal.logits_NV if isinstance(signal, DenseLogits) else project(signal)
