"""How well the student copies the teacher: agreement, divergences, error copying, order of the wrong classes.

Fidelity is not accuracy: a student may copy more and score less (Stanton et al. 2021, arXiv:2106.05945). Logits are
[N, V]; predictions are argmaxes, the lowest class id winning among equal logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from research.losses.soft_target import logit_matching
from research.metrics.base import MeanOverItems, UndefinedMetric, check_labels, check_logits, check_pair


class AgreementAtK(MeanOverItems):
    """Share of items whose teacher argmax is among the student's ``k`` largest logits; at ``k=1`` equal argmaxes.

    Equal student logits rank by class id, lowest first, so that a constant student does not agree with everything.

    Raises ValueError on ``k`` below 1, and :class:`UndefinedMetric` from ``compute`` where ``k >= V``: it would be 1
    for every student.
    """

    higher_is_better = True
    num_classes: Tensor

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1, the number of student classes to look at")
        self.k = k
        self.add_state("num_classes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, student_logits_NV: Tensor, teacher_prediction_N: Tensor) -> None:
        """Add one batch of student logits [N, V] and teacher argmaxes int64 [N]."""
        check_labels(student_logits_NV, teacher_prediction_N)
        class_V = torch.arange(student_logits_NV.shape[1], device=student_logits_NV.device)
        chosen_N1 = teacher_prediction_N[:, None]
        logit_N1 = student_logits_NV.gather(1, chosen_N1)
        before_NV = (student_logits_NV > logit_N1) | ((student_logits_NV == logit_N1) & (class_V < chosen_N1))
        self.num_classes.fill_(student_logits_NV.shape[1])
        self.add(before_NV.sum(dim=-1) < self.k)

    def compute(self) -> Tensor:
        """The share, in [0, 1]."""
        share = super().compute()
        if int(self.num_classes) <= self.k:
            raise UndefinedMetric(f"agreement@{self.k} of {int(self.num_classes)} classes is 1 for every student")
        return share


class MeanDivergence(MeanOverItems):
    """Mean over items of a divergence of ``research/losses/divergences.py``, the function that training uses.

    ``divergence(student_logits_NV, teacher_logits_NV, temperature=...)`` gives one value per item, in nats (total
    variation: a probability) at ``temperature`` on both sides, without the T-squared factor of the training loss. It is
    called in float64.
    """

    higher_is_better = False

    def __init__(self, divergence: Callable[..., Tensor], temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.divergence = divergence
        self.temperature = temperature

    def update(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> None:
        """Add one batch."""
        check_pair(student_logits_NV, teacher_logits_NV)
        student_NV, teacher_NV = student_logits_NV.double(), teacher_logits_NV.double()
        self.add(self.divergence(student_NV, teacher_NV, temperature=self.temperature))


class ErrorCopying(Metric):
    """P(student's prediction = teacher's prediction | teacher's prediction is wrong), in [0, 1].

    High values mean that the teacher's particular mistakes were copied, not only its knowledge.

    Raises :class:`UndefinedMetric` from ``compute`` where the teacher is never wrong: there is nothing to copy, and 0
    would claim a student that copies none of it.
    """

    is_differentiable = False
    full_state_update = False
    copied: Tensor
    teacher_errors: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("copied", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("teacher_errors", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, student_logits_NV: Tensor, teacher_prediction_N: Tensor, label_N: Tensor) -> None:
        """Add one batch: student logits [N, V], teacher argmaxes and labels int64 [N]."""
        check_labels(student_logits_NV, label_N)
        check_labels(student_logits_NV, teacher_prediction_N)
        teacher_wrong_N = teacher_prediction_N != label_N
        self.teacher_errors += teacher_wrong_N.sum()
        self.copied += (teacher_wrong_N & (student_logits_NV.argmax(dim=-1) == teacher_prediction_N)).sum()

    def compute(self) -> Tensor:
        """Copied errors over teacher errors, float64."""
        if int(self.teacher_errors) == 0:
            raise UndefinedMetric("error copying: the teacher makes no error on these items, so none can be copied")
        return self.copied.double() / self.teacher_errors


class WrongClassSpearman(MeanOverItems):
    """Mean over items of Spearman's rank correlation between student and teacher logits of the wrong classes.

    The wrong classes of an item are all but its label, so it measures whether the *order* of the wrong answers (the
    dark knowledge) was learnt, whatever their size. Tied logits share the mean of their ranks. An item where one side
    gives all wrong classes the same logit has no correlation and is left out: ``count`` is the number of items in.
    """

    higher_is_better = True

    def update(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, label_N: Tensor) -> None:
        """Add one batch."""
        check_pair(student_logits_NV, teacher_logits_NV)
        check_labels(student_logits_NV, label_N)
        student_NV = _ranks(_without_label(student_logits_NV, label_N))
        teacher_NV = _ranks(_without_label(teacher_logits_NV, label_N))
        student_NV = student_NV - student_NV.mean(dim=-1, keepdim=True)
        teacher_NV = teacher_NV - teacher_NV.mean(dim=-1, keepdim=True)
        scale_N = student_NV.square().sum(dim=-1).sqrt() * teacher_NV.square().sum(dim=-1).sqrt()
        defined_N = scale_N > 0
        self.add((student_NV * teacher_NV).sum(dim=-1)[defined_N] / scale_N[defined_N])

    def compute(self) -> Tensor:
        """The mean, in [-1, 1]; :class:`UndefinedMetric` where no item has a correlation."""
        if int(self.count) == 0:
            raise UndefinedMetric("rank correlation of wrong classes: on every item one side ranks them all equal")
        return super().compute()


class CentredLogitMSE(MeanOverItems):
    """Mean over items and classes of ``((z_i - mean z) - (v_i - mean v))^2``, student logits z, teacher logits v.

    Centred because a softmax does not see a constant added to all logits of an item. It is twice the training loss
    ``logit_matching``, whose function it calls.
    """

    higher_is_better = False

    def update(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> None:
        """Add one batch."""
        check_pair(student_logits_NV, teacher_logits_NV)
        loss = logit_matching(student_logits_NV.double(), teacher_logits_NV.double())
        self.add_sum(2 * loss.total, loss.count)


def _without_label(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """[N, V-1]: each row without its label's column."""
    check_logits(logits_NV)
    kept_NV = torch.ones_like(logits_NV, dtype=torch.bool).scatter_(1, label_N[:, None], False)
    return logits_NV[kept_NV].view(logits_NV.shape[0], logits_NV.shape[1] - 1)


def _ranks(value_NV: Tensor) -> Tensor:
    """Ranks 1 to V within each row, ties sharing the mean of their ranks, float64."""
    value_NV = value_NV.contiguous()
    sorted_NV = value_NV.sort(dim=-1).values
    below_NV = torch.searchsorted(sorted_NV, value_NV, right=False)
    not_above_NV = torch.searchsorted(sorted_NV, value_NV, right=True)
    return (below_NV + not_above_NV + 1).double() / 2
