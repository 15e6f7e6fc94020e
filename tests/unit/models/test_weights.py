"""What is loaded is what was saved, or an error says why not."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from research.errors import CheckpointError
from research.models.build import build_network, describe
from research.models.weights import (
    ARCHITECTURE_FILE,
    WEIGHTS_FILE,
    check_state,
    is_finite,
    load_weights,
    read_architecture,
    refuse_zero_weights,
    save_network,
    weights_sha256,
)

CONV = {"_target_": "research.models.classifiers.ConvNet", "channels": [2, 3]}
FACTS = {"input_shape": (16,), "num_classes": 3}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(CONV, **FACTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_network(tmp_path / "student", network(), describe(CONV, **FACTS))
    return tmp_path / "student"


def sha256(folder: Path) -> str:
    return read_architecture(folder)["sha256"]


def test_round_trip_is_bit_equal(folder: Path) -> None:
    saved, loaded = network(), network(seed=1)
    assert weights_sha256(saved) != weights_sha256(loaded)
    load_weights(loaded, folder, sha256(folder))
    assert weights_sha256(loaded) == weights_sha256(saved) == sha256(folder)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert (folder / WEIGHTS_FILE).stat().st_mode & 0o044 == (folder / ARCHITECTURE_FILE).stat().st_mode & 0o044


def test_the_hash_tells_names_shapes_dtypes_buffers_and_single_bits() -> None:
    class Holder(nn.Module):
        def __init__(self, name: str, tensor: torch.Tensor, buffer: bool = False) -> None:
            super().__init__()
            if buffer:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))

    plain = torch.arange(1.0, 7.0)
    nudged = plain.clone()
    nudged[3] = math.nextafter(4.0, 5.0) if plain.dtype == torch.float64 else 4.0 + 2**-21
    variants = [
        Holder("a", plain),
        Holder("b", plain),
        Holder("a", plain.reshape(2, 3)),
        Holder("a", plain.double()),
        Holder("a", nudged),
    ]
    assert len({weights_sha256(holder) for holder in variants}) == len(variants)
    assert weights_sha256(Holder("a", plain, buffer=True)) == weights_sha256(variants[0])
    assert weights_sha256(Holder("a", plain.reshape(2, 3).T.contiguous().T)) == weights_sha256(variants[2])


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_network(tmp_path, tied, {})
    assert torch.equal(load_file(tmp_path / WEIGHTS_FILE)["1.weight"], tied[0].weight)


def test_p28_every_flipped_byte_of_the_file_is_refused(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    content, expected = path.read_bytes(), sha256(folder)
    for place in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
            load_weights(network(), folder, expected)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_p28_a_truncated_or_missing_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_weights(network(), folder, sha256(folder))
    path.unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_weights(network(), folder, sha256(folder))


def test_p28_zero_weights_are_refused_whatever_the_hash_says(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    zeroed = {name: torch.zeros_like(tensor) if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    assert any(bool(tensor.any()) for tensor in zeroed.values())  # the batch norms' scales are still 1
    save_file(zeroed, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="only zeros"):
        load_weights(network(), folder, None)
    refuse_zero_weights(network(), "fresh")
    only_vectors = nn.BatchNorm1d(3)
    refuse_zero_weights(only_vectors, "vectors")
    nn.init.zeros_(only_vectors.weight)
    with pytest.raises(CheckpointError, match="only zeros"):
        refuse_zero_weights(only_vectors, "vectors")


def test_another_architecture_is_refused_by_the_names_of_its_tensors(folder: Path) -> None:
    wider = build_network({**CONV, "channels": [2, 4]}, **FACTS)
    with pytest.raises(CheckpointError, match=r"another architecture.*body\.3\.weight: file has \(3, 2, 3, 3\)"):
        load_weights(wider, folder, None)
    own = network().state_dict()
    with pytest.raises(CheckpointError, match=r"1 tensors differ.*head\.bias: file has nothing, network needs \(3,\)"):
        check_state(network(), {name: own[name] for name in own if name != "head.bias"}, "here")
    with pytest.raises(CheckpointError, match=r"teacher\.w: file has \(1,\), network needs nothing"):
        check_state(network(), {**own, "teacher.w": torch.zeros(1)}, "here")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe{}", b"null"])
def test_a_damaged_architecture_file_is_named(folder: Path, content: bytes) -> None:
    (folder / ARCHITECTURE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=ARCHITECTURE_FILE):
        read_architecture(folder)


def test_a_missing_architecture_file_is_named(folder: Path) -> None:
    (folder / ARCHITECTURE_FILE).unlink()
    with pytest.raises(CheckpointError, match=ARCHITECTURE_FILE):
        read_architecture(folder)


def test_the_architecture_file_is_plain(folder: Path) -> None:
    assert json.loads((folder / ARCHITECTURE_FILE).read_text()) == {
        "network": CONV,
        "input_shape": [16],
        "num_classes": 3,
        "sha256": weights_sha256(network()),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_seen(value: float) -> None:
    module = network()
    assert is_finite(module)
    with torch.no_grad():
        module.head.bias[1] = value
    assert not is_finite(module)
