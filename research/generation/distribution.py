"""The distribution a token is drawn from, and the draw.

Only temperature and top-p shape it. Penalties, top-k or min-p that a model's `generation_config` may carry are never
applied: what is drawn is the policy that is scored.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from research.errors import ConfigError
from research.records import Sampling


def check_sampling(sampling: Sampling, keys: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError naming the value of ``sampling`` that has no meaning.

    keys  field -> the key that a user gave it by; None: ``sampling.FIELD``
    """
    meant = {
        "num_samples": (sampling.num_samples >= 1, "at least 1"),
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (0.0 <= sampling.temperature < float("inf"), "0 (greedy) or a positive number"),
        "top_p": (0.0 < sampling.top_p <= 1.0, "above 0 and at most 1 (1: all tokens)"),
    }
    for name, (has_meaning, expected) in meant.items():
        if not has_meaning:
            key = f"sampling.{name}" if keys is None else keys[name]
            raise ConfigError(f"{key} is {getattr(sampling, name)}; expected {expected}")


def drawn_from(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Natural-log probabilities [B, V], float64, that a token is drawn with; -inf outside the top-p set.

    ``log_softmax(logits / temperature)``, cut to the smallest set of most likely tokens whose probability reaches
    ``top_p`` and renormalised over it. Of tokens that are equally likely, the smaller id enters the set first.
    """
    logprobs_BV = torch.log_softmax(logits_BV.double() / temperature, dim=-1)
    if top_p >= 1.0:
        return logprobs_BV
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.exp()
    reached_before_BV = probs_BV.cumsum(dim=-1) - probs_BV >= top_p
    reached_before_BV[:, 0] = False  # the most likely token stays, whatever rounding says
    outside_BV = torch.zeros_like(reached_before_BV).scatter_(1, order_BV, reached_before_BV)
    return torch.log_softmax(logprobs_BV.masked_fill(outside_BV, -torch.inf), dim=-1)


def draw(logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their natural-log probabilities [B].

    By inversion: the first token, in order of ids, at which the cumulative probability exceeds ``uniform_B`` in [0, 1).
    One uniform decides one token, whatever rows stand beside it. At temperature 0 it is the most likely token (of
    equals, the smallest id) and the probability is that at temperature 1.
    """
    if temperature == 0.0 or uniform_B is None:
        token_B = logits_BV.argmax(dim=-1)
        logprobs_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    else:
        logprobs_BV = drawn_from(logits_BV, temperature, top_p)
        cumulative_BV = logprobs_BV.exp().cumsum(dim=-1)
        threshold_B1 = uniform_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]
