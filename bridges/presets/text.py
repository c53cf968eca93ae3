"""The text of a run: batches to train on, held-out blocks, what is kept of the training text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from sparse.ops.prefix import count_tokens, prefix_ids
from sparse.text.batches import Batches, StreamingBatches, first_blocks
from sparse.text.corpus import load_corpus, stream_corpus
from sparse.text.pack import pack

from .preset import Preset

HELD_OUT, MEANS = 64, 256
"""Blocks that are held out, and blocks of training text over which node means are taken."""


class RunText(NamedTuple):
    """What a run reads."""

    batches: Batches | StreamingBatches
    """The training text, in batches of (batch, length)."""
    heldout: Int[Tensor, "block pos"]
    means_from: Int[Tensor, "_ pos"]
    """Blocks of training text for the means of nodes (`save_run`)."""
    token_counts: Int[Tensor, " vocab"] | None
    """How often each token is in the training text; None where the text is read as it is needed."""
    facts: dict[str, Any]
    """Name, fingerprint and number of training tokens, as far as they are known."""

    def kept(self) -> dict[str, Any]:
        """Return what a run keeps of it, as arguments of `save_run`."""
        names = ("heldout", "means_from", "token_counts")
        return {name: getattr(self, name) for name in names}


def read_text(
    preset: Preset, tokenizer: Any, dataset: str | None = None, cache: Path | None = None
) -> RunText:
    """Return the text of a run: a file, a folder, a data set, or Python's own sources.

    Unless `preset.stream`, it is tokenized at once and kept in the folder `cache`. Raises
    ValueError where the held-out text does not fill the two blocks that the report's errors need.

    >>> from dataclasses import replace
    >>> from bridges import PRESETS, read_text
    >>> from dense import tiny
    >>> text = read_text(replace(PRESETS["smoke"], stream=True), tiny().tokenizer)
    >>> tuple(text.heldout.shape), tuple(next(iter(text.batches)).shape)
    ((64, 32), (4, 32))
    """
    read = _streamed if preset.stream else _kept
    text = read(preset, tokenizer, dataset, cache)
    if len(text.heldout) < 2:
        raise ValueError(
            f"the held-out text of {text.facts['name']} fills {len(text.heldout)} block of "
            f"{preset.length} tokens, and the report's errors need 2; give more text or a smaller "
            "--length"
        )
    return text


def _streamed(preset: Preset, tokenizer: Any, dataset: str | None, _: Path | None) -> RunText:
    length = preset.length
    return RunText(
        StreamingBatches(stream_corpus(dataset), tokenizer, length, preset.batch),
        heldout=first_blocks(stream_corpus(dataset), tokenizer, length, HELD_OUT),
        means_from=first_blocks(stream_corpus(dataset), tokenizer, length, MEANS, "train"),
        token_counts=None,
        facts={"name": dataset or "Python's own sources"},
    )


def _kept(preset: Preset, tokenizer: Any, dataset: str | None, cache: Path | None) -> RunText:
    corpus, length = load_corpus(dataset), preset.length
    train = pack(corpus.train, tokenizer, length, cache=cache)
    return RunText(
        Batches(train, preset.batch, preset.seed),
        heldout=pack(corpus.validation, tokenizer, length, cache=cache)[:HELD_OUT],
        means_from=train[:MEANS],
        token_counts=count_tokens(train, len(tokenizer), prefix_ids(tokenizer)),
        facts={
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "tokens": train.numel(),
        },
    )
