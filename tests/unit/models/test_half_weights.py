"""Weights rounded to half precision on disk."""

from pathlib import Path

import torch

from research.models.build import describe, rebuild
from research.models.classifiers import Mlp
from research.models.weights import load_weights, read_architecture, save_network, weights_sha256

NETWORK = {"_target_": "research.models.classifiers.Mlp", "hidden": [5]}


def test_half_precision_weights_load_back_rounded_and_hash_to_what_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Mlp([5], input_shape=(3,), num_classes=2)
    before = weights_sha256(network)
    sha256 = save_network(tmp_path, network, describe(NETWORK, input_shape=(3,), num_classes=2), half=True)
    assert weights_sha256(network) == before  # what is in memory stays as it was
    loaded = rebuild(read_architecture(tmp_path))
    load_weights(loaded, tmp_path, sha256)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, network.state_dict()[name].half().float())


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    network = Mlp([200, 200], input_shape=(100,), num_classes=10)
    sizes = []
    for half in (False, True):
        save_network(tmp_path / str(half), network, {"network": NETWORK}, half=half)
        sizes.append((tmp_path / str(half) / "model.safetensors").stat().st_size)
    assert 1.9 < sizes[0] / sizes[1] < 2.1
