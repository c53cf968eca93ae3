"""Tokenizers of the kinds that GPT-2, Llama and Qwen have, built from their rules.

The rules are those of the published tokenizer.json files: how a text is cut before merging, what
stands for a space, and what is put before a text. The merges are learned here, on the texts of the
built-in tasks and a little of Python's standard library.
"""

from collections.abc import Iterator
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sparse.tasks.suite import get_task, task_names
from sparse.text.corpus import load_corpus

N_ENTRIES = 6_000
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def task_texts() -> Iterator[str]:
    """Every context of the built-in tasks with its target, and the targets of nonsense twins."""
    for name in task_names():
        task = get_task(name)
        for split in ("train", "validation", "test"):
            for pair in task.pairs(split):
                yield pair.context_1 + pair.target_1
                yield " " + pair.context_1
                yield pair.context_2 + (pair.target_2 or "")
                yield " " + pair.context_2
    yield from (f"it{word} so" for word in (" is", " when", " but", "+", "*", ";", "#"))


def _texts() -> list[str]:
    return [*task_texts(), *load_corpus(documents=30).train]


@cache
def gpt2_kind() -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's splitting; puts nothing before a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    _train(bpe, pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@cache
def qwen_kind() -> PreTrainedTokenizerFast:
    """Byte-level BPE on normalised text, every digit by itself; puts nothing before a text."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    _train(bpe, pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@cache
def llama_kind() -> PreTrainedTokenizerFast:
    """BPE of Llama 2: a bar for every space and one before the text, bytes as a last resort, <s>.

    A word is cut only from the bar on, so newlines and punctuation may merge with letters.
    """
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.Split(
                Regex(r"\n|\p{N}|▁+(?=▁)|▁?\p{L}+|▁?[^\p{L}\p{N}▁\n]+|▁"), behavior="isolated"
            ),
        ]
    )
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    special = [AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")]
    special += [AddedToken(f"<0x{byte:02X}>") for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=N_ENTRIES, special_tokens=special, show_progress=False, limit_alphabet=200
    )
    bpe.train_from_iterator(_texts(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _train(bpe: Tokenizer, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=N_ENTRIES,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)


KINDS = {"GPT-2": gpt2_kind, "Llama": llama_kind, "Qwen": qwen_kind}
