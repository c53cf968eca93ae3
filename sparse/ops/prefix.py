"""The special tokens that a tokenizer puts before a text: how every block and every prompt begins.

    tokenizer(text) = prefix + encode(text) + suffix        encode adds no special tokens
    block           = prefix + the next tokens of the text
    prompt          = prefix + encode(context)

Many models were trained with a beginning of text (BOS) as first token, and predict worse without
it. Others have none; then the prefix is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PROBES = ("a", "x = 1\n", "Once upon a time, 2 3")  # texts whose tokens are looked for


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens that `tokenizer(text)` puts before the tokens of a text by default.

    They are found by encoding texts with and without special tokens. What the tokenizer appends at
    the end, such as an end of text, is not taken, because a prompt is to be continued. Raises
    ValueError where the tokens of a text are not found, at one and the same place, inside what
    `tokenizer(text)` gives.

    >>> from dense import tiny
    >>> from sparse import prefix_ids
    >>> prefix_ids(tiny().tokenizer)  # the built-in model has no beginning of text
    ()
    """
    plain = _encoded(tokenizer, add_special_tokens=False)
    whole = _encoded(tokenizer)
    if plain == whole:
        return ()
    places = [_prefixes(a, b) for a, b in zip(whole, plain, strict=True)]
    found = set.intersection(*places)
    if len(found) != 1:
        i = min(range(len(PROBES)), key=lambda i: len(places[i]))  # one that was not found, if any
        raise ValueError(
            f"it is unclear which special tokens this tokenizer puts before a text: {PROBES[i]!r} "
            f"is {whole[i]} by default and {plain[i]} without special tokens; special tokens may "
            "only stand before and after the tokens of a text, the same ones for every text: set "
            "tokenizer.add_bos_token, or give the tokenizer another post-processor"
        )
    return found.pop()


def begin(blocks: Int[Tensor, "block text"], prefix: Sequence[int]) -> Int[Tensor, "block pos"]:
    """Return the blocks with the prefix before each of them, pos = len(prefix) + text."""
    if not prefix:
        return blocks
    first = torch.tensor(prefix, dtype=blocks.dtype, device=blocks.device)
    return torch.cat([first.expand(len(blocks), -1), blocks], 1)


def check_begin(blocks: Int[Tensor, "block pos"], prefix: Sequence[int], who: str) -> None:
    """Raise ValueError unless every block begins with the prefix."""
    if not prefix:
        return
    begins = blocks[:, : len(prefix)].cpu()
    wrong = torch.ones(len(begins), dtype=torch.bool)
    if begins.shape[1] == len(prefix):
        wrong = (begins != begins.new_tensor(prefix)).any(1)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{who}: block {i} begins with {begins[i].tolist()}, but the tokenizer puts "
            f"{list(prefix)} before every text; make the blocks with pack or first_blocks and this "
            "tokenizer"
        )


def counted(blocks: Int[Tensor, "block pos"], prefix: Sequence[int]) -> Int[Tensor, " token"]:
    """Return the tokens of the blocks whose counts are unigram frequencies, in one row.

    These are all tokens, but for the first of a prefix: it is where a block begins, so it is
    predicted nowhere. Raises ValueError where a block does not begin with the prefix.
    """
    check_begin(blocks, prefix, "counting tokens")
    return (blocks[:, 1:] if prefix else blocks).flatten().cpu()


def count_tokens(
    blocks: Int[Tensor, "block pos"], vocab_size: int, prefix: Sequence[int] = ()
) -> Int[Tensor, " vocab"]:
    """Return how often every token occurs in the blocks, but for the first of a prefix.

    >>> import torch
    >>> from sparse import count_tokens
    >>> count_tokens(torch.tensor([[0, 2, 2]]), vocab_size=3)
    tensor([1, 0, 2])
    """
    return counted(blocks, prefix).bincount(minlength=vocab_size)


def _encoded(tokenizer: PreTrainedTokenizerBase, **how: Any) -> list[list[int]]:
    out = tokenizer(list(PROBES), return_attention_mask=False, verbose=False, **how)
    return out["input_ids"]  # pyright: ignore[reportReturnType]


def _prefixes(whole: list[int], plain: list[int]) -> set[tuple[int, ...]]:
    """Return what stands before `plain` in `whole`, once for every place where it is found."""
    starts = range(len(whole) - len(plain) + 1)
    return {tuple(whole[:i]) for i in starts if whole[i : i + len(plain)] == plain}
