"""Free Spoken Digit Dataset: which digit is being said, frame by frame."""

import gzip
import io
import re
import tarfile
import wave
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from research.data.base import AbstractClassData, CommonOptions
from research.data.mel import frame_signal, log_mel, mel_filterbank, num_frames, stack_context
from research.data.splits import DataError, SplitTensors

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TAKES = 50
TEST_TAKES = 5  # takes 0 to 4 of every digit and speaker: the official test split
SAMPLE_RATE = 8000
WINDOW_SAMPLES, HOP_SAMPLES, FFT_SIZE = 200, 80, 256  # 25 ms, 10 ms, the next power of two
CLIP_NAME = re.compile(r"(?:.*/)?(\d)_([a-z]+)_(\d+)\.wav")
WHAT_TO_DO = "restore the archive of recordings/*.wav of github.com/Jakobovski/free-spoken-digit-dataset"


@dataclass(frozen=True)
class Clip:
    """One recording: who says which digit, and the samples as float32 in -1..1 [T]."""

    digit: int
    speaker: str
    take: int
    wave_T: Tensor


class SpokenDigits(AbstractClassData):
    """Log-mel frames of 3,000 spoken digits (8 kHz, six speakers), float32 [N, (2 * context_frames + 1) * num_bands].

    A row is a 25 ms frame, every 10 ms, with ``context_frames`` neighbours on each side (the end frame repeated beyond
    the ends of the clip). Its label is the digit of its clip and its group is the clip: holding out and subsampling
    take whole clips, so ``holdout`` and ``num_train`` count clips. All frames are kept, silent ones too. Each band is
    standardised by mean and standard deviation over the official train split's frames (validation clips included, test
    never), so that features do not move with ``holdout`` or ``fraction``.

    Read from ``data_dir/fsdd/fsdd_recordings.tar.gz``. 270 train clips are held out unless ``holdout`` says otherwise.

    split          "recording": takes 0-4 test, 5-49 train (official; every speaker is in both); "speaker": one speaker
                   is the test split and the five others train (stricter)
    test_speaker   that speaker, for split="speaker" only
    """

    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))
    default_holdout = 270

    def __init__(
        self,
        *,
        split: Literal["recording", "speaker"] = "recording",
        test_speaker: str | None = None,
        context_frames: int = 5,
        num_bands: int = 40,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(**common)
        if split not in ("recording", "speaker"):
            raise ValueError(f"split={split!r}: give 'recording' or 'speaker'")
        if (split == "speaker") != (test_speaker in SPEAKERS) or (split == "recording" and test_speaker is not None):
            raise ValueError(
                f"test_speaker={test_speaker!r} with split={split!r}: give one of {', '.join(SPEAKERS)} with"
                " split='speaker', and null with split='recording'"
            )
        if context_frames < 0 or num_bands < 1:
            raise ValueError(
                f"context_frames={context_frames!r}, num_bands={num_bands!r}: give at least 0 and at least 1"
            )
        self.split, self.test_speaker = split, test_speaker
        self.context_frames = context_frames
        self.filters = mel_filterbank(num_bands, FFT_SIZE, SAMPLE_RATE)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return ((2 * self.context_frames + 1) * self.filters.shape[1],)

    def load(self) -> dict[str, SplitTensors]:
        clips = read_clips(_archive(self.data_dir))
        train = [clip for clip in clips if not self._in_test(clip)]
        test = [clip for clip in clips if self._in_test(clip)]
        train_frames, test_frames = self._frames(train), self._frames(test)
        mean, deviation = train_frames.mean(0), train_frames.std(0).clamp(min=1e-6)
        return {
            "train": self._rows_of(train, (train_frames - mean) / deviation),
            "test": self._rows_of(test, (test_frames - mean) / deviation),
        }

    def _in_test(self, clip: Clip) -> bool:
        return clip.take < TEST_TAKES if self.split == "recording" else clip.speaker == self.test_speaker

    def _frames(self, clips: list[Clip]) -> Tensor:
        """Log-mel frames of all clips, one after the other: [N, num_bands]."""
        frames = [frame_signal(clip.wave_T, WINDOW_SAMPLES, HOP_SAMPLES) for clip in clips]
        return log_mel(torch.cat(frames), self.filters, FFT_SIZE)

    def _rows_of(self, clips: list[Clip], frames: Tensor) -> SplitTensors:
        lengths = torch.tensor([num_frames(len(clip.wave_T), WINDOW_SAMPLES, HOP_SAMPLES) for clip in clips])
        clip_N = torch.arange(len(clips)).repeat_interleave(lengths)
        digit_N = torch.tensor([clip.digit for clip in clips]).repeat_interleave(lengths)
        return SplitTensors(stack_context(frames, clip_N, self.context_frames), digit_N, clip_N)


def _archive(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise DataError(
            "SpokenDigits: no data folder is given: set data.data_dir (or RESEARCH_DATA_DIR) to a folder that holds"
            " fsdd/fsdd_recordings.tar.gz"
        )
    return data_dir / "fsdd" / "fsdd_recordings.tar.gz"


def read_clips(archive: Path) -> list[Clip]:
    """All clips of the archive, read in memory, sorted by digit, speaker and take.

    Raises DataError, naming the file, where the archive is missing, truncated, damaged, or does not hold exactly the
    takes 0 to 49 of ten digits by six speakers as 8 kHz mono 16-bit wav files.
    """
    try:
        # Decompressed as a whole, because a tar reader stops before the gzip checksum at the end.
        content = gzip.decompress(archive.read_bytes())
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            files = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
            clips = [
                _read_clip(archive, name, stream.read())
                for name, stream in files.items()
                if stream is not None and name.endswith(".wav")
            ]
    except FileNotFoundError:
        raise DataError(
            f"{archive} is missing: set data.data_dir (or RESEARCH_DATA_DIR) to a folder that holds it, or {WHAT_TO_DO}"
        ) from None
    except (EOFError, OSError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{archive} is truncated or damaged ({error}): {WHAT_TO_DO}") from error
    _check_complete(archive, clips)
    return sorted(clips, key=lambda clip: (clip.digit, clip.speaker, clip.take))


def _read_clip(archive: Path, name: str, content: bytes) -> Clip:
    match = CLIP_NAME.fullmatch(name)
    if match is None or match[2] not in SPEAKERS:
        raise DataError(f"{archive}: {name} is not named digit_speaker_take.wav with a known speaker: {WHAT_TO_DO}")
    try:
        with wave.open(io.BytesIO(content)) as recording:
            form = (recording.getnchannels(), recording.getframerate(), recording.getsampwidth())
            raw = recording.readframes(recording.getnframes())
    except (EOFError, wave.Error) as error:
        raise DataError(f"{archive}: {name} is no readable wav file ({error}): {WHAT_TO_DO}") from error
    if form != (1, SAMPLE_RATE, 2):
        raise DataError(
            f"{archive}: {name} has {form[0]} channels of {form[1]} Hz and {form[2]} bytes, expected 1 of"
            f" {SAMPLE_RATE} Hz and 2 bytes: {WHAT_TO_DO}"
        )
    samples = torch.from_numpy(np.frombuffer(raw, dtype="<i2").astype(np.float32)) / 32768.0
    return Clip(int(match[1]), match[2], int(match[3]), samples)


def _check_complete(archive: Path, clips: list[Clip]) -> None:
    expected = {(digit, speaker, take) for digit in range(10) for speaker in SPEAKERS for take in range(TAKES)}
    given = [(clip.digit, clip.speaker, clip.take) for clip in clips]
    missing, extra = sorted(expected - set(given)), sorted(set(given) - expected)
    if len(given) != len(expected) or missing or extra:
        raise DataError(
            f"{archive} holds {len(given)} clips, expected {len(expected)} ({len(missing)} missing, first"
            f" {missing[:1]}; {len(extra)} not of the data set, first {extra[:1]}): {WHAT_TO_DO}"
        )
