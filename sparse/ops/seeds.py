"""Seeds that are a pure function of what they are used for, so that a resumed run draws the same.

A step's seed, for example, depends on the run's seed and the step's number and on nothing else.
"""

from __future__ import annotations

from hashlib import sha256


def seed_of(*key: object, n_bytes: int = 7) -> int:
    """Return a seed of `n_bytes` bytes for a key such as (seed, step, rank).

    It is made of the first bytes of the SHA-256 of the key's words. 7 bytes suit a torch.Generator,
    which takes positive 64-bit integers; 4 bytes give a seed of 32 bits.

    >>> seed_of(0, 17) == seed_of(0, 17), seed_of(0, 17) == seed_of(1, 7)
    (True, False)
    """
    return int.from_bytes(sha256(" ".join(map(str, key)).encode()).digest()[:n_bytes], "big")
