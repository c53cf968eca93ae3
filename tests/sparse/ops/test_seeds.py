"""A seed is a pure function of its key, and keys do not run into each other."""

from hashlib import sha256

import torch

from sparse.ops.seeds import seed_of


def test_a_seed_is_the_first_bytes_of_the_hash_of_its_words():
    want = sha256(b"3 17 positions").digest()
    assert seed_of(3, 17, "positions") == int.from_bytes(want[:7], "big")
    assert seed_of(3, 17, "positions", n_bytes=4) == int.from_bytes(want[:4], "big")


def test_keys_that_differ_give_seeds_that_differ():
    keys = [(a, b) for a in range(40) for b in range(40)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert seed_of(1, 23) != seed_of(12, 3)


def test_a_generator_takes_every_seed():
    torch.Generator().manual_seed(max(seed_of(i) for i in range(1000)))
