"""What is measured on generated sequences: pass@k, consensus, repetition; and, on given ones, token accuracy.

A problem has n samples, of which c are right. Answers are compared as text; ``None`` stands for a sample without one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from research.metrics.base import check_labels

LOOP_REPEATS, LOOP_TOKENS = 4, 16


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that at least one of ``k`` samples, drawn without replacement from ``num_samples``, is right.

    ``1 - C(n - c, k) / C(n, k)``, float64, the unbiased estimator of Chen et al. 2021 (eq. 1), as the product
    ``1 - prod_{i=n-c+1}^{n} (1 - k / i)`` of their listing, whose factors never overflow. The plug-in
    ``1 - (1 - c/n)^k`` is biased low and is not this.

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: expected 1 <= k <= {num_samples}; draw more samples")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} of {num_samples} samples are right: expected 0 to {num_samples}")
    if num_samples - num_right < k:
        return 1.0
    factors = 1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1, dtype=np.float64)
    return float(1.0 - factors.prod())


def majority(answers: Sequence[str | None]) -> int | None:
    """Place of the first sample that gives the most frequent answer; None where no sample has one.

    Answers are equal where their texts are, surrounding white space aside. None casts no vote, however often it comes.
    Among equally frequent answers the one whose first vote came earliest wins: a rule that knows nothing of the gold
    answer.
    """
    votes: dict[str, int] = {}
    first: dict[str, int] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            key = answer.strip()
            votes[key] = votes.get(key, 0) + 1
            first.setdefault(key, place)
    if not votes:
        return None
    return min(first[key] for key, count in votes.items() if count == max(votes.values()))


def consensus_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Share of groups of ``k`` samples whose :func:`majority` answer is right (cons@k, also maj@k); float64.

    The groups are the floor(n / k) disjoint runs of consecutive samples, in order: for k = n the one vote over all.
    A group without any answer is wrong. Raises ValueError unless 1 <= k <= n, or where the lengths differ.
    """
    if len(answers) != len(right):
        raise ValueError(f"{len(answers)} answers and {len(right)} judgements: expected one judgement per answer")
    if not 1 <= k <= len(answers):
        raise ValueError(f"cons@{k} of {len(answers)} samples: expected 1 <= k <= {len(answers)}; draw more samples")
    won = []
    for start in range(0, len(answers) - k + 1, k):
        winner = majority(answers[start : start + k])
        won.append(winner is not None and bool(right[start + winner]))
    return sum(won) / len(won)


def has_loop(ids: Sequence[int], *, min_repeats: int = LOOP_REPEATS, min_tokens: int = LOOP_TOKENS) -> bool:
    """Whether some block of tokens stands at least ``min_repeats`` times in direct succession, anywhere in ``ids``.

    The block may have any length; all its copies together span at least ``min_tokens`` tokens, so that "0000" in a
    number is no loop. The repetition rate is the share of completions for which this is true.

    Raises ValueError unless ``min_repeats`` >= 2 and ``min_tokens`` >= 1.
    """
    if min_repeats < 2 or min_tokens < 1:
        raise ValueError(f"min_repeats={min_repeats}, min_tokens={min_tokens}: expected at least 2 and at least 1")
    ids_T = np.asarray(ids, dtype=np.int64)
    return any(
        _longest_run(ids_T[period:] == ids_T[:-period]) + period >= max(min_repeats * period, min_tokens)
        for period in range(1, len(ids_T) // min_repeats + 1)
    )


def _longest_run(equal_T: np.ndarray) -> int:
    """Length of the longest run of True."""
    stops = np.flatnonzero(np.concatenate(([True], ~equal_T, [True])))
    return int(np.diff(stops).max()) - 1


def token_right(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """Whether each token is the most likely one, bool [N]; among equal logits the lowest id wins.

    Token accuracy is its mean over the graded positions, every one with the true text before it (teacher-forced): not
    the share of right answers. Raises ValueError on labels that do not fit the logits.
    """
    check_labels(logits_NV, label_N)
    return torch.as_tensor(logits_NV.argmax(dim=-1) == label_N)
