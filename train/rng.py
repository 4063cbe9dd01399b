"""Random numbers as a pure function of what they are for.

Every draw in training is keyed by (seed, stream name, step or sample index) and nothing keeps
a state, so a resumed run continues exactly, at any number of ranks. Imports torch only.
"""

from __future__ import annotations

import hashlib
import json

import torch


def seed_of(*parts: int | str) -> int:
    """Return 63 bits that name ``parts``: the same in every process, on every machine.

    ``1`` and ``"1"`` differ, and so do ``("ab", "c")`` and ``("a", "bc")``.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(*parts: int | str) -> float:
    """Return one draw from (0, 1), both ends excluded."""
    # 52 bits and a half: the largest value is still below 1 in a float64.
    return ((seed_of(*parts) >> 11) + 0.5) / 2**52


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Return a fresh generator on ``device``; CPU and CUDA give different streams.

    The CPU's reads only the low 32 bits of a seed: two draws of 65,000 share a stream by chance,
    which does no harm to noise, but is why ``uniform`` does without it.
    """
    return torch.Generator(device).manual_seed(seed_of(*parts))
