"""Tokenizers and models small enough to know by heart; built in code, no network."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse.circuits.means import node_means
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.tasks.pair import Pair
from sparse.tasks.task import Task
from tests.helpers.tokenizers import gpt2_kind

N_FILLERS = 11
FILLERS = [f"w{i}" for i in range(12)]


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's way of splitting, trained on the built-in tasks themselves."""
    return gpt2_kind()


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """One token per word: two quotes, two answers and the fillers between them."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "DQ", "SQ", "double", "single", *FILLERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def planted_task(n: int = 72) -> Task:
    """Which quote opened the line? The fillers between say nothing."""
    rng = torch.Generator().manual_seed(1)
    pairs = []
    for _ in range(n):
        picked = torch.randint(len(FILLERS), (N_FILLERS,), generator=rng).tolist()
        rest = " ".join(FILLERS[i] for i in picked)
        quotes = {"context_1": f"DQ {rest}", "context_2": f"SQ {rest}"}
        pairs.append(Pair(**quotes, target_1=" double", target_2=" single"))
    return Task(
        name="planted",
        train=tuple(pairs[:32]),
        validation=tuple(pairs[32:52]),
        test=tuple(pairs[52:]),
    )


PLANTED = {
    "0.attn.act_in": (0, 1),
    "0.attn.k": (0,),
    "0.attn.v": (1,),
    "0.attn.resid_delta": (2,),
}
"""The nodes of `planted`. Its query is a bias, so the mean replaces it without loss."""


@pytest.fixture(scope="session")
def planted() -> SimpleNamespace:
    """A one-layer model that copies the kind of quote, by hand, amid small random weights.

    Residual channel 0 is the kind of quote (+1, -1), channel 1 says that the token is a quote.
    Key channel 0 reads channel 1, so every position looks at the quote; value channel 1 reads
    channel 0; the output writes channel 2, which the unembedding reads.
    """
    torch.manual_seed(0)
    config = SparseGPTConfig(
        vocab_size=17,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=2,
        intermediate_size=8,
        activation_fraction=1.0,
        attention_sinks=False,
    )
    model = SparseGPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.05)
        wte, attn = model.model.wte.weight, model.model.blocks[0].attn
        wte[:, 3:] = torch.randn(17, 5)
        wte[:, :3] = 0
        wte[1, 0], wte[2, 0], wte[1:3, 1] = 1.5, -1.5, 1.5
        width = 4
        attn.qkv.bias[0] = 3.0  # the query is constant
        attn.qkv.weight[width, 1] = 3.0
        attn.qkv.weight[2 * width + 1, 0] = 3.0
        attn.out.weight[2, 1] = 1.0
        model.lm_head.weight[3:5] = 0
        model.lm_head.weight[3, 2], model.lm_head.weight[4, 2] = 1.0, -1.0
    rng = torch.Generator().manual_seed(2)
    text = torch.randint(5, 17, (200, 1 + N_FILLERS), generator=rng)
    text[:100, 0], text[100:, 0] = 1, 2
    means = node_means(model, text)
    return SimpleNamespace(model=model, means=means, nodes=PLANTED, task=planted_task())


@pytest.fixture
def small() -> SparseGPT:
    """A random two-layer model with every optional part: sinks, bigram table, positions."""
    torch.manual_seed(0)
    config = SparseGPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=4,
        intermediate_size=32,
        max_position_embeddings=32,
        positions="learned",
        bigram_table=True,
        initializer_range=0.3,
    )
    return SparseGPT(config).eval()
