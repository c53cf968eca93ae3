"""Documents packed into blocks of tokens.

text_1 eos text_2 eos ... text_n eos,  cut every `length` - len(prefix) tokens
block = prefix + one piece,  the remainder dropped

The prefix is what `tokenizer(text)` puts before a text by default (docs/method.md#text); it is
empty for many tokenizers.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sparse.ops.prefix import begin, prefix_ids
from sparse.storage.atomic import replace_files

from .corpus import Corpus


def pack(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    cache: str | Path | None = None,
) -> Int[Tensor, "block pos"]:
    """Return the documents as blocks of `length` tokens.

        text_1 eos text_2 eos ... text_n eos,  cut every `length` - len(prefix) tokens
        block = prefix + one piece,  the remainder dropped

    eos is the tokenizer's end of text, and prefix is what it puts before a text by default
    (`prefix_ids`), once per block. No other special token is added. With `cache`, a folder, the
    blocks are kept there in a file named by a hash of texts, tokenizer, prefix and length. Raises
    ValueError without an end-of-text token, if there is not one full block, or if a block has no
    room for 2 tokens of text.

    >>> from dense import tiny
    >>> from sparse import pack
    >>> pack(["a = 1; " * 20, "b = 2; " * 20], tiny().tokenizer, length=16).shape[1]
    16
    """
    if length < 2:
        raise ValueError(f"pack: length={length} must be at least 2 tokens: one predicts the next")
    eos = end_of_text(tokenizer)
    prefix, room = beginning(tokenizer, length, "pack")
    stored = None
    if cache is not None:
        stored = Path(cache) / f"{_key(texts, tokenizer, length, prefix)}.safetensors"
        if stored.is_file():
            return load_file(stored)["blocks"].long()
    runs: list[Tensor] = []
    with tqdm(total=len(texts), desc="tokenizing", unit="doc", delay=2, file=sys.stderr) as bar:
        for start in range(0, len(texts), 128):
            chunk = list(texts[start : start + 128])
            for ids in encode(tokenizer, chunk):
                runs.append(torch.tensor([*ids, eos], dtype=torch.int32))
            bar.update(len(chunk))
    tokens = torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int32)
    n_blocks = len(tokens) // room
    if n_blocks == 0:
        raise ValueError(
            f"pack: {len(texts)} documents hold {len(tokens)} tokens, fewer than one block of "
            f"{room}{' and its prefix' if prefix else ''}; give more text or a smaller length"
        )
    blocks = begin(tokens[: n_blocks * room].view(n_blocks, room), prefix)
    if stored is not None:
        replace_files(stored.parent, {stored.name: save({"blocks": blocks.contiguous()})})
    return blocks.long()


def estimated_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int | None = None
) -> int:
    """Return about how many tokens `pack` would make of a corpus.

    It counts the tokens of every n-th document, at least 64 of them (or all, if there are fewer),
    and multiplies by the characters of all documents over those of the ones counted. With `length`,
    the tokens of a block, the prefix of every block is counted too, where the tokenizer has one;
    without it only the text is.

    >>> from dense import tiny
    >>> from sparse import estimated_tokens, load_corpus
    >>> estimated_tokens(load_corpus(documents=200), tiny().tokenizer) > 100_000
    True
    """
    texts = [*corpus.train, *corpus.validation]
    some = texts[:: max(1, len(texts) // 64)]
    tokens = sum(len(ids) + 1 for ids in encode(tokenizer, some))
    if length is not None:
        tokens *= length / beginning(tokenizer, length, "estimated_tokens")[1]
    return round(tokens * sum(map(len, texts)) / sum(map(len, some)))


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of every text, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]  # type: ignore


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands between documents; raise ValueError where there is none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(
            "this tokenizer has no end-of-text token, which must stand between documents; "
            "set tokenizer.eos_token to one of its tokens"
        )
    return tokenizer.eos_token_id


def beginning(
    tokenizer: PreTrainedTokenizerBase, length: int, who: str
) -> tuple[tuple[int, ...], int]:
    """Return the prefix of every block, and how many tokens of text a block of `length` has.

    Raises ValueError where these are fewer than 2.
    """
    prefix = prefix_ids(tokenizer)
    room = length - len(prefix)
    if room < 2:
        raise ValueError(
            f"{who}: length={length} must be at least {len(prefix) + 2}: {len(prefix)} that the "
            "tokenizer puts before a text, and 2 tokens of text, because one predicts the next"
        )
    return prefix, room


def _key(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, prefix: tuple[int, ...]
) -> str:
    what = f"{length} {len(texts)} {tokenizer_rules(tokenizer)}"
    if prefix:  # without one the key is what it was before prefixes were known
        what += f" {prefix}"
    digest = hashlib.sha256(what.encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that says how a tokenizer makes ids; its hash tells tokenizers apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else f"{tokenizer!r}{sorted(tokenizer.get_vocab().items())}"
    return f"{end_of_text(tokenizer)} {rules}"


def text_hash(text: str) -> str:
    """Return a hash of a text, 16 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
