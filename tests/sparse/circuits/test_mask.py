import pytest
import torch
from safetensors.torch import save_file

from sparse.circuits.mask import masked, straight_through
from sparse.circuits.means import load_means, node_means, save_means
from sparse.circuits.score import last_logits
from sparse.circuits.taps import edited, recorded
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.ops.csr_linear import csr_products
from sparse.tasks.batch import TaskBatch, task_nats


def random_ids(n: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))


def filled(model, value: float) -> dict[str, torch.Tensor]:
    return {at: torch.full((width,), value) for at, width in model.node_widths().items()}


def test_a_mask_of_ones_is_the_model_bit_for_bit(small):
    ids = random_ids()
    clean = small(ids).logits
    with masked(small, filled(small, 1.0), filled(small, 3.0)):
        assert torch.equal(small(ids).logits, clean)
    with masked(small, {}, {}):
        assert torch.equal(small(ids).logits, clean)


def test_a_mask_of_zeros_sees_only_the_current_token_and_position(small):
    ids, other = random_ids(seed=1), random_ids(seed=2)
    other[:, -1] = ids[:, -1]
    with masked(small, filled(small, 0.0), filled(small, 0.7)):
        one, two = small(ids).logits, small(other).logits
    assert torch.equal(one[:, -1], two[:, -1])
    assert not torch.equal(one[:, 0], two[:, 0])  # the embedding and the bigram table remain


def test_control_the_open_model_sees_the_earlier_tokens(small):
    ids, other = random_ids(seed=1), random_ids(seed=2)
    other[:, -1] = ids[:, -1]
    assert not torch.allclose(small(ids).logits[:, -1], small(other).logits[:, -1])


def test_a_mask_holds_exactly_the_nodes_it_names(small):
    keep = {"1.mlp.post_act": torch.arange(32) % 3 > 0}
    ablation = {"1.mlp.post_act": torch.randn(32)}
    ids = random_ids()
    with recorded(small, ["1.mlp.post_act"]) as before:
        small(ids)
    with masked(small, keep, ablation), recorded(small, ["1.mlp.post_act"]) as after:
        small(ids)
    m = keep["1.mlp.post_act"]
    was, now = before["1.mlp.post_act"], after["1.mlp.post_act"]
    assert torch.equal(now[..., m], was[..., m])
    assert torch.equal(now[..., ~m], ablation["1.mlp.post_act"][~m].expand_as(now[..., ~m]))


def test_the_straight_through_gradient_equals_its_formula():
    tau = torch.tensor([-1.0, -0.2, 0.0, 0.3, 1.0], requires_grad=True)
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0])
    for theta in (0.1, 0.5, 2.0):
        m = straight_through(tau, theta)
        assert m.tolist() == [0, 0, 1, 1, 1]
        (grad,) = torch.autograd.grad((m * weight).sum(), tau)
        z = (tau.detach() / theta).requires_grad_()
        (slope,) = torch.autograd.grad(torch.sigmoid(z).sum(), z)
        torch.testing.assert_close(grad, weight * slope / theta)


def test_the_gradient_of_a_mask_is_that_of_the_blend(small):
    """d loss / dm by autograd against a finite difference of the same blend m x + (1 - m) mu."""
    small.double()
    ids, at = random_ids(), "0.mlp.post_act"
    mu = torch.randn(32, dtype=torch.float64)

    def loss(m):
        with masked(small, {at: m}, {at: mu}):
            return small(ids).logits.square().mean()

    m = torch.rand(32, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(loss(m), m)
    eps, bump = 1e-6, torch.zeros(32, dtype=torch.float64)
    bump[int(grad.abs().argmax())] = 1e-6
    slope = (loss(m + bump) - loss(m - bump)) / (2 * eps)
    torch.testing.assert_close(slope, grad[bump > 0].squeeze(), rtol=1e-4, atol=1e-8)


def test_node_means_are_the_mean_over_all_positions_whatever_the_batch(small):
    blocks = random_ids(7, 12)
    means = node_means(small, blocks, batch_size=3)
    with recorded(small) as values:
        small(blocks)
    assert list(means) == list(small.node_widths())
    for at, value in values.items():
        torch.testing.assert_close(means[at], value.mean((0, 1)))
    with pytest.raises(ValueError, match="no tokens"):
        node_means(small, blocks[:0])


def test_means_survive_a_folder_and_their_absence_is_explained(small, tmp_path):
    means = node_means(small, random_ids())
    save_means(tmp_path / "sparse", means, "abc")
    for fingerprint in (None, "abc"):
        loaded = load_means(tmp_path / "sparse", fingerprint)
        assert all(torch.equal(loaded[at], means[at]) for at in means)
    with pytest.raises(ValueError, match="node_means"):
        load_means(tmp_path)


def test_means_of_another_model_and_altered_ones_are_refused_and_old_files_are_read(tmp_path):
    means = {"0.attn.q": torch.arange(4.0)}
    save_means(tmp_path, means, "abc")
    with pytest.raises(ValueError, match="node means of model abc, but this model is def"):
        load_means(tmp_path, "def")
    path = tmp_path / "node_means.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ValueError, match="other values were saved"):
        load_means(tmp_path, "abc")
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="is broken"):
        load_means(tmp_path, "abc")
    save_file(means, path)  # as it was before means recorded their model
    assert torch.equal(load_means(tmp_path, "def")["0.attn.q"], means["0.attn.q"])


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
