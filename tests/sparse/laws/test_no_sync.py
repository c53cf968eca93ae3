"""No part of a training step waits for the device: every operation runs where there are no numbers.

A tensor on the meta device has a shape and no values, so whatever asks for one raises: `.item()`,
`if tensor`, `nonzero`, a boolean index, numpy. It is no CPU either, so the paths taken are those of
an accelerator without Triton (the kernels have a test of their own on a GPU).
"""

import pytest
import torch

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.training.config import TrainConfig
from sparse.training.groups import decay_, scale_
from sparse.training.pretrain import PretrainConfig, Pretraining
from sparse.training.sparsity import SparsityConfig


def step(after_backward=lambda module: None, **fields):
    """One optimizer step of the pretraining on the meta device, half way through its run."""
    config = SparseGPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=16,
        positions="learned",
        bigram_table=True,
    )
    train = TrainConfig(steps=10, folder="unused")
    sparsity = SparsityConfig(density=0.5, embedding_density=0.5, anneal_end=0.3)
    with torch.device("meta"):
        module = Pretraining(
            SparseGPT(config), PretrainConfig(train=train, sparsity=sparsity, **fields)
        )
        ids = torch.zeros(3, 9, dtype=torch.long)
    (group,) = module.groups()
    params = list(group.params.values())
    adam = torch.optim.Adam(params, lr=0.1, foreach=True)  # the fused one is for real devices
    torch.stack(list(module(ids, 5).values())).sum().backward()
    after_backward(module)
    rms = scale_(params, group.scaling)
    adam.step()
    module.sparsifier.project(5)
    decay_(group, 0.1)
    return rms


@pytest.mark.parametrize("scaling", ["normalise", "clip"])
def test_a_training_step_asks_the_device_for_no_number(scaling):
    assert step(scaling=scaling).is_meta


def one(module):
    return next(p.grad for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("question", "error"),
    [
        (lambda m: one(m).sum().item(), RuntimeError),
        (lambda m: bool(one(m).isfinite().all()), RuntimeError),
        (lambda m: one(m).nonzero(), NotImplementedError),
        (lambda m: one(m)[one(m) > 0], NotImplementedError),
        (lambda m: one(m).numpy(), TypeError),
    ],
    ids=["item", "if", "nonzero", "boolean index", "numpy"],
)
def test_control_each_way_of_asking_fails_such_a_step(question, error):
    with pytest.raises(error, match="(?i)meta"):
        step(question)
