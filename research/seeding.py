"""The only maker of random generators.

A stream of randomness is named, never numbered by hand: ``rng_for(seed, "order", epoch)`` hashes its parts, so that
neighbouring seeds, splits and epochs share nothing, and adding a new stream never moves an old one.
"""

import hashlib

import torch


def seed_for(seed: int, stream: str, index: int = 0) -> int:
    """A 63-bit seed for one named stream: blake2b of ``seed``, ``stream`` and ``index``.

    Equal arguments give equal seeds on every machine and in every process; arguments that differ anywhere give
    unrelated seeds (``seed + index`` would make seeds 42 and 43 share all but one of their items).
    """
    parts = f"{int(seed)}\x1f{stream}\x1f{int(index)}".encode()
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little") >> 1


def rng_for(seed: int, stream: str, index: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh ``torch.Generator`` for one named stream; see :func:`seed_for`."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, stream, index))
