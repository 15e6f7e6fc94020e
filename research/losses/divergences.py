"""Divergences between a student's and a teacher's logits, position by position.

Every function here takes ``(student_logits_NV, teacher_logits_NV, *, temperature=1.0)``, softens both sides with the
same ``temperature``, reduces the last dimension and keeps any leading ones: ``[..., V] -> [...]``. Values are in nats
(total variation: a probability), exactly 0 at equality, and carry **no** temperature-squared factor; that belongs to
``soft_target``. ``p`` is the teacher, ``q`` the student. The teacher is detached: no gradient ever reaches it.

Half precisions are computed in float32, float64 in float64. A class that both sides give the logit ``-inf`` does not
exist. A class that only one side lacks is probability zero there: finite wherever the divergence is, ``inf`` for the
KL whose second argument lacks it. Gradients come back in the student's own dtype; float16 ends at 65504.

Each raises ValueError on different class counts or shapes, a temperature that is not a finite number above 0, or a
weight outside its range, and TypeError on integer logits.
"""

import difflib
import functools
import inspect
from collections.abc import Callable

from torch import Tensor

from research.losses import logprob_divergences as core
from research.losses.logprobs import check_same_shape, tempered_logprobs, working_dtype


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) = ``sum p log(p/q)``; gradient in the student's logits ``(q - p) / temperature``.

    Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 2, less the teacher's entropy.
    """
    return core.forward_kl(*_logprob_pair(student_logits_NV, teacher_logits_NV, temperature))


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) = ``sum q log(q/p)``; gradient ``q (log(q/p) - KL) / temperature``."""
    return core.reverse_kl(*_logprob_pair(student_logits_NV, teacher_logits_NV, temperature))


def jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0, teacher_mixture_weight: float
) -> Tensor:
    """Generalised Jensen-Shannon ``b KL(p||m) + (1-b) KL(q||m)``, ``m = b p + (1-b) q``, at most ``log 2``.

    ``b = teacher_mixture_weight`` is the *teacher's* share and lies strictly inside (0, 1). The value shrinks to 0
    towards either end, so a search over ``b`` also changes the size of the loss; ``normalised_jsd`` does not.
    Agarwal et al. 2024 (arXiv:2306.13649), equation 1.
    """
    pair = _logprob_pair(student_logits_NV, teacher_logits_NV, temperature)
    return core.jsd(*pair, teacher_mixture_weight)


def normalised_jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0, teacher_mixture_weight: float
) -> Tensor:
    """``JSD_b / (b (1-b))``, from the forward KL at ``b=0`` to the reverse KL at ``b=1``, both included.

    ``b = teacher_mixture_weight``, 0 to 1. Near equality it has the same curvature for every ``b``.
    """
    pair = _logprob_pair(student_logits_NV, teacher_logits_NV, temperature)
    return core.normalised_jsd(*pair, teacher_mixture_weight)


def skewed_forward_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0, skew_weight: float
) -> Tensor:
    """KL(teacher || a teacher + (1-a) student), ``a = skew_weight`` in [0, 1); 0 is the forward KL.

    Ko et al. 2024 (arXiv:2402.03898).
    """
    pair = _logprob_pair(student_logits_NV, teacher_logits_NV, temperature)
    return core.skewed_forward_kl(*pair, skew_weight)


def skewed_reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0, skew_weight: float
) -> Tensor:
    """KL(student || (1-a) teacher + a student), ``a = skew_weight`` in [0, 1); 0 is the reverse KL.

    Ko et al. 2024 (arXiv:2402.03898).
    """
    pair = _logprob_pair(student_logits_NV, teacher_logits_NV, temperature)
    return core.skewed_reverse_kl(*pair, skew_weight)


def total_variation(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``1/2 sum |p - q|``: the largest difference in the probability of any set of classes, 0 to 1."""
    return core.total_variation(*_logprob_pair(student_logits_NV, teacher_logits_NV, temperature))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jsd,
        normalised_jsd,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
    )
}

# The weight that each divergence takes besides the temperature: one name, or None.
WEIGHT_TAKEN: dict[str, str | None] = {
    name: next((key for key in inspect.signature(function).parameters if key.endswith("_weight")), None)
    for name, function in DIVERGENCES.items()
}


def divergence(
    name: str, *, teacher_mixture_weight: float | None = None, skew_weight: float | None = None
) -> Callable[..., Tensor]:
    """The divergence called ``name``, its weight filled in: ``f(student_logits_NV, teacher_logits_NV, temperature=)``.

    Raises ValueError on an unknown name (the nearest valid one is given), a weight that the divergence does not take
    and a missing one that it needs. The weight's range is checked when the function is called.
    """
    weights = divergence_weights(name, teacher_mixture_weight=teacher_mixture_weight, skew_weight=skew_weight)
    return functools.partial(DIVERGENCES[name], **weights)


def divergence_weights(
    name: str, *, teacher_mixture_weight: float | None = None, skew_weight: float | None = None
) -> dict[str, float]:
    """The weights that the divergence called ``name`` takes, by name: none or one. Raises as ``divergence`` does."""
    if name not in DIVERGENCES:
        nearest = difflib.get_close_matches(str(name), DIVERGENCES, n=1, cutoff=0.0)[0]
        raise ValueError(f"divergence={name!r} is unknown; did you mean {nearest!r}? Valid: {', '.join(DIVERGENCES)}")
    wanted = WEIGHT_TAKEN[name]
    given = {"teacher_mixture_weight": teacher_mixture_weight, "skew_weight": skew_weight}
    for weight, value in given.items():
        if value is not None and weight != wanted:
            takes = f"takes {wanted}" if wanted else "takes no weight"
            raise ValueError(f"{weight}={value!r} was given, but divergence={name!r} {takes}: leave {weight} out")
        if value is None and weight == wanted:
            raise ValueError(f"divergence={name!r} needs {weight}, a number from 0 to 1, and got None")
    return {weight: value for weight, value in given.items() if value is not None}


def _logprob_pair(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_same_shape(student_logits_NV, teacher_logits_NV)
    dtype = working_dtype(student_logits_NV, teacher_logits_NV)
    return (
        tempered_logprobs(student_logits_NV, temperature, dtype),
        tempered_logprobs(teacher_logits_NV.detach(), temperature, dtype),
    )
