"""The one-parameter bias correction for classes that a transfer set left out or kept alone.

Hinton et al. 2015 (arXiv:1503.02531), section 3: a student that never saw a 3 knows 3s, but its bias for them is too
low; adding 3.5 to it repairs most errors. The paper chose the offset on the test set. Here the targets are the
teacher's argmaxes on held-out training images, so no label and no test image enters.
"""

import torch
from torch import Tensor

from research.metrics.base import check_labels


def fit_class_bias(student_logits_NV: Tensor, target_label_N: Tensor, classes: list[int]) -> float:
    """The offset b, added to the logits of all ``classes``, with the fewest ``argmax != target`` (in logits).

    Exact, not a grid: inside ``classes`` and outside of them the best class does not depend on b, so each item changes
    its prediction once, at ``b = best logit outside - best logit inside``. The disagreements are a step function with
    at most N steps. Sorting the steps gives the value on each interval between them.

    Ties: 0 where b = 0 is itself optimal, else the optimal interval nearest to 0, at its middle (a step's own
    position, where two logits are equal, is never chosen). An interval without an end reaches 1 past its last step.

    Raises ValueError on no items, non-finite logits, targets that do not fit the logits, and ``classes`` that are
    empty, repeated, outside [0, V) or all V (one offset for all classes changes nothing).
    """
    check_labels(student_logits_NV, target_label_N)
    logits_NV = student_logits_NV.detach().double()
    if logits_NV.shape[0] == 0 or not bool(logits_NV.isfinite().all()):
        raise ValueError(f"logits of shape {tuple(logits_NV.shape)}: expected at least one item and finite values only")
    inside_V = _membership(classes, logits_NV)
    steps, agreements = _agreements_between_steps(logits_NV, target_label_N, inside_V)
    agree_at_zero = int((logits_NV.argmax(dim=-1) == target_label_N).sum())
    if agree_at_zero >= int(agreements.max()):
        return 0.0
    lower = torch.cat([steps[:1] - 1, steps])
    upper = torch.cat([steps, steps[-1:] + 1])
    distance = torch.maximum(lower, -upper).clamp(min=0)  # of the interval from zero
    distance[agreements < agreements.max()] = torch.inf
    nearest = int(distance.argmin())
    return float((lower[nearest] + upper[nearest]) / 2)


def apply_class_bias(student_logits_NV: Tensor, classes: list[int], bias: float) -> Tensor:
    """A float64 copy of the logits with ``bias`` added to ``classes``; ValueError as :func:`fit_class_bias`."""
    logits_NV = student_logits_NV.detach().double()
    return logits_NV + bias * _membership(classes, logits_NV).double()


def _agreements_between_steps(logits_NV: Tensor, target_N: Tensor, inside_V: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct steps [S] in rising order, and the agreements on the S+1 open intervals below, between and above."""
    best_inside_N, class_inside_N = logits_NV.masked_fill(~inside_V, -torch.inf).max(dim=-1)
    best_outside_N, class_outside_N = logits_NV.masked_fill(inside_V, -torch.inf).max(dim=-1)
    steps, which_N = (best_outside_N - best_inside_N).unique(return_inverse=True)
    gained_N = (class_inside_N == target_N).long()  # agrees above its step
    lost_N = (class_outside_N == target_N).long()  # agrees below its step
    changes = torch.zeros(steps.shape[0], dtype=torch.int64, device=logits_NV.device)
    changes.index_add_(0, which_N, gained_N - lost_N)
    below_all = lost_N.sum()
    return steps, torch.cat([below_all[None], below_all + changes.cumsum(dim=0)])


def _membership(classes: list[int], logits_NV: Tensor) -> Tensor:
    num_classes = logits_NV.shape[1]
    valid = bool(classes) and len(set(classes)) == len(classes) and len(classes) < num_classes
    if not valid or min(classes) < 0 or max(classes) >= num_classes:
        raise ValueError(
            f"classes={classes!r}: expected at least one and fewer than all of the {num_classes} classes, each once, "
            f"from 0 to {num_classes - 1}"
        )
    inside_V = torch.zeros(num_classes, dtype=torch.bool, device=logits_NV.device)
    inside_V[classes] = True
    return inside_V
