"""The distribution against enumeration, and the draw at its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.generation.distribution import draw, drawn_from


def brute_force(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Probabilities by the definition, in Python's floats."""
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    probs = [weight / math.fsum(weights) for weight in weights]
    kept: set[int] = set()
    for token in sorted(range(len(probs)), key=lambda token: (-probs[token], token)):
        kept.add(token)
        if math.fsum(probs[each] for each in kept) >= top_p:
            break
    mass = math.fsum(probs[each] for each in kept)
    return [prob / mass if token in kept else 0.0 for token, prob in enumerate(probs)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=9),
    st.floats(0.2, 3.0),
    st.sampled_from([0.05, 0.31, 0.5, 0.77, 0.9, 0.999, 1.0]),
)
def test_temperature_and_top_p_are_those_of_their_definition(
    logits: list[float], temperature: float, top_p: float
) -> None:
    probs_V = drawn_from(torch.tensor([logits]), temperature, top_p)[0].exp()
    assert probs_V.tolist() == pytest.approx(brute_force(logits, temperature, top_p), abs=1e-6)


def test_top_p_that_is_reached_exactly_takes_no_further_token() -> None:
    logits_BV = torch.tensor([[0.25, 0.5, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, kept in ((0.5, [1]), (0.51, [0, 1]), (0.75, [0, 1]), (0.8, [0, 1, 2]), (1e-9, [1])):
        assert drawn_from(logits_BV, 1.0, top_p)[0].isfinite().nonzero().flatten().tolist() == kept


def test_a_uniform_chooses_the_token_whose_share_it_falls_into() -> None:
    """Shares 0, 1/2, 1/4, 0, 1/4, 0: a uniform at an edge belongs to what follows, and nothing impossible is drawn."""
    logits_V = torch.tensor([0, 0.5, 0.25, 0, 0.25, 0], dtype=torch.float64).log()
    uniforms = [0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53]
    token_B, logprob_B = draw(logits_V.expand(6, -1), 1.0, 1.0, torch.tensor(uniforms, dtype=torch.float64))
    assert token_B.tolist() == [1, 1, 2, 2, 4, 4]
    assert logprob_B.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])


def test_greedy_takes_the_first_of_equals_and_tells_its_probability_at_temperature_one() -> None:
    token_B, logprob_B = draw(torch.tensor([[0.0, 2.0, 2.0]]), 0.0, 0.3, None)
    assert token_B.tolist() == [1]
    assert logprob_B.item() == pytest.approx(2 - math.log(1 + 2 * math.exp(2)))
