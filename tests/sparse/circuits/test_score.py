import pytest
import torch

from sparse.circuits.mask import masked
from sparse.circuits.score import last_logits
from sparse.circuits.taps import edited
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.ops.csr_linear import csr_products
from sparse.tasks.batch import TaskBatch, task_nats


def random_ids(n: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))


def ragged() -> TaskBatch:
    """Three pairs of prompts of unequal length, padded on the right."""
    last = torch.tensor([8, 4, 6, 8, 4, 6])
    real = torch.arange(9) <= last[:, None]
    target, foil = torch.arange(6) + 10, torch.arange(6) + 20
    parts = {"ids": random_ids(6, 9), "real": real, "last": last, "target": target, "foil": foil}
    return TaskBatch(task="t", split="train", targets=(), dropped={}, **parts)


VARIANTS = [
    {"num_hidden_layers": 1},
    {"attention_sinks": False},
    {"positions": "learned", "bigram_table": True, "logits_bias": True},
    {"positions": "concatenated", "position_channels": 3, "norm": "layer"},
    {"activation_locations": ["attn_q", "resid_post_attn", "resid_post_mlp"]},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_at_the_last_position_are_those_of_the_whole_forward(fields, implementation):
    model, batch = variant(**fields), ragged()
    model.set_attn_implementation(implementation)
    got = last_logits(model, batch)
    torch.testing.assert_close(got, batch.scored(model(batch.ids).logits))
    cut = last_logits(model, batch, batch.ids * batch.real)  # padding cannot matter: it comes later
    torch.testing.assert_close(got, cut)
    other = last_logits(model, batch, batch.ids.roll(1, 0))  # control: the prompt does
    assert not torch.allclose(got, other)


def variant(**fields) -> SparseGPT:
    """A random model in double precision, nine tenths of its matrices zero."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=4,
        intermediate_size=32,
        initializer_range=1.0,
    )
    model = SparseGPT(SparseGPTConfig(**(config | fields))).eval().double()
    with torch.no_grad():
        for p in model.model.blocks.parameters():
            p *= torch.rand_like(p) < 0.1 if p.ndim == 2 else 1
    return model


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_short_path_has_the_loss_and_mask_gradients_of_the_plain_equations(fields, dtype, tol):
    """Positions only, compressed rows and one operation per mask, against the whole model."""
    model, batch = variant(**fields).to(dtype).requires_grad_(False), ragged()
    rng = torch.Generator().manual_seed(1)
    widths = model.node_widths().items()
    mu = {at: torch.randn(w, generator=rng, dtype=dtype) for at, w in widths}
    m = {at: torch.rand(w, generator=rng, dtype=dtype).requires_grad_() for at, w in widths}
    plain = {at: lambda x, at=at: m[at] * x + (1 - m[at]) * mu[at] for at in m}
    with edited(model, plain):
        loss = task_nats(batch.scored(model(batch.ids).logits), batch).mean()
    expected = torch.autograd.grad(loss, list(m.values()))
    with csr_products(model) as compressed, masked(model, m, mu):
        got = task_nats(last_logits(model, batch), batch).mean()
    assert len(compressed) >= 2
    torch.testing.assert_close(got, loss, rtol=tol, atol=tol)
    for a, b in zip(torch.autograd.grad(got, list(m.values())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol * loss.item())
    assert any(g.any() for g in expected)
