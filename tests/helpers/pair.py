"""A tiny dense model, a tiny sparse one and the tokenizer that they share; built in code."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dense import DenseModel
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT

WORDS = ["[UNK]", "A", "B", "yes", "no", *(f"w{i}" for i in range(18))]
VOCAB, LENGTH = len(WORDS), 6


def build_tokenizer():
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def build_dense(seed=0, **shape):
    torch.manual_seed(seed)
    ends = dict(bos_token_id=0, eos_token_id=0)
    shape = dict(vocab_size=VOCAB, n_embd=12, n_layer=2, n_head=2, n_positions=16) | shape
    model = GPT2LMHeadModel(GPT2Config(**shape, **ends))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return DenseModel(model, build_tokenizer())


def build_sparse(seed=0, **fields):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCAB,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_position_embeddings=16,
        positions="learned",
        bigram_table=True,
        activation_fraction=0.5,
        initializer_range=0.3,
    )
    model = SparseGPT(SparseGPTConfig(**(shape | fields))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # norms, biases and sinks that do something
                p += 0.2 * torch.randn_like(p)
    return model
