"""Corpora: documents in a fixed order, split into training and validation by their content.

`load_corpus` reads them into memory, `stream_corpus` one by one; pack.py and batches.py make tokens
of them.
"""

import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

SUFFIXES = (".txt", ".jsonl", ".py", ".md")
SEPARATOR = "<|endoftext|>"  # stands between the documents of a .txt file
PASSAGE = 2_000  # characters: the least that a passage holds, but for the last of a file
AT_ONCE = 1 << 20  # characters read at a time of a file that holds many documents


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents in a fixed order, split by content into training and validation."""

    name: str
    """The name of the source, for cards and logs."""
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

    So no document is in both, copies of a document stay together, and adding a document moves no
    other. `source` is one of

    - None: the sources of Python's standard library;
    - a .txt file, cut into documents at `<|endoftext|>`, or without this mark at blank lines into
      passages of at least 2,000 characters;
    - a .py or .md file, cut into such passages;
    - a .jsonl file: one document per line, in `text_column`;
    - a folder of .txt, .jsonl, .py and .md files, which are whole documents, but for a .jsonl file
      and a .txt file with the mark;
    - the name of a Hugging Face dataset (needs the extra `data`), of which `split`, `config` and
      `revision` select the rows.

    `documents` keeps only that many, the first ones; with `streaming` a dataset is downloaded no
    further.

    Raises ValueError if a column is missing or a split is left empty, FileNotFoundError if a path
    does not exist, ImportError without the extra `data`.

    >>> from sparse import load_corpus
    >>> corpus = load_corpus(documents=100)  # of Python's standard library
    >>> len(corpus.train) + len(corpus.validation)
    100
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"load_corpus: validation_share={validation_share} must be in (0, 1)")
    skipped: Counter[str] = Counter()
    if found := _files(source):
        name, files, alone = found
        pairs = (
            pair
            for label, path in files
            for pair in _file(path, label, text_column, skipped, alone)
        )
    else:
        name = str(source)
        rows = open_dataset(
            name, split=split, config=config, revision=revision, streaming=streaming
        )
        pairs = ((f"row {i}", text_of(row, text_column, name)) for i, row in enumerate(rows))
    return _split(name, pairs, skipped, documents, validation_share)


def is_validation(document: str, share: float = 0.05) -> bool:
    """Return whether a document belongs to validation: sha256(document) / 2^256 < share."""
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


def stream_corpus(
    source: str | Path | None = None,
    *,
    text_column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
) -> Any:
    """Return the documents of `load_corpus(source)` as rows that are read one by one.

    The rows are what `StreamingBatches` takes: for files a `Documents`, for the name of a Hugging
    Face dataset its streamed rows. Errors are those of `load_corpus`.

    >>> from sparse import stream_corpus
    >>> rows = stream_corpus()
    >>> sorted(next(iter(rows)))
    ['text']
    """
    if found := _files(source):
        return Documents(found, text_column)
    return open_dataset(str(source), split=split, config=config, revision=revision)


class Documents:
    """The documents of files as rows, {text_column: text}, with a state that says which is next.

    One file is open at a time. A .py file, and any other file that is one document, is in memory
    as a whole; of a .jsonl file, or a file that is cut into documents, only the piece at hand is.
    Every file but a .py file is read through once before its first document, to see whether it can
    be decoded and where it is to be cut. To continue at a document, its file is read from the
    beginning.
    """

    def __init__(
        self, found: tuple[str, list[tuple[str, Path]], bool], text_column: str = "text"
    ) -> None:
        self.name, self.files, self.alone = found
        self.text_column = text_column
        self.skipped: Counter[str] = Counter()
        self.file = self.document = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.file < len(self.files):
            label, path = self.files[self.file]
            pieces = _file(path, label, self.text_column, self.skipped, self.alone)
            for _, text in islice(pieces, self.document, None):
                self.document += 1
                yield {self.text_column: text}
            self.file, self.document = self.file + 1, 0
        self.file = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the file and the number of the document in it that come next.

        The file is None where all have been read.
        """
        at = self.files[self.file][0] if self.file < len(self.files) else None
        return {"file": at, "document": self.document}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the document of a `state_dict`; ValueError if its file is not there."""
        labels = [label for label, _ in self.files]
        if state["file"] is not None and state["file"] not in labels:
            raise ValueError(
                f"the state continues in {state['file']}, which is not among the {len(labels)} "
                f"files of {self.name}; restore it, or give another output folder to start anew"
            )
        self.file = len(labels) if state["file"] is None else labels.index(state["file"])
        self.document = state["document"]


def _files(source: str | Path | None) -> tuple[str, list[tuple[str, Path]], bool] | None:
    """Return the name of a source, its files (label, path), and whether it is a single file.

    Returns None for what may be the name of a dataset. Raises ValueError for a file of an unknown
    kind and FileNotFoundError for a path that does not exist.
    """
    if source is None:
        root = Path(sysconfig.get_path("stdlib"))
        return (
            f"the standard library of Python {sys.version.split()[0]}",
            _below(root, (".py",)),
            False,
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return path.name, _below(path, SUFFIXES), False
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"load_corpus: {path.name} is not one of {', '.join(SUFFIXES)}; give one of these, "
                "or a folder of them (plain text under another name: rename it to .txt)"
            )
        return path.name, [(path.name, path)], True
    if _looks_like_a_path(source):
        raise FileNotFoundError(f"load_corpus: there is no file or folder {str(source)!r} here")
    return None


def _below(root: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return (name, path) of the files below `root`, in the order of their names."""
    apart = {"site-packages", "dist-packages", "__pycache__"}
    files = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*")
        if path.suffix in suffixes and not apart & set(path.relative_to(root).parts)
    }
    return [(label, path) for label, path in sorted(files.items()) if path.is_file()]


def _file(
    path: Path, label: str, text_column: str, skipped: Counter[str], alone: bool
) -> Iterator[tuple[str, str]]:
    """Yield (label, text) for every document of one file.

    `alone` says that the file is the whole source. It is then cut into passages, because training
    and validation need documents of their own. Files that cannot be read are counted in `skipped`.
    """
    try:
        if path.suffix == ".py":  # it declares its own coding
            with tokenize.open(path) as file:
                whole, marked = file.read(), False
        else:
            whole, marked = None, _marked(path)
    except (SyntaxError, UnicodeDecodeError):
        skipped["not in the declared coding"] += 1
        return
    except PermissionError:
        skipped["not readable"] += 1
        return
    if whole is not None:
        pieces = _passages(whole.split("\n\n")) if alone else [whole]
        yield from ((f"{label}:{i}", piece) for i, piece in enumerate(pieces))
        return
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            for i, line in enumerate(file, 1):
                if line.strip():
                    yield f"{label}:{i}", text_of(_row(line, path, i), text_column, f"{path}:{i}")
            return
        pieces = [file.read()] if not (marked or alone) else _cut(file, SEPARATOR)
        if alone and not marked:
            pieces = _passages(_cut(file, "\n\n"))
        yield from ((f"{label}:{i}", piece) for i, piece in enumerate(pieces))


def _marked(path: Path) -> bool:
    """Return whether a file is a .txt file with marks (SEPARATOR) between its documents.

    The file is read to its end, so that one which is not UTF-8 raises UnicodeDecodeError here,
    before any of its documents was used.
    """
    found, end = False, ""
    with path.open(encoding="utf-8") as file:
        while part := file.read(AT_ONCE):
            found = found or SEPARATOR in end + part
            end = part[-len(SEPARATOR) :]
    return found and path.suffix == ".txt"


def _cut(file: TextIO, mark: str) -> Iterator[str]:
    """Yield the text between the marks, the pieces of `file.read().split(mark)`."""
    held = ""
    while part := file.read(AT_ONCE):
        *done, held = (held + part).split(mark)
        yield from done
    yield held


def _passages(paragraphs: Iterable[str]) -> Iterator[str]:
    """Yield paragraphs joined to passages of `PASSAGE` characters or more; the last may be less."""
    held = ""
    for paragraph in paragraphs:
        held += paragraph + "\n\n"
        if len(held) >= PASSAGE:
            yield held
            held = ""
    if held:
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


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """Return the text in `column` of a row; raise ValueError, naming the columns, if it has none.

    `where` is the place that the message names.
    """
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
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file or folder here, and reading it from Hugging Face needs the "
            'package `datasets`, which is not installed: pip install "sparse-bridges[data]"'
        ) from error
    return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
