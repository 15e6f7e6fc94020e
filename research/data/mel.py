"""Log-mel features of speech, on torch alone (torchaudio is no dependency; scipy and scikit-learn have no mel filters).

Mel scale: O'Shaughnessy's ``mel = 2595 log10(1 + hertz / 700)``, as in HTK.
"""

import math

import torch
from torch import Tensor

POWER_FLOOR = 1e-10  # of full scale squared: keeps the log of digital silence finite, below any recorded noise
FRAMES_PER_CHUNK = 16384


def hertz_to_mel(hertz: float) -> float:
    return 2595.0 * math.log10(1.0 + hertz / 700.0)


def mel_to_hertz(mel: float) -> float:
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


def mel_edges_hertz(num_bands: int, sample_rate: int) -> list[float]:
    """``num_bands + 2`` frequencies, equally spaced in mel from 0 to half the sample rate: band ``b`` rises from edge
    ``b`` to its centre, edge ``b + 1``, and falls to edge ``b + 2``."""
    top = hertz_to_mel(sample_rate / 2)
    return [mel_to_hertz(top * step / (num_bands + 1)) for step in range(num_bands + 2)]


def mel_filterbank(num_bands: int, fft_size: int, sample_rate: int) -> Tensor:
    """Triangular filters [fft_size // 2 + 1, num_bands], height 1 at the centre, linear in hertz.

    Raises ValueError where a band is too narrow to hold any FFT bin: its feature would be constant.
    """
    edges = torch.tensor(mel_edges_hertz(num_bands, sample_rate), dtype=torch.float64)
    bins = torch.arange(fft_size // 2 + 1, dtype=torch.float64)[:, None] * sample_rate / fft_size
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0.0)
    empty = (filters.sum(0) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"num_bands={num_bands}: bands {empty} hold no bin of an FFT of {fft_size} points at {sample_rate} Hz;"
            " give fewer bands"
        )
    return filters.float()


def num_frames(samples: int, window_samples: int, hop_samples: int) -> int:
    """How many frames :func:`frame_signal` makes: whole ones, or one where the signal is shorter than a window."""
    return 1 + max(0, samples - window_samples) // hop_samples


def frame_signal(wave_T: Tensor, window_samples: int, hop_samples: int) -> Tensor:
    """The overlapping frames of a signal: [frames, window_samples].

    :func:`num_frames` of them; samples after the last whole frame are left out, a signal shorter than a window is
    padded with silence.
    """
    short = window_samples - len(wave_T)
    if short > 0:
        wave_T = torch.nn.functional.pad(wave_T, (0, short))
    return wave_T.unfold(0, window_samples, hop_samples)


def log_mel(frames: Tensor, filters: Tensor, fft_size: int) -> Tensor:
    """Natural log of the mel-band powers of frames [N, window_samples] of samples in -1..1: [N, bands].

    Each frame is taken under a periodic Hann window and zero-padded to ``fft_size``. Powers below ``POWER_FLOOR`` are
    raised to it. Done in large chunks: thousands of small transforms would spend their time in starting threads.
    """
    window = torch.hann_window(frames.shape[1])
    powers = [
        torch.fft.rfft(chunk * window, n=fft_size).abs().square() @ filters for chunk in frames.split(FRAMES_PER_CHUNK)
    ]
    return torch.cat(powers).clamp_(min=POWER_FLOOR).log_()


def stack_context(frames: Tensor, clip_N: Tensor, context: int) -> Tensor:
    """Each frame with its ``context`` neighbours on both sides, oldest first: [N, (2 * context + 1) * bands].

    ``clip_N`` numbers the clip of each frame, frames of a clip being adjacent and clips in rising order; beyond the end
    of its clip the last frame is repeated, so that no frame sees another clip.
    """
    starts = torch.searchsorted(clip_N, clip_N, side="left")
    ends = torch.searchsorted(clip_N, clip_N, side="right") - 1
    offsets = torch.arange(-context, context + 1)
    neighbours = torch.arange(len(frames))[:, None] + offsets
    neighbours = torch.minimum(torch.maximum(neighbours, starts[:, None]), ends[:, None])
    return frames[neighbours].reshape(len(frames), -1)
