"""Batches of packed text, which a resumed run continues exactly where it stopped.

    pack              blocks  Int[block pos]    prefix + a piece of text_1 eos text_2 eos ...
    Batches           ids     Int[batch pos]    each batch a pure function of (seed, step)
    StreamingBatches  ids     Int[batch pos]    from more rows than memory holds, read one by one

The documents come from corpus.py; `pack` is in pack.py.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice, takewhile
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparse.ops.prefix import begin
from sparse.ops.seeds import seed_of

from .corpus import is_validation, text_of
from .pack import beginning, encode, end_of_text, text_hash, tokenizer_rules


def _check_identity(mine: dict[str, Any], state: dict[str, Any], who: str) -> None:
    """Raise ValueError where `state` differs from `mine`, the identity of these batches.

    A key that is missing or None on either side is not compared.
    """
    known = {k: v for k, v in mine.items() if v is not None and state.get(k) is not None}
    if differ := [k for k, v in known.items() if state[k] != v]:
        changes = "; ".join(f"{k}: {state[k]} there, {mine[k]} here" for k in differ)
        raise ValueError(
            f"{who}: the state belongs to other batches ({changes}); give the text, tokenizer, "
            "length and batch size it was made with, or another output folder to start anew"
        )


class Batches:
    """Endless batches of blocks, reshuffled each epoch; a batch depends on seed and step alone.

        at(t) = blocks[perm(seed, epoch)[i B : (i + 1) B]],    epoch, i = divmod(t, n_blocks // B)

    B is `batch_size`. The blocks at the end of a permutation that do not fill a batch are left out
    of that epoch. Iteration starts at `step`, the number of the next batch, which is the whole
    state. Raises ValueError where there are fewer than B blocks.
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
            source = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.blocks), generator=source))
        return self._order[1]

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        while True:
            self.step += 1
            yield self.at(self.step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the next batch, and what identifies these batches.

        They are identified by the hash of the blocks, their length, the batch size and the seed.
        """
        return {"step": self.step, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of a `state_dict`; a state of other batches is a ValueError."""
        _check_identity(self._identity, state, "Batches")
        self.step = state["step"]

    @cached_property
    def _identity(self) -> dict[str, Any]:
        text = hashlib.sha256(self.blocks.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        size = {"length": self.blocks.shape[1], "batch_size": self.batch_size}
        return {**size, "batch_seed": self.seed, "text": text}


class StreamingBatches:
    """Endless batches from rows that are read one by one, such as a Hugging Face `IterableDataset`.

    Documents are packed as by `pack`, in the order of the rows, and every block begins with the
    tokenizer's prefix (`prefix_ids`). Tokens left over go into the next batch. The state is the
    state of the rows and those tokens, so that a run continues at the very next token. There is no
    `at(step)`, because a stream cannot be entered at any place. (The state of a `datasets` stream
    does not hold its shuffle buffer; shuffle the shards, or the rows beforehand.)

    `part` says which documents are taken: those that `load_corpus` would put into "train" or
    "validation" at this `validation_share`, or "all".

    The state of other batches is refused as far as it can be told apart: by the first row, the
    tokenizer, its prefix, the column, the part, its share, the length and the batch size. A state
    from before prefixes were known has an empty one.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        batch_size: int,
        *,
        text_column: str = "text",
        part: Literal["train", "validation", "all"] = "train",
        validation_share: float = 0.05,
    ) -> None:
        if not (hasattr(rows, "state_dict") and hasattr(rows, "load_state_dict")):
            raise ValueError(
                f"StreamingBatches: {type(rows).__name__} has no state_dict and load_state_dict, "
                "so it cannot be resumed; pass a datasets.IterableDataset, or use pack and Batches"
            )
        if length < 2 or batch_size < 1:
            raise ValueError(
                f"StreamingBatches: length={length} must be at least 2 and "
                f"batch_size={batch_size} at least 1"
            )
        self.rows: Any = rows
        self.tokenizer, self.eos = tokenizer, end_of_text(tokenizer)
        self.prefix, self._room = beginning(tokenizer, length, "StreamingBatches")
        self.length, self.batch_size = length, batch_size
        self.text_column, self.part, self.share = text_column, part, validation_share
        self.step = self.epoch = self.documents = 0
        self._held: list[int] = []
        self._reader: Iterator[dict[str, Any]] | None = None
        self._first: str | None = None  # hash of the first row, once it was read

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        while True:
            need = self.batch_size * self._room
            while len(self._held) < need:
                self._held += self._next_document()
            batch = torch.tensor(self._held[:need]).view(self.batch_size, self._room)
            self._held = self._held[need:]
            self.step += 1
            yield begin(batch, self.prefix)

    def _next_document(self) -> list[int]:
        """Return the tokens and end of text of the next document of the part.

        After the last row, the rows begin anew with the next epoch.
        """
        while True:
            if self._reader is None:
                self._reader = iter(self.rows)
            row = next(self._reader, None)
            if row is None:
                self._next_epoch()
                continue
            text = text_of(row, self.text_column, "a row of the stream")
            self._first = self._first or text_hash(text)
            if text.strip() and self._takes(text):
                self.documents += 1
                return [*encode(self.tokenizer, [text])[0], self.eos]

    def _takes(self, text: str) -> bool:
        """Return whether a document belongs to the part."""
        held_out = self.part == "validation"
        return self.part == "all" or is_validation(text, self.share) == held_out

    def _next_epoch(self) -> None:
        if self.documents == 0:
            raise ValueError(
                f"StreamingBatches: the rows held no document of part {self.part!r}; "
                "give more text, or check the split and the column"
            )
        self.epoch, self.documents, self._reader = self.epoch + 1, 0, None
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that continues the stream at its next token, as plain values.

        Besides the identity of the batches it holds the state of the rows and the tokens left over.
        """
        return {
            "step": self.step,
            "epoch": self.epoch,
            "documents": self.documents,
            "rows": self.rows.state_dict(),
            "held": list(self._held),
            **self._identity,
        }

    @property
    def _identity(self) -> dict[str, Any]:
        how = {"length": self.length, "batch_size": self.batch_size, "part": self.part}
        how |= {"validation_share": self.share, "text_column": self.text_column}
        return {
            **how,
            "prefix": list(self.prefix),
            "tokenizer": self._rules,
            "first_row": self._first,
        }

    @cached_property
    def _rules(self) -> str:
        return text_hash(tokenizer_rules(self.tokenizer))

    def _read_first(self) -> None:
        """Read the first row for its hash; `load_state_dict` then sets the rows to their place."""
        if (row := next(iter(self.rows), None)) is not None:
            self._first = text_hash(text_of(row, self.text_column, "a row of the stream"))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; a state of other batches is a ValueError."""
        if self._first is None and state.get("first_row") is not None:
            self._read_first()
        _check_identity(self._identity, {"prefix": [], **state}, "StreamingBatches")
        self.step, self.epoch, self.documents = state["step"], state["epoch"], state["documents"]
        self._held, self._reader = list(state["held"]), None
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(self.epoch)
        self.rows.load_state_dict(state["rows"])


def first_blocks(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    n: int,
    part: Literal["train", "validation", "all"] = "validation",
    **fields: Any,
) -> Int[Tensor, "block pos"]:
    """Return the first `n` blocks of a part of a stream, or all there are if these are fewer.

    No row is read beyond the n-th block. `length` is the tokens per block, and `fields` are further
    arguments of `StreamingBatches`. Raises ValueError if there is not one full block.

    >>> from dense import tiny
    >>> from sparse import first_blocks, stream_corpus
    >>> first_blocks(stream_corpus(), tiny().tokenizer, length=32, n=4).shape
    torch.Size([4, 32])
    """
    stream = StreamingBatches(rows, tokenizer, length, 1, part=part, **fields)
    blocks = list(takewhile(lambda _: stream.epoch == 0, islice(stream, n)))
    if not blocks:
        raise ValueError(
            f"first_blocks: the documents of part {part!r} hold fewer than one block of {length} "
            "tokens; give more text or a smaller length"
        )
    return torch.cat(blocks)
