"""The released tokenizer, `encoder.json` and `vocab.bpe`, as a Hugging Face fast tokenizer.

A byte-level BPE is defined by its merges, each of which joins two pieces of text to a longer one.
Tokens 0..255 are the bytes in the order of `BYTES`, token 256 + i is what merge i makes, and the
last token is the end of text (2047 with the released 1,791 merges).

Text is split into pieces by SPLIT (docs/method.md#released-files). A piece that is a token becomes
that token. Any other piece begins as its bytes; then, again and again, the adjacent pair that makes
the lowest token is merged, leftmost first, until no pair makes one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse.storage.atomic import replace_files

from .files import read_json

END_OF_TEXT = "<|endoftext|>"
SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with one sign before them
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # signs, with a space before and line ends or slashes after
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # spaces, without the last one where something follows
        r"\s+",
    ]
)
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = (*VISIBLE, *sorted(set(range(256)) - set(VISIBLE)))  # the byte of each of tokens 0..255
CHARS = {b: chr(b if b in VISIBLE else 256 + BYTES.index(b) - len(VISIBLE)) for b in BYTES}
Merges = Sequence[tuple[bytes, bytes]]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder with encoder.json and vocab.bpe.

    `<|endoftext|>` is its end of text, which is recognised inside texts too. Raises ValueError
    unless the two files are of one tokenizer.

    >>> import tempfile
    >>> from sparse import release
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     release.save_tokenizer([(b"a", b"b")], folder)
    ...     tokenizer = release.load_tokenizer(folder)
    >>> len(tokenizer)  # 256 bytes, one merge, the end of text
    258
    """
    folder = Path(folder)
    vocabulary = _vocabulary(_merges(folder / "vocab.bpe"))
    found = read_json(folder / "encoder.json")
    end = found.pop(END_OF_TEXT, len(vocabulary))
    found.pop("<|startoftext|>", None)  # an entry that some encoder.json have and nothing uses
    if found != vocabulary or end != len(vocabulary):
        odd = sorted(
            {k for k in found.keys() | vocabulary.keys() if found.get(k) != vocabulary.get(k)}
        )
        raise ValueError(
            f"{folder}: encoder.json is not the vocabulary of vocab.bpe (256 bytes, then the "
            f"merges in order, then the end of text as {len(vocabulary)}, there {end}); they "
            f"differ at {len(odd)} entries such as {odd[:3]}; take both files from one release"
        )
    bpe = models.BPE(vocab=vocabulary, merges=list(_pairs(vocabulary)), ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def save_tokenizer(merges: Merges, folder: str | Path) -> None:
    """Write encoder.json and vocab.bpe of the tokenizer with these merges, in order of rank.

    >>> import tempfile
    >>> from sparse import release
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     release.save_tokenizer([(b"a", b"b")], folder)
    ...     tokenizer = release.load_tokenizer(folder)
    >>> tokenizer.tokenize("abba")
    ['ab', 'b', 'a']
    """
    as_text = [(_text(a), _text(b)) for a, b in merges]
    vocabulary = _vocabulary(as_text)
    vocabulary[END_OF_TEXT] = len(vocabulary)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in as_text), ""]
    files = {"encoder.json": json.dumps(vocabulary), "vocab.bpe": "\n".join(lines)}
    replace_files(folder, files)


def _text(piece: bytes) -> str:
    """Return the bytes of a piece as the files write them: one visible character per byte."""
    return "".join(CHARS[b] for b in piece)


def _merges(path: Path) -> list[tuple[str, str]]:
    """Return the merges in a vocab.bpe: a line with the version, then one pair per line."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a folder with encoder.json and vocab.bpe")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        parts = line.split(" ")
        if number == 1 or not line:
            continue
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}, line {number}: {line!r} must be two pieces and a space")
        pairs.append((parts[0], parts[1]))
    return pairs


def _vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return {piece: token}.

    Raises ValueError where a merge does not join two earlier pieces to a new one.
    """
    vocabulary = {CHARS[b]: i for i, b in enumerate(BYTES)}
    for a, b in merges:
        if a not in vocabulary or b not in vocabulary or a + b in vocabulary:
            raise ValueError(
                f"vocab.bpe: merge {len(vocabulary) - 256}, {a!r} and {b!r}, must join two earlier "
                "pieces to a new one; the file is damaged or in another order"
            )
        vocabulary[a + b] = len(vocabulary)
    return vocabulary


def _pairs(vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield every pair of pieces that together are a piece, lowest token of these first.

    The tokenizer may merge all of them, not only the pairs listed in vocab.bpe.
    """
    for piece in vocabulary:
        for i in range(1, len(piece)):
            if piece[:i] in vocabulary and piece[i:] in vocabulary:
                yield piece[:i], piece[i:]
