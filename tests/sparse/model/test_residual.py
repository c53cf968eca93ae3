import pytest
import torch

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT

N_SITES, WIDTH, LENGTH = 5, 12, 7


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = dict(vocab_size=19, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(head_dim=4, intermediate_size=16, positions="learned", bigram_table=True)
    made = SparseGPT(SparseGPTConfig(**shape, initializer_range=0.3)).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


@pytest.fixture
def rows():
    """Residuals and tokens of other sequences and another number of them at every site."""
    rng = torch.Generator().manual_seed(1)
    n = {0: 1, 2: 3, 3: 2, 4: 1}
    h = {s: torch.randn(k, LENGTH, WIDTH, generator=rng, dtype=torch.float64) for s, k in n.items()}
    return h, {s: torch.randint(0, 19, (k, LENGTH), generator=rng) for s, k in n.items()}


def gradients(total, *tensors):
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True)]


def test_joined_rows_end_as_when_resumed_alone_and_send_back_the_same_gradients(model, rows):
    h, ids = rows
    h = {s: x.requires_grad_() for s, x in h.items()}
    ends = model.joined(h, ids)
    assert list(ends) == [0, 2, 3, 4]
    got = {s: model.unembed(ends[s], ids[s]) for s in h}
    want = {s: model.resume(s, h[s], ids[s]) for s in h}
    for s in h:
        assert (got[s] - want[s]).abs().max() < 1e-12
    leaves = [*h.values(), *model.parameters()]
    pulls = [sum((y.sin() * (s + 1)).sum() for s, y in ys.items()) for ys in (got, want)]
    for a, b in zip(gradients(pulls[0], *leaves), gradients(pulls[1], *leaves), strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max())
    assert (ends[2] - h[2]).abs().max() > 0.1  # control: the blocks in between did something
    assert torch.equal(ends[4], h[4]), "nothing is left to run at the last site"


def test_the_main_rows_ride_along_unmoved(model, rows):
    h, ids = rows
    main = torch.randint(0, 19, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    seen, ends = model.residuals_and_joined(main, h, ids)
    for got, want in zip(seen, model.residuals(main), strict=True):
        assert got.shape == want.shape and (got - want).abs().max() < 1e-12
    for s, want in model.joined(h, ids).items():
        assert (ends[s] - want).abs().max() < 1e-12
    assert model.joined({}, {}) == {} == model.residuals_and_joined(main, {}, {})[1]


def test_tokens_are_unembedded_in_any_shape_and_in_chunks(model, rows):
    h, ids = rows
    whole = model.resume(4, h[2], ids[2])
    assert torch.allclose(model.unembed(h[2], ids[2]), whole, atol=1e-12)
    flat = model.unembed(h[2].flatten(0, 1)[5:9], ids[2].flatten()[5:9])
    assert torch.allclose(flat, whole.flatten(0, 1)[5:9], atol=1e-12)
    assert model.vocab_size == whole.shape[-1] == 19
    other = model.unembed(h[2], ids[2].flip(1))  # control: the bigram table reads the tokens
    assert (other - whole).abs().max() > 0.01


def test_rows_that_do_not_fit_are_refused(model, rows):
    h, ids = rows
    with pytest.raises(ValueError, match=r"site 9 is outside 0\.\.4"):
        model.joined({9: h[0]}, {9: ids[0]})
    with pytest.raises(ValueError, match=r"rows of site 2 are .*need \(1, 7, 12\)"):
        model.joined({2: h[2]}, {2: ids[0]})
    with pytest.raises(ValueError, match="rows of site 2 are .*need None"):
        model.joined({2: h[2]}, {})
    with pytest.raises(ValueError, match=r"\[4, 7\] positions; cut them"):
        model.joined({0: h[0], 2: h[2][:, :4]}, {0: ids[0], 2: ids[2][:, :4]})
    with pytest.raises(ValueError, match=r"\[4, 7\] positions; cut them"):
        model.residuals_and_joined(ids[0][:, :4], h, ids)
