"""Text to ids: a corpus of documents, packed into blocks, served in batches that resume exactly.

load_corpus  ->  Corpus(train, validation)     documents; a document's own content places it
pack         ->  blocks  Int[block pos]        doc eos doc eos ..., cut every `length` tokens
Batches      ->  ids     Int[batch pos]        a pure function of (seed, step)
"""

import hashlib
import json
import os
import sys
import sysconfig
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".py", ".md")
SEPARATOR = "<|endoftext|>"
PASSAGE = 2_000  # characters: the least a passage of a single text file holds


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order, split by content into training and validation."""

    name: str
    """What was read, for cards and logs."""
    train: list[str]
    """Training documents."""
    validation: list[str]
    """Validation documents; none of them is also a training document."""
    fingerprint: str
    """sha256 over the names and contents of all documents, in order."""
    skipped: dict[str, int] = field(default_factory=dict)
    """How many documents were left out, by reason."""


def load_corpus(
    source: str | Path | None = None,
    *,
    text_column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    documents: int | None = None,
    validation_share: float = 0.05,
) -> Corpus:
    """Return the documents of `source`, split into training and validation by their content.

        document is validation  iff  sha256(document) / 2^256 < validation_share

    so no document is in both, copies stay together, and adding one document moves no other.

    `source` is None (the sources of Python's standard library), a .txt file (cut at lines of
    `<|endoftext|>`, or else at blank lines into passages), a .jsonl file (one document per row, in
    `text_column`), a folder of .txt, .jsonl, .py and .md files, or the name of a Hugging Face
    dataset (extra `data`), of which `split`, `config` and `revision` select the rows. `documents`
    keeps the first so many; with `streaming` only those are downloaded.

    Raises ValueError if a column is missing or a split is left empty, FileNotFoundError if a path
    does not exist, ImportError without the extra `data`.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"load_corpus: validation_share={validation_share} must be in (0, 1)")
    skipped: Counter[str] = Counter()
    if source is None:
        name = f"the standard library of Python {sys.version.split()[0]}"
        pairs = _folder(Path(sysconfig.get_path("stdlib")), (".py",), text_column, skipped)
    elif (path := Path(source).expanduser()).is_dir():
        name, pairs = path.name, _folder(path, SUFFIXES, text_column, skipped)
    elif path.is_file():
        name, pairs = path.name, _file(path, path.name, text_column, skipped, alone=True)
    elif _looks_like_a_path(source):
        raise FileNotFoundError(f"load_corpus: there is no file or folder {str(source)!r}")
    else:
        name = str(source)
        rows = open_dataset(
            name, split=split, config=config, revision=revision, streaming=streaming
        )
        pairs = ((f"row {i}", _text(row, text_column, name)) for i, row in enumerate(rows))
    return _split(name, pairs, skipped, documents, validation_share)


def is_validation(document: str, share: float = 0.05) -> bool:
    """Say whether a document belongs to validation: sha256(document) / 2^256 < share."""
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _split(
    name: str,
    pairs: Iterable[tuple[str, str]],
    skipped: Counter[str],
    documents: int | None,
    share: float,
) -> Corpus:
    parts: dict[bool, list[str]] = {False: [], True: []}
    digest = hashlib.sha256()
    for label, text in pairs:
        if documents is not None and len(parts[False]) + len(parts[True]) == documents:
            break
        if not text.strip():
            skipped["empty"] += 1
            continue
        for piece in (label, text):
            raw = piece.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "big") + raw)
        parts[is_validation(text, share)].append(text)
    n_train, n_validation = len(parts[False]), len(parts[True])
    if not (n_train and n_validation):
        raise ValueError(
            f"{name} holds {n_train} training and {n_validation} validation documents at "
            f"validation_share={share} (left out: {dict(skipped) or 'none'}); each needs at least "
            f"one: give more documents ({', '.join(SUFFIXES)}) or another validation_share"
        )
    return Corpus(
        name=name,
        train=parts[False],
        validation=parts[True],
        fingerprint=digest.hexdigest(),
        skipped=dict(skipped),
    )


def _folder(
    root: Path, suffixes: tuple[str, ...], text_column: str, skipped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the files below `root`, in the order of their names."""
    apart = {"site-packages", "dist-packages", "__pycache__"}
    files = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*")
        if path.suffix in suffixes and not apart & set(path.relative_to(root).parts)
    }
    for label, path in sorted(files.items()):
        if path.is_file():
            yield from _file(path, label, text_column, skipped, alone=False)


def _file(
    path: Path, label: str, text_column: str, skipped: Counter[str], alone: bool
) -> Iterator[tuple[str, str]]:
    """Yield the documents of one file; a lone text file is cut so that it can be split."""
    try:
        if path.suffix == ".py":  # in the coding that it declares
            with tokenize.open(path) as file:
                text = file.read()
        else:
            text = path.read_text(encoding="utf-8")
    except (SyntaxError, UnicodeDecodeError):
        skipped["not in the declared coding"] += 1
        return
    except PermissionError:
        skipped["not readable"] += 1
        return
    if path.suffix == ".jsonl":
        for i, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{label}:{i}", _text(_row(line, path, i), text_column, f"{path}:{i}")
        return
    pieces = [text]
    if path.suffix == ".txt" and SEPARATOR in text:
        pieces = text.split(SEPARATOR)
    elif alone:
        pieces = _passages(text)
    yield from ((f"{label}:{i}", piece) for i, piece in enumerate(pieces))


def _passages(text: str) -> Iterator[str]:
    """Cut at blank lines into passages of `PASSAGE` characters or more; the last may be less."""
    held = ""
    for paragraph in text.split("\n\n"):
        held += paragraph + "\n\n"
        if len(held) >= PASSAGE:
            yield held
            held = ""
    yield held


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number} is not JSON ({error}); a .jsonl file has one object per line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f'{path}:{number} is not a JSON object; write {{"text": ...}} on each line'
        )
    return row


def _text(row: dict[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise ValueError(
            f"{where} has no text in column {column!r}; its columns are "
            f"{ {key: type(value).__name__ for key, value in row.items()} }; "
            "name the one that holds text with text_column"
        )
    return text


def _looks_like_a_path(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path)
        or text.startswith((".", "~", os.sep))
        or text.endswith(SUFFIXES)
        or text.count("/") > 1
    )


def open_dataset(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Any:
    """Return the rows of a Hugging Face dataset; needs the extra `data`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file or folder here, and reading it from Hugging Face needs the "
            'package `datasets`, which is not installed: pip install "sparse-bridges[data]"'
        ) from error
    return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)


def pack(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    cache: str | Path | None = None,
) -> Int[Tensor, "block pos"]:
    """Return the documents as blocks of `length` tokens.

        text_1 eos text_2 eos ... text_n eos,  cut every `length` tokens, the remainder dropped

    With `cache`, a folder, the blocks are kept there in a file named by a hash of texts, tokenizer
    and length. Raises ValueError without an end-of-text token or if there is not one full block.
    """
    if length < 2:
        raise ValueError(f"pack: length={length} must be at least 2 tokens: one predicts the next")
    eos = _eos(tokenizer)
    stored = None
    if cache is not None:
        stored = Path(cache) / f"{_key(texts, tokenizer, length)}.safetensors"
        if stored.is_file():
            return load_file(stored)["blocks"].long()
    runs: list[Tensor] = []
    with tqdm(total=len(texts), desc="tokenizing", unit="doc", delay=2, file=sys.stderr) as bar:
        for start in range(0, len(texts), 128):
            chunk = list(texts[start : start + 128])
            for ids in _encode(tokenizer, chunk):
                runs.append(torch.tensor([*ids, eos], dtype=torch.int32))
            bar.update(len(chunk))
    tokens = torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int32)
    n_blocks = len(tokens) // length
    if n_blocks == 0:
        raise ValueError(
            f"pack: {len(texts)} documents hold {len(tokens)} tokens, fewer than one block of "
            f"{length}; give more text or a smaller length"
        )
    blocks = tokens[: n_blocks * length].view(n_blocks, length)
    if stored is not None:
        _save(blocks, stored)
    return blocks.long()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]  # type: ignore


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(
            "this tokenizer has no end-of-text token, which must stand between documents; "
            "set tokenizer.eos_token to one of its tokens"
        )
    return tokenizer.eos_token_id


def _key(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else f"{tokenizer!r}{sorted(tokenizer.get_vocab().items())}"
    digest = hashlib.sha256(f"{length} {_eos(tokenizer)} {len(texts)} {rules}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


def _save(blocks: Tensor, path: Path) -> None:
    """Write the blocks so that `path` is either absent or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({"blocks": blocks.contiguous()}, name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


class Batches:
    """Batches of blocks without end, reshuffled each epoch; the batch at a step is a pure function.

    at(t) = blocks[perm(seed, epoch)[i B : (i + 1) B]],    epoch, i = divmod(t, n_blocks // B)
    """

    def __init__(self, blocks: Int[Tensor, "block pos"], batch_size: int, seed: int = 0) -> None:
        if not 1 <= batch_size <= len(blocks):
            raise ValueError(
                f"Batches: batch_size={batch_size} is outside 1..{len(blocks)}, the number of "
                "blocks; give more text, shorter blocks or a smaller batch"
            )
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        self.per_epoch = len(blocks) // batch_size
        self.step = 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def at(self, step: int) -> Int[Tensor, "batch pos"]:
        """Return the batch of one step."""
        if step < 0:
            raise ValueError(f"Batches.at: step={step} must not be negative")
        epoch, i = divmod(step, self.per_epoch)
        rows = self._permutation(epoch)[i * self.batch_size : (i + 1) * self.batch_size]
        return self.blocks[rows]

    def _permutation(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            source = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._order = (epoch, torch.randperm(len(self.blocks), generator=source))
        return self._order[1]

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        while True:
            self.step += 1
            yield self.at(self.step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the next batch."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of a `state_dict`."""
        self.step = state["step"]
