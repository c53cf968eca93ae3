import pytest
import torch

from sparse import SparseGPT, SparseGPTConfig, release
from sparse.model.borrowed import normed_table
from sparse.training.sparsity import SparsityConfig, budgets, decayed_names

V, WIDTH, BORROWED = 50, 16, 24


def shape(**fields):
    sizes = dict(vocab_size=V, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2)
    return SparseGPTConfig(**(sizes | dict(head_dim=8, intermediate_size=32) | fields))


def rows(seed=0):
    return torch.randn(V, BORROWED, generator=torch.Generator().manual_seed(seed)) + 3


def borrowing(tied):
    torch.manual_seed(0)
    model = SparseGPT(shape(embedding_width=BORROWED, tie_word_embeddings=tied)).eval()
    model.borrow_(rows()) if tied else model.borrow_(rows(), rows(1))
    return model


IDS = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_model_whose_own_embeddings_are_the_mapped_tables(tied):
    model = borrowing(tied)
    t_in, t_out = normed_table(rows()), normed_table(rows(0 if tied else 1))
    maps = {name: p for name, p in model.state_dict().items() if name.endswith("map.weight")}
    w_in, w_out = maps["model.wte.map.weight"], maps["lm_head.map.weight"]
    own = SparseGPT(shape()).eval()
    state = {n: p for n, p in model.state_dict().items() if n in own.state_dict()}
    state |= {"model.wte.weight": t_in @ w_in.T, "lm_head.weight": t_out @ w_out}
    own.load_state_dict(state)
    torch.testing.assert_close(model(IDS).logits, own(IDS).logits)
    for mine, theirs in zip(model.residuals(IDS), own.residuals(IDS), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(model.model.wte.weight, own.model.wte.weight)
    torch.testing.assert_close(model.lm_head.weight, own.lm_head.weight)


def test_its_residual_starts_at_the_size_of_the_encoders_outputs():
    torch.manual_seed(0)
    sizes = dict(vocab_size=500, hidden_size=256, embedding_width=300, tie_word_embeddings=True)
    model = SparseGPT(shape(**sizes))
    model.borrow_(torch.randn(500, 300) * 7 + 2)
    z = model.residuals(torch.arange(500)[None])[0].detach()
    assert z.std() == pytest.approx(0.3, rel=0.05) and abs(z.mean()) < 0.01
    other = model.lm_head.map.weight.detach()
    assert other.std() == pytest.approx(0.02, rel=0.05)  # like other matrices


def test_origin_and_scale_of_the_rows_do_not_matter_and_their_angles_do():
    one, other, turned = (borrowing(True) for _ in range(3))
    other.borrow_(7 * rows() + torch.arange(BORROWED))
    torch.testing.assert_close(other(IDS).logits, one(IDS).logits)
    turned.borrow_(rows(1))
    assert not torch.allclose(turned(IDS).logits, one(IDS).logits, atol=1e-2)
    lengths = normed_table(rows()).norm(dim=-1)
    assert lengths.square().mean().sqrt() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_maps_are_trained_and_projected_as_embeddings_are(tied):
    model = borrowing(tied)
    names = {n for n, _ in model.named_parameters()}
    maps = {"model.wte.map.weight", "lm_head.map.weight"}
    assert maps <= names and not {n for n in names if "table" in n or "own" in n}
    assert maps <= decayed_names(model)
    plan = {b.name: b for b in budgets(model, SparsityConfig(density=0.1, embedding_density=0.5))}
    kept = {name: plan[name].keep((0.1, 0.5)) for name in maps}
    assert kept == dict.fromkeys(maps, WIDTH * BORROWED // 2)
    model(IDS, labels=IDS).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in maps)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_saved_model_holds_its_tables(tmp_path, tied, sparse):
    model = borrowing(tied)
    model.save_pretrained(tmp_path, sparse=sparse)
    again = SparseGPT.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.fingerprint() == model.fingerprint()
    again.borrow_(*([rows(5)] if tied else [rows(), rows(5)]))
    assert again.fingerprint() != model.fingerprint()


def test_tables_that_are_tied_stay_one_after_a_move():
    model = borrowing(True).double()
    assert model.lm_head.table is model.model.wte.table
    assert model.lm_head.table.dtype == torch.float64
    assert [n for n, _ in model.named_buffers()] == ["model.wte.table"]


@pytest.mark.parametrize("tables", [(rows()[:, 1:],), (rows()[1:],), (rows(), rows(1))])
def test_rows_that_do_not_fit_are_refused(tables):
    model = borrowing(True)
    before = model.fingerprint()
    with pytest.raises(ValueError, match=r"borrow_: got .* asks for one of \(50, 24\)"):
        model.borrow_(*tables)
    assert model.fingerprint() == before
    with pytest.raises(ValueError, match=r"asks for two of \(50, 0\)"):
        SparseGPT(shape()).borrow_(rows())
    with pytest.raises(ValueError, match="embedding_width=-1 must be an integer, 0 or more"):
        shape(embedding_width=-1)


def test_what_has_no_place_for_the_tables_says_so(tmp_path):
    model = borrowing(True)
    with pytest.raises(ValueError, match="the borrowed embeddings"):
        model.resize_token_embeddings(V + 1)
    with pytest.raises(ValueError, match="embedding_width"):
        release.save_model(model, tmp_path)
