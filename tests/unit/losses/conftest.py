"""A float64 oracle for every divergence: plain Python loops over one pair of rows, nothing shared with the package."""

import math
from types import SimpleNamespace

import pytest

# Teacher and student probabilities of the hand-computed values in the tests.
PQ_TEACHER = (0.7, 0.2, 0.1)
PQ_STUDENT = (0.2, 0.3, 0.5)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    return [weight / math.fsum(weights) for weight in weights]


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    norm = math.log(math.fsum(math.exp((value - top) / temperature) for value in logits))
    return [(value - top) / temperature - norm for value in logits]


def kl(first: list[float], second: list[float]) -> float:
    """KL between two lists of log-probabilities."""
    terms = []
    for log_a, log_b in zip(first, second, strict=True):
        if log_a == -math.inf:
            continue
        if log_b == -math.inf:
            return math.inf
        terms.append(math.exp(log_a) * (log_a - log_b))
    return math.fsum(terms)


def mixture(first: list[float], second: list[float], first_weight: float) -> list[float]:
    result = []
    for log_a, log_b in zip(first, second, strict=True):
        low, high = sorted((log_a, log_b))
        weight = first_weight if high == log_a else 1 - first_weight
        inside = weight + (1 - weight) * math.exp(low - high) if high > -math.inf else 0.0
        result.append(high + math.log(inside) if inside > 0 else (low if high > -math.inf else -math.inf))
    return result


def divergence(
    name: str, student: list[float], teacher: list[float], temperature: float = 1.0, weight: float | None = None
) -> float:
    """The divergence called ``name`` between two rows of logits; ``weight`` is its mixture or skew weight."""
    p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "total_variation":
        return math.fsum(abs(math.exp(a) - math.exp(b)) for a, b in zip(p, q, strict=True)) / 2
    assert weight is not None
    if name == "skewed_forward_kl":
        return kl(p, mixture(p, q, weight))
    if name == "skewed_reverse_kl":
        return kl(q, mixture(q, p, weight))
    m = mixture(p, q, weight)
    value = weight * kl(p, m) + (1 - weight) * kl(q, m)
    if name == "jsd":
        return value
    assert name == "normalised_jsd"
    return value / (weight * (1 - weight))


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    return SimpleNamespace(
        softmax=softmax,
        log_softmax=log_softmax,
        kl=kl,
        divergence=divergence,
        student=[math.log(value) for value in PQ_STUDENT],
        teacher=[math.log(value) for value in PQ_TEACHER],
    )
