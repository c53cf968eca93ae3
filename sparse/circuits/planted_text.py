"""The language of a planted model: its words, their tokenizer, two tasks, and a made corpus.

vocabulary   words of the pool (punctuation, a few real words, made-up ones), shuffled by seed
frame        ti ro CUE mel WORD gus .. WORD fa ASK         the same for every pair that uses it
pair         one frame, one word, and a cue of either kind: only the cue differs
sentence     words with a cue of either task, then ASK and the target that the cue asks for
             (planted.py lets the model itself draw the words between)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse.tasks.own import SPLITS
from sparse.tasks.pair import Pair
from sparse.tasks.task import Task

TASKS = ("first", "second")
"""The names of the two tasks of every planted model. Each is a family of its own."""
UNKNOWN = "[UNK]"
REAL = (UNKNOWN, ".", "The", "This", "the", "this", "is", "when")
"""Words that are in every vocabulary; the targets of nonsense twins are among them."""
N_VOCABULARY = 160
N_CUES, N_ASKS = 2, 3  # words that are cues of one kind; words that ask for one task's answer
SENTENCE = 16  # tokens of a sentence of the corpus
CUE_RATE = 0.85  # share of the sentences that hold a cue of a given task


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """Which word plays which part; words are token ids."""

    words: tuple[str, ...]
    """The vocabulary, by token id."""
    cues: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """For each task its cues of the first kind and those of the second."""
    asks: dict[str, tuple[int, ...]]
    """For each task the words after which its answer follows."""
    targets: dict[str, tuple[int, int]]
    """For each task the answer to a cue of the first kind, and that to one of the second."""
    slots: dict[str, tuple[int, ...]]
    """For each split the words that fill its frames; no word is in two splits."""
    fillers: tuple[int, ...]
    """The words of which frames are made."""

    @property
    def plain(self) -> tuple[int, ...]:
        """The words that say nothing of any answer: fillers and those that fill the frames."""
        return (*self.fillers, *(i for split in SPLITS for i in self.slots[split]))


def lexicon(rng: Random, n_words: int) -> Lexicon:
    """Return a vocabulary in which every part is drawn anew; `n_words` fill a split's frames."""
    made = [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("", "k", "l", "n", "s")]
    words = [*REAL, *rng.sample(made, N_VOCABULARY - len(REAL))]
    free = list(range(len(REAL), N_VOCABULARY))
    rng.shuffle(free)

    def take(n: int) -> tuple[int, ...]:
        return tuple(free.pop() for _ in range(n))

    return Lexicon(
        words=tuple(words),
        cues={name: (take(N_CUES), take(N_CUES)) for name in TASKS},
        asks={name: take(N_ASKS) for name in TASKS},
        targets={name: (free.pop(), free.pop()) for name in TASKS},
        slots={split: take(n_words) for split in SPLITS},
        fillers=(*free, *(words.index(word) for word in REAL if word != UNKNOWN)),
    )


def tokenizer_of(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer in memory: one token per word, nothing before a text."""
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=".")


def make_task(name: str, lexicon: Lexicon, rng: Random, n_frames: int) -> Task:
    """Return the task of this name: every frame of a split with every word of it.

    The pairs are in an order in which the first n of them have as many frames and words as n pairs
    can have.
    """
    splits = {}
    lengths = rng.sample(range(11, 16), 2)  # two, so that many frames are equally long
    words = lexicon.words
    for split in SPLITS:
        frames = [_frame(name, lexicon, rng, lengths[i % 2]) for i in range(n_frames)]
        slots = lexicon.slots[split]
        pairs = []
        for i in range(n_frames * len(slots)):
            turn, f = divmod(i, n_frames)
            (frame, cue_1, cue_2), word = frames[f], words[slots[(f + turn) % len(slots)]]
            contexts = [frame.format(CUE=words[cue], WORD=word) for cue in (cue_1, cue_2)]
            first, second = (f" {words[t]}" for t in lexicon.targets[name])
            groups = {"frame": frame, "word": word}
            pairs.append(
                Pair(
                    context_1=contexts[0], context_2=contexts[1],
                    target_1=first, target_2=second, groups=groups,
                )
            )  # fmt: skip
        splits[split] = tuple(pairs)
    meaning = "which kind of cue stood near the beginning?"
    return Task(name=name, meaning=meaning, **splits)


def _frame(name: str, lexicon: Lexicon, rng: Random, n: int) -> tuple[str, int, int]:
    """Return a frame of `n` words, with places for cue and word, and the two cues it is used with.

    The cue is in its first third. Half of the frames hold a cue of the other task as well.
    """
    text = [lexicon.words[i] for i in rng.sample(lexicon.fillers, n)]
    cue = rng.randrange(1, 1 + n // 3)
    text[cue] = "{CUE}"
    free = [i for i in range(n - 1) if i != cue]
    for i in (first := rng.sample(free, 2)):
        text[i] = "{WORD}"
    if rng.random() < 0.5:
        other = TASKS[1 - TASKS.index(name)]
        place = rng.choice([i for i in free if i not in first])
        text[place] = lexicon.words[rng.choice(lexicon.cues[other][rng.randrange(2)])]
    text[-1] = lexicon.words[rng.choice(lexicon.asks[name])]
    one, two = (rng.choice(kind) for kind in lexicon.cues[name])
    return " ".join(text), one, two


def corpus(lexicon: Lexicon, rng: Random, n: int) -> Int[Tensor, "block pos"]:
    """Return `n` sentences of SENTENCE tokens.

    Words follow a law like Zipf's, the frequent ones first in `Lexicon.plain`. A sentence holds a
    cue of each task with the probability CUE_RATE, and ends in a word that asks for one of the
    answers that its cues give, and that answer.
    """
    plain = lexicon.plain
    weights = [1 / (4 + rank) for rank in range(len(plain))]
    blocks = []
    for _ in range(n):
        block = rng.choices(plain, weights, k=SENTENCE)
        places = rng.sample(range(SENTENCE - 2), 2)
        answers = []
        for name, place in zip(TASKS, places, strict=True):
            if rng.random() < CUE_RATE:
                kind = rng.randrange(2)
                block[place] = rng.choice(lexicon.cues[name][kind])
                answers.append((name, kind))
        if answers:
            name, kind = rng.choice(answers)
            block[-2:] = [rng.choice(lexicon.asks[name]), lexicon.targets[name][kind]]
        blocks.append(block)
    return torch.tensor(blocks)
