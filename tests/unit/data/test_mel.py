import math

import numpy as np
import pytest
import torch

from research.data.mel import (
    FRAMES_PER_CHUNK,
    POWER_FLOOR,
    frame_signal,
    log_mel,
    mel_edges_hertz,
    mel_filterbank,
    num_frames,
    stack_context,
)

RATE, WINDOW, HOP, FFT, BANDS = 8000, 200, 80, 256, 40


def sine(hertz: float, samples: int = 1000) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(samples) / RATE)


def features(wave: torch.Tensor) -> torch.Tensor:
    return log_mel(frame_signal(wave, WINDOW, HOP), mel_filterbank(BANDS, FFT, RATE), FFT)


def log_mel_by_definition(wave: np.ndarray) -> np.ndarray:
    """Float64, loops and an explicit Fourier matrix; mel written in natural logs (1127 = 2595 / ln 10)."""
    top = 1127.01048 * math.log(1 + RATE / 2 / 700)
    edges = [700 * (math.exp(top * b / (BANDS + 1) / 1127.01048) - 1) for b in range(BANDS + 2)]
    time, rows = np.arange(WINDOW), []
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * time / WINDOW)
    for start in range(0, len(wave) - WINDOW + 1, HOP):
        frame = wave[start : start + WINDOW] * hann
        bands = np.zeros(BANDS)
        for k in range(FFT // 2 + 1):
            power = abs(np.sum(frame * np.exp(-2j * np.pi * k * time / FFT))) ** 2
            hertz = k * RATE / FFT
            for b in range(BANDS):
                low, centre, high = edges[b : b + 3]
                if low < hertz <= centre:
                    bands[b] += power * (hertz - low) / (centre - low)
                elif centre < hertz < high:
                    bands[b] += power * (high - hertz) / (high - centre)
        rows.append(np.log(np.maximum(bands, POWER_FLOOR)))
    return np.array(rows)


def test_features_equal_the_definition_in_float64() -> None:
    noise = torch.randn(600, generator=torch.Generator().manual_seed(0))
    for wave in (sine(440.0, 600) + 0.1 * noise, 0.01 * noise):
        found = features(wave)
        assert found.shape == (6, BANDS)
        np.testing.assert_allclose(found.numpy(), log_mel_by_definition(wave.double().numpy()), atol=2e-3)


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 2500.0])
def test_a_sine_peaks_in_the_band_that_holds_it(hertz: float) -> None:
    edges = mel_edges_hertz(BANDS, RATE)
    peaks = features(sine(hertz)).argmax(1)
    assert len(set(peaks.tolist())) == 1
    assert edges[int(peaks[0])] < hertz < edges[int(peaks[0]) + 2]


def test_band_edges_are_equally_spaced_in_mel_up_to_nyquist() -> None:
    edges = mel_edges_hertz(BANDS, RATE)
    assert (edges[0], len(edges)) == (0.0, BANDS + 2)
    assert edges[-1] == pytest.approx(4000.0)
    steps = np.diff(1127.01048 * np.log1p(np.array(edges) / 700))
    assert steps == pytest.approx(np.full(BANDS + 1, steps[0]))


def test_only_whole_frames_count_and_a_short_signal_is_padded_to_one() -> None:
    for samples, frames in ((200, 1), (279, 1), (280, 2), (1000, 11), (50, 1)):
        assert features(sine(440.0, samples)).shape == (frames, BANDS)
        assert num_frames(samples, WINDOW, HOP) == frames


def test_chunks_change_nothing() -> None:
    frames = frame_signal(sine(440.0, 280), WINDOW, HOP)
    many = frames.repeat(FRAMES_PER_CHUNK // 2 + 1, 1)
    filters = mel_filterbank(BANDS, FFT, RATE)
    assert torch.allclose(log_mel(many, filters, FFT)[-2:], log_mel(frames, filters, FFT), atol=1e-4)


def test_silence_is_the_floor_not_minus_infinity() -> None:
    found = features(torch.zeros(400))
    assert torch.allclose(found, torch.full_like(found, math.log(POWER_FLOOR)))


def test_bands_without_a_bin_are_refused() -> None:
    with pytest.raises(ValueError, match="num_bands=100: bands"):
        mel_filterbank(100, FFT, RATE)


@pytest.mark.parametrize("context", [0, 1, 3])
def test_context_never_crosses_a_clip(context: int) -> None:
    clip_N = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    frames = torch.arange(14.0).reshape(7, 2)
    found = stack_context(frames, clip_N, context)
    for row, clip in enumerate(clip_N.tolist()):
        members = [other for other in range(7) if int(clip_N[other]) == clip]
        near = [min(max(row + offset, members[0]), members[-1]) for offset in range(-context, context + 1)]
        assert torch.equal(found[row], torch.cat([frames[other] for other in near]))
