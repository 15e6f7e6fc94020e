import gzip
import hashlib
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from research.data.base import DataError
from research.data.mnist import FILES, SHA256, Mnist, read_idx

TEST_IMAGES, TEST_LABELS = FILES["test"]
PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
IDX = b"\x00\x00\x08\x03" + struct.pack(">3I", 2, 3, 4) + PIXELS.tobytes()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def real() -> Path:
    root = os.environ.get("RESEARCH_DATA_DIR")
    if root is None and not os.environ.get("CI"):
        pytest.skip("RESEARCH_DATA_DIR is not set: no MNIST files")
    return Path(str(root))


def test_idx_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gz"
    path.write_bytes(gzip.compress(IDX))
    assert np.array_equal(read_idx(path, sha256(IDX)), PIXELS)


def test_wrong_hash_names_both_hashes_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gz"
    other = IDX[:-1] + b"\xff"
    path.write_bytes(gzip.compress(other))
    with pytest.raises(DataError, match=rf"tiny.gz.*{sha256(other)}, expected {sha256(IDX)}: restore"):
        read_idx(path, sha256(IDX))


@pytest.mark.parametrize("size", [0, 5, 30, -1])
def test_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "tiny.gz"
    path.write_bytes(gzip.compress(IDX)[:size])
    with pytest.raises(DataError, match=r"tiny.gz"):
        read_idx(path, sha256(IDX))


def test_no_flipped_byte_changes_what_is_read(tmp_path: Path) -> None:
    path, whole, noticed = tmp_path / "tiny.gz", gzip.compress(IDX), 0
    for position in range(10, len(whole)):  # before lies gzip's own header: time, platform
        content = bytearray(whole)
        content[position] ^= 0x10
        path.write_bytes(content)
        try:  # a few bits of the compressed stream mean nothing
            assert np.array_equal(read_idx(path, sha256(IDX)), PIXELS)
        except DataError as error:
            noticed += "tiny.gz" in str(error)
    assert noticed > 0.9 * (len(whole) - 10)


@pytest.mark.parametrize("content", [b"", b"\x00\x00", b"\x00\x00\x0d\x03" + IDX[4:], IDX[:-1], IDX + b"\x00", IDX[:8]])
def test_what_is_no_idx_file_of_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tiny.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"expected 000008xx|header promises"):
        read_idx(path, sha256(content))


def test_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is missing"):
        Mnist(data_dir=tmp_path).setup()


def test_without_folder_and_hub_both_ways_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    monkeypatch.delenv("RESEARCH_DATA_DIR", raising=False)
    for data_dir in (None, tmp_path):
        with pytest.raises(DataError, match=r"data\.data_dir \(or RESEARCH_DATA_DIR\).*pip install") as raised:
            Mnist(data_dir=data_dir).prepare_data()
        assert TEST_IMAGES in str(raised.value)


@pytest.mark.parametrize(
    ("options", "names"),
    [({"shift_pixels": 28}, "shift_pixels=28"), ({"test_shift_pixels": -1}, "test_shift_pixels=-1")],
)
def test_impossible_shifts_are_refused(options: dict[str, int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Mnist(**options)  # type: ignore[arg-type]


def test_environment_variable_gives_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_DATA_DIR", str(tmp_path))
    assert Mnist().data_dir == tmp_path
    assert Mnist(data_dir=tmp_path / "other").data_dir == tmp_path / "other"


def test_p80_test_split_is_the_official_one_by_hash(real: Path) -> None:
    data = Mnist(data_dir=real, fraction=0.01)
    inputs, label_N, index_N = data.split_tensors("test")
    pixels = (inputs * 255).round().to(torch.uint8).numpy().tobytes()
    images = b"\x00\x00\x08\x03" + struct.pack(">3I", 10_000, 28, 28) + pixels
    labels = b"\x00\x00\x08\x01" + struct.pack(">I", 10_000) + label_N.to(torch.uint8).numpy().tobytes()
    assert (sha256(images), sha256(labels)) == (SHA256[TEST_IMAGES], SHA256[TEST_LABELS])
    assert torch.equal(index_N, torch.arange(10_000))
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)


def test_default_splits_of_the_real_files(real: Path) -> None:
    summary = Mnist(data_dir=real).summary()
    assert summary["rows"] == {"train": 55_000, "val": 5_000, "test": 10_000}
    assert summary["duplicates"] == {"val": 0, "test": 0}


def test_test_shift_moves_every_test_image_and_nothing_else(real: Path) -> None:
    plain, moved = (Mnist(data_dir=real, holdout=0, fraction=0.01, test_shift_pixels=by) for by in (0, 2))
    again = Mnist(data_dir=real, holdout=0, fraction=0.01, test_shift_pixels=2, seed=5)
    before, after = plain.split_tensors("test")[0], moved.split_tensors("test")[0]
    assert bool((before != after).any(1).all())
    assert moved.fingerprint("test") == again.fingerprint("test") != plain.fingerprint("test")
    assert moved.fingerprint("train") == plain.fingerprint("train")
    # where the two outermost rows and columns are empty, a shift of 2 px keeps the ink of the image
    ink = before.reshape(-1, 28, 28)[:, 2:26, 2:26].sum((1, 2))
    inside = (before.sum(1) - ink).abs() < 1e-3
    assert int(inside.sum()) > 5000
    assert torch.allclose(before.sum(1)[inside], after.sum(1)[inside], atol=1e-2)


def test_damaged_real_file_is_refused(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "mnist", tmp_path / "mnist")
    path = tmp_path / "mnist" / TEST_LABELS
    path.chmod(0o644)
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-1] + bytes([content[-1] ^ 1])))
    with pytest.raises(DataError, match=re.escape(f"expected {SHA256[TEST_LABELS]}")):
        Mnist(data_dir=tmp_path).setup()
