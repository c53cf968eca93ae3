"""A pretraining small enough to be killed, shared and repeated many times in a test."""

import json
from pathlib import Path

import torch

from sparse.model.gpt import SparseGPT
from sparse.text.batches import Batches
from sparse.training.recipes import Preset, gao2025

VOCAB, STEPS = 30, 24
BLOCKS = torch.randint(0, VOCAB, (40, 8), generator=torch.Generator().manual_seed(0))
HELD = (BLOCKS[:4], BLOCKS[4:7])


def preset(folder: Path, *, model=None, sparsity=None, train=None, **recipe) -> Preset:
    """The published recipe on one narrow layer; matrices below 1/8, where products are sparse."""
    shape = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
    )
    often = dict(log_every=1, evaluate_every=5, checkpoint_every=3)
    return gao2025(
        str(folder),
        2,
        0.4,
        steps=STEPS,
        model=shape | (model or {}),
        sparsity=dict(floor=1) | (sparsity or {}),
        train=often | (train or {}),
        **dict(lr=0.05, warmup=0.1) | recipe,
    )


def build(config: Preset, seed: int = 0) -> SparseGPT:
    torch.manual_seed(seed)
    return SparseGPT(config.model)


def batches(seed: int = 1) -> Batches:
    return Batches(BLOCKS, 8, seed=seed)


def logged(folder: Path) -> list[dict]:
    """The log without its times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
