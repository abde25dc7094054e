"""Random streams split by purpose: the same (seed, purpose, counters) always give the same stream.

Streams are derived afresh for each epoch instead of being carried along, so a resumed run needs no
generator state to draw what the uninterrupted run would have drawn.
"""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed from ``seed``, a purpose ("data", "attack", ...) and counters (epoch, restart, ...)."""
    text = ":".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` for one purpose."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, purpose, *counters))
