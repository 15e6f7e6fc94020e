"""Small networks, batches and data that the tests of teachers share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from research.data.digits import Digits
from research.records import ClassBatch
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

NUM_CLASSES = 10


def make_linear(seed: int, num_classes: int = NUM_CLASSES) -> LoadedNetwork:
    """A linear network on the digits' 64 inputs, with weights large enough for peaked distributions."""
    network = nn.Linear(64, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.weight.copy_(torch.randn(num_classes, 64, generator=generator))
        network.bias.copy_(torch.randn(num_classes, generator=generator))
    return LoadedNetwork(network, (64,), num_classes, f"linear{seed}", training_flops=100.0 * seed)


@pytest.fixture(scope="session")
def linear() -> Callable[..., LoadedNetwork]:
    """`linear(seed)`: a fresh LoadedNetwork, equal for equal seeds."""
    return make_linear


@pytest.fixture
def live() -> FrozenTeacher:
    """A dense teacher that is scored live."""
    return FrozenTeacher(make_linear(1))


@pytest.fixture(scope="session")
def digits() -> Digits:
    """All 1,437 official training rows, nothing held out."""
    data = Digits(batch_size=100, holdout=0)
    data.setup()
    return data


@pytest.fixture(scope="session")
def batch(digits: Digits) -> ClassBatch:
    """The first 200 training rows."""
    return next(iter(digits.loader("train", batch_size=200)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"
