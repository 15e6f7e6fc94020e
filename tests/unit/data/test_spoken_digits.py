import gzip
import io
import os
import tarfile
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from research.data.base import DataError
from research.data.spoken_digits import SPEAKERS, SpokenDigits, read_clips

NAMES = [f"recordings/{digit}_{who}_{take}.wav" for digit in range(10) for who in SPEAKERS for take in range(50)]


def wav_bytes(name: str, rate: int = 8000, channels: int = 1) -> bytes:
    """A clip of 300 to 549 samples of a tone whose pitch tells the digit."""
    digit, _, take = Path(name).stem.split("_")
    samples = np.arange(300 + 5 * int(take[:2]))
    tone = 8000 * np.sin(2 * np.pi * 200 * (1 + int(digit)) * samples / 8000)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone.astype("<i2").tobytes())
    return stream.getvalue()


def write_archive(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "fsdd" / "fsdd_recordings.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(gzip.compress(stream.getvalue(), compresslevel=1))
    return path


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: wav_bytes(name) for name in reversed(NAMES)} | {"README.md": b"not a clip"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("data")
    write_archive(root, files)
    yield root


def test_official_split_takes_0_to_4_as_test(folder: Path) -> None:
    data = SpokenDigits(data_dir=folder, holdout=0, context_frames=0)
    summary = data.summary()
    assert summary["groups"] == {"train": 2700, "test": 300}
    # frames per clip: 1 + (T - 200) // 80 with T = 300 + 5 * take
    frames = [1 + (300 + 5 * take - 200) // 80 for take in range(50)]
    assert summary["rows"] == {"train": 60 * sum(frames[5:]), "val": 0, "test": 60 * sum(frames[:5])}


def test_speaker_split_tests_one_speaker(folder: Path) -> None:
    data = SpokenDigits(data_dir=folder, holdout=0, context_frames=0, split="speaker", test_speaker="theo")
    assert data.summary()["groups"] == {"train": 2500, "test": 500}


def test_rows_are_standardised_frames_with_the_digit_of_their_clip(folder: Path) -> None:
    data = SpokenDigits(data_dir=folder, holdout=0, context_frames=0)
    inputs, label_N, _ = data.split_tensors("train")
    assert torch.allclose(inputs.mean(0), torch.zeros(40), atol=1e-4)
    assert torch.allclose(inputs.std(0), torch.ones(40), atol=1e-3)
    # the same tone on both sides of the split: nearest train frame by distance has the test frame's digit
    test_inputs, test_label_N, _ = data.split_tensors("test")
    nearest = torch.cdist(test_inputs[::7], inputs[::5]).argmin(1)
    assert torch.equal(label_N[::5][nearest], test_label_N[::7])


def test_holdout_and_subset_take_whole_clips_and_leave_features_alone(folder: Path) -> None:
    whole = SpokenDigits(data_dir=folder, holdout=0)
    part = SpokenDigits(data_dir=folder, holdout=100, num_train=50)
    assert part.summary()["groups"] == {"train": 50, "val": 100, "test": 300}
    inputs, _, index_N = part.split_tensors("train")
    assert torch.equal(inputs, whole.split_tensors("train")[0][index_N])
    group_N, all_groups_N = part.groups("train"), whole.groups("train")
    assert group_N is not None and all_groups_N is not None
    assert len(index_N) == int(torch.isin(all_groups_N, group_N).sum())
    assert part.input_shape == (440,)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"split": "random"}, "split='random'"),
        ({"split": "speaker"}, "test_speaker=None"),
        ({"split": "speaker", "test_speaker": "nobody"}, "george, jackson"),
        ({"test_speaker": "theo"}, "test_speaker='theo'"),
        ({"context_frames": -1}, "context_frames=-1"),
        ({"shift_pixels": 1}, "no images"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        SpokenDigits(**options)  # type: ignore[arg-type]


def test_no_folder_names_both_ways_to_give_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RESEARCH_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=r"data.data_dir \(or RESEARCH_DATA_DIR\)"):
        SpokenDigits().setup()
    with pytest.raises(DataError, match=r"fsdd_recordings.tar.gz is missing"):
        SpokenDigits(data_dir=tmp_path).setup()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999, -1])
def test_truncated_archive_is_refused(tmp_path: Path, folder: Path, keep: float) -> None:
    content = (folder / "fsdd" / "fsdd_recordings.tar.gz").read_bytes()
    size = int(keep) if keep in (0, 10, -1) else int(len(content) * keep)
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(content[:size])
    with pytest.raises(DataError, match=r"cut.tar.gz .*(truncated|holds 0 clips)"):
        read_clips(path)


def test_flipped_byte_is_refused(tmp_path: Path, folder: Path) -> None:
    content = bytearray((folder / "fsdd" / "fsdd_recordings.tar.gz").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "flipped.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"flipped.tar.gz"):
        read_clips(path)


def test_archives_that_are_not_the_data_set_are_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    missing = {name: files[name] for name in NAMES[1:]}
    with pytest.raises(DataError, match=r"2999 clips, expected 3000 \(1 missing, first \[\(0, 'george', 0\)\]"):
        read_clips(write_archive(tmp_path, missing))
    with pytest.raises(DataError, match="3001 clips"):
        read_clips(write_archive(tmp_path, files | {"recordings/0_theo_50.wav": wav_bytes("0_theo_50")}))
    with pytest.raises(DataError, match=r"0_nobody_0.wav is not named"):
        read_clips(write_archive(tmp_path, {"recordings/0_nobody_0.wav": wav_bytes("0_x_0")}))
    with pytest.raises(DataError, match="16000 Hz"):
        read_clips(write_archive(tmp_path, {NAMES[0]: wav_bytes(NAMES[0], rate=16000)}))
    with pytest.raises(DataError, match="2 channels"):
        read_clips(write_archive(tmp_path, {NAMES[0]: wav_bytes(NAMES[0], channels=2)}))
    with pytest.raises(DataError, match="no readable wav"):
        read_clips(write_archive(tmp_path, {NAMES[0]: b"RIFF and nothing more"}))


def test_the_real_archive_has_its_published_size() -> None:
    root = os.environ.get("RESEARCH_DATA_DIR")
    if root is None and not os.environ.get("CI"):
        pytest.skip("RESEARCH_DATA_DIR is not set: no real recordings")
    clips = read_clips(Path(str(root)) / "fsdd" / "fsdd_recordings.tar.gz")
    assert len(clips) == 3000
    frames = sum(1 + (len(clip.wave_T) - 200) // 80 for clip in clips)
    assert frames == 125_237  # whole 25 ms windows every 10 ms, counted apart with the wave module
    assert max(float(clip.wave_T.abs().max()) for clip in clips) <= 1.0
