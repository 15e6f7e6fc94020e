"""Ensembles against a mean written out in NumPy, and their memory against a count of what is alive."""

import gc
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from research.errors import CheckpointError, ConfigError
from research.records import ClassBatch
from research.teachers.ensemble import EnsembleTeacher
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

Linear = Callable[..., LoadedNetwork]
SEEDS = (1, 2, 3)


def loaders(linear: Linear) -> list[Callable[[], LoadedNetwork]]:
    return [partial(linear, seed) for seed in SEEDS]


def member_logits(linear: Linear, batch: ClassBatch) -> list[np.ndarray]:
    with torch.no_grad():
        return [linear(seed).network(batch.inputs).double().numpy() for seed in SEEDS]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_arithmetic_is_the_mean_of_softened_probabilities(
    linear: Linear, batch: ClassBatch, temperature: float, streamed: bool
) -> None:
    teacher = EnsembleTeacher(loaders(linear), mean="arithmetic", temperature=temperature, streamed=streamed)
    signal = teacher.signal(batch).logits_NV.double().numpy()
    expected = np.mean([softmax(logits / temperature, axis=-1) for logits in member_logits(linear, batch)], axis=0)
    np.testing.assert_allclose(np.exp(signal / temperature), expected, rtol=2e-5, atol=1e-9)  # normalised already


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_geometric_is_the_normalised_geometric_mean_at_every_temperature(
    linear: Linear, batch: ClassBatch, temperature: float, streamed: bool
) -> None:
    teacher = EnsembleTeacher(loaders(linear), mean="geometric", temperature=temperature, streamed=streamed)
    signal = teacher.signal(batch).logits_NV.double().numpy()
    for softened_at in (1.0, 4.0, 20.0):
        product = np.exp(np.mean([log_softmax(z / softened_at, axis=-1) for z in member_logits(linear, batch)], axis=0))
        expected = product / product.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(softmax(signal / softened_at, axis=-1), expected, rtol=3e-5, atol=1e-9)


def test_the_two_means_differ(linear: Linear, batch: ClassBatch) -> None:
    signals = [
        EnsembleTeacher(loaders(linear), mean=mean).signal(batch).logits_NV for mean in ("arithmetic", "geometric")
    ]
    assert float((signals[0].softmax(-1) - signals[1].softmax(-1)).abs().max()) > 0.05


def test_one_member_is_that_member(linear: Linear, batch: ClassBatch) -> None:
    alone = FrozenTeacher(linear(1)).signal(batch).logits_NV.log_softmax(-1)
    for mean in ("arithmetic", "geometric"):
        signal = EnsembleTeacher([partial(linear, 1)], mean=mean).signal(batch)
        torch.testing.assert_close(signal.logits_NV.log_softmax(-1), alone, atol=1e-5, rtol=0)


def counted(linear: Linear, alive: "weakref.WeakSet[nn.Module]", most: list[int]) -> list[Callable[[], LoadedNetwork]]:
    """Loaders that note how many members live at the moment when the next one has been read."""

    def load(seed: int) -> LoadedNetwork:
        loaded = linear(seed)
        alive.add(loaded.network)
        most.append(len(alive))
        return loaded

    return [partial(load, seed) for seed in SEEDS]


def test_streaming_needs_the_memory_of_one_member(linear: Linear, batch: ClassBatch) -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most: list[int] = []
    gc.disable()  # a member must be gone because nothing holds it, not because a collection happened to run
    try:
        teacher = EnsembleTeacher(counted(linear, alive, most), streamed=True)
        for _ in range(2):
            teacher.signal(batch)
    finally:
        gc.enable()
    assert most == [1] * 9 and len(alive) == 0  # three at construction, three for each batch


def test_kept_members_are_read_once(linear: Linear, batch: ClassBatch) -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most: list[int] = []
    teacher = EnsembleTeacher(counted(linear, alive, most), streamed=False)
    teacher.signal(batch)
    assert most == [1, 2, 3] and len(alive) == 3


def test_p28_a_member_that_changes_on_disk_is_refused(linear: Linear, batch: ClassBatch) -> None:
    chosen = [1, 2]
    teacher = EnsembleTeacher([lambda: linear(chosen[0]), lambda: linear(chosen[1])], streamed=True)
    teacher.signal(batch)
    chosen[1] = 3
    with pytest.raises(CheckpointError, match="linear3 has changed on disk"):
        teacher.signal(batch)


def test_p28_an_untrained_member_is_refused(linear: Linear) -> None:
    def zeros() -> LoadedNetwork:
        loaded = linear(2)
        nn.init.zeros_(loaded.network.weight)
        return loaded

    with pytest.raises(CheckpointError, match="linear2 holds only zeros"):
        EnsembleTeacher([partial(linear, 1), zeros])


def test_identity_tells_members_and_averaging(linear: Linear) -> None:
    def mark(seeds: tuple[int, ...], **options: object) -> tuple:
        identity = EnsembleTeacher([partial(linear, seed) for seed in seeds], **options).identity
        return identity.sha256, tuple(sorted(identity.details.items()))

    variants = [
        mark((1, 2)),
        mark((1, 3)),
        mark((1, 2, 3)),
        mark((1, 1)),
        mark((1,)),
        mark((1, 2), mean="geometric"),
        mark((1, 2), temperature=2.0),
    ]
    assert len(set(variants)) == len(variants)
    assert mark((1, 2)) == mark((1, 2), streamed=False)
    identity = EnsembleTeacher(loaders(linear)).identity
    assert identity.source == "linear1, linear2, linear3" and identity.training_flops == 600.0


def test_unknown_training_cost_of_one_member_is_unknown(linear: Linear) -> None:
    def unknown() -> LoadedNetwork:
        loaded = linear(2)
        return LoadedNetwork(loaded.network, loaded.input_shape, loaded.num_classes, loaded.source)

    assert EnsembleTeacher([partial(linear, 1), unknown]).identity.training_flops is None


def test_members_of_different_classes_are_refused(linear: Linear) -> None:
    with pytest.raises(CheckpointError, match="linear2 predicts 7 classes, linear1 predicts 10"):
        EnsembleTeacher([partial(linear, 1), partial(linear, 2, num_classes=7)])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mean": "harmonic"}, "teacher.mean is 'harmonic'"),
        ({"temperature": 0.0}, "teacher.temperature is 0.0"),
        ({"temperature": float("inf")}, "teacher.temperature is inf"),
        ({"temperature": float("nan")}, "teacher.temperature is nan"),
    ],
)
def test_bad_options_are_named(linear: Linear, options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EnsembleTeacher(loaders(linear), **options)
    with pytest.raises(ConfigError, match=r"teacher\.paths is empty"):
        EnsembleTeacher([])
