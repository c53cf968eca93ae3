"""Seeds that are a pure function of what they are for, so that a resumed run draws the same."""

from __future__ import annotations

from hashlib import sha256


def seed_of(*key: object, n_bytes: int = 7) -> int:
    """Return a seed of `n_bytes` bytes for a key such as (seed, step, rank).

    The first bytes of the SHA-256 of the key's words. A torch.Generator takes 7 bytes (positive 64
    bit integers); one whose distributions must not depend on more than 32 bits takes 4.

    >>> seed_of(0, 17) == seed_of(0, 17), seed_of(0, 17) == seed_of(1, 7)
    (True, False)
    """
    return int.from_bytes(sha256(" ".join(map(str, key)).encode()).digest()[:n_bytes], "big")
