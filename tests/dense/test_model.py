import pytest
import torch
import transformers as tf

from dense import DenseModel, SiteError, run_edited, tiny, trace_model
from dense.outlying import outlying_tokens


def noisy(h, seed=3):
    g = torch.Generator().manual_seed(seed)
    return h + h.square().mean().sqrt() * torch.randn(h.shape, generator=g)


def test_resuming_anywhere_is_the_whole_model_bit_for_bit(dense, ids):
    want = dense.model(input_ids=ids, use_cache=False).logits
    h, y = dense.residuals_and_logits(ids)
    assert torch.equal(y, want) and torch.equal(dense.logits(ids), want)
    assert len(h) == dense.n_sites
    for site in range(dense.n_sites):
        assert torch.equal(dense.resume(site, h[site], ids), want)


def test_resuming_from_another_residual_is_what_a_hook_on_the_original_does(dense, ids, hooked):
    clean = dense.logits(ids)
    for site, h in enumerate(dense.residuals(ids)):
        moved = noisy(h)
        want = hooked(dense, site, moved, ids)
        assert torch.equal(dense.resume(site, moved, ids), want)
        assert (want - clean).norm() > 0.1 * clean.norm()  # control: the site matters


def test_residuals_are_what_the_blocks_receive_and_return(dense, ids):
    seen = []
    blocks = dense.layout.blocks
    handles = [b.register_forward_pre_hook(lambda m, a: seen.append(a[0])) for b in blocks]
    dense.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    between = dense.residuals(ids)[:: 2 if dense.has_mid else 1]
    assert all(torch.equal(a, b) for a, b in zip(between[:-1], seen, strict=True))


def test_the_mid_residual_lies_between_attention_and_mlp(sequential, ids, by_hand):
    h = sequential.residuals(ids)
    for k in range(sequential.n_layers):
        assert torch.equal(by_hand(sequential, k, h[2 * k + 1]), h[2 * k + 2])
        assert not torch.equal(h[2 * k + 1], h[2 * k])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_answers_as_it_does_alone(dense, ids, side):
    n = 6
    real = slice(10 - n, 10) if side == "left" else slice(0, n)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1
    h, y = dense.residuals_and_logits(ids, mask)
    alone, y_alone = dense.residuals_and_logits(ids[1:2, real])
    # other shapes, other order of summation in the kernels: 1e-5 of logits of order 1
    torch.testing.assert_close(y[1, real], y_alone[0], atol=1e-5, rtol=1e-5)
    for site in range(dense.n_sites):
        torch.testing.assert_close(h[site][1, real], alone[site][0], atol=1e-5, rtol=1e-5)
        resumed = dense.resume(site, h[site], ids, mask)
        torch.testing.assert_close(resumed[:, real], y[:, real], atol=0, rtol=0)


@torch.no_grad()
def test_a_model_of_few_positions_is_opened_and_proven_as_any_other():
    torch.manual_seed(0)
    shape = dict(vocab_size=30, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    short = DenseModel(tf.GPT2LMHeadModel(tf.GPT2Config(n_positions=8, **shape)))
    assert short.n_sites == 3 and short.pads_left
    ids, mask = torch.arange(16).view(2, 8), torch.ones(2, 8)
    mask[0, :3] = 0
    alone = short.logits(ids[:1, 3:])[0]
    torch.testing.assert_close(short.logits(ids, mask)[0, 3:], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="ids have 9 positions, but gpt2 was built for at most 8"):
        short.logits(torch.zeros(1, 9, dtype=torch.long))


def test_control_without_the_mask_padding_changes_the_answer(opened, ids):
    dense = opened("llama")
    gap = dense.logits(ids)[1, 4:] - dense.logits(ids[1:2, 4:])[0]
    assert gap.abs().max() > 1e-3


def test_the_gradient_is_that_of_autograd_through_the_original(dense, ids, hooked):
    g = torch.Generator().manual_seed(4)
    towards = torch.randn(*ids.shape, dense.vocab_size, generator=g)
    for site, h in enumerate(dense.residuals(ids)):
        a, b = (noisy(h).requires_grad_() for _ in range(2))
        (want,) = torch.autograd.grad((hooked(dense, site, a, ids) * towards).sum(), a)
        (got,) = torch.autograd.grad((dense.resume(site, b, ids) * towards).sum(), b)
        # the mid of some families accumulates two branches in another order
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert want.norm() > 0


class Forbidden(Exception):
    pass


def forbid(modules):
    def refuse(module, args):
        raise Forbidden(type(module).__name__)

    return [m.register_forward_pre_hook(refuse) for m in modules]


def test_resuming_calls_nothing_before_its_site(dense, ids):
    h = dense.residuals(ids)
    for site in range(dense.n_sites):
        k, mid = divmod(site, 2) if dense.has_mid else (site, 0)
        early = [dense.model.get_input_embeddings()]
        early += [m for b in dense.layout.blocks[:k] for m in b.modules() if m is not b]
        if mid:
            own = dict(dense.layout.blocks[k].named_children())
            attention = next(n for n in own if "att" in n and "norm" not in n)
            early += list(own[attention].modules())
            early.append(next(m for n, m in own.items() if "norm" in n or n.startswith("ln_")))
            if dense.model_type == "opt":
                early.remove(early[-1])
                early.append(own["self_attn_layer_norm"])
        handles = forbid(early)
        try:
            dense.resume(site, h[site], ids)
            if site:  # control: from one site earlier something forbidden is needed
                with pytest.raises(Forbidden):
                    dense.resume(site - 1, h[site - 1], ids)
        finally:
            for handle in handles:
                handle.remove()


def snapshot(model):
    """Every module: identity, attributes, hooks, children."""
    return {
        name: (id(m), sorted(m.__dict__), [len(v) for k, v in m.__dict__.items() if "hooks" in k])
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_the_original_is_left_as_it_was(make, family, ids):
    model = make(family)
    before, weights = snapshot(model), [p.clone() for p in model.parameters()]
    dense = DenseModel(model)
    h = dense.residuals(ids)
    dense.resume(1, h[1], ids)
    dense.hookable()(ids)
    trace_model(dense)
    run_edited(dense, ids, [])
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_model_in_train_mode_with_dropout_keeps_its_mid_sites(make):
    model = make("gpt2").train()
    assert model.transformer.h[0].mlp.dropout.p > 0
    assert DenseModel(model).n_sites == 7


def test_a_model_put_back_into_train_mode_is_refused(make, ids):
    dense = DenseModel(make("gpt2"))
    dense.model.train()
    with pytest.raises(ValueError, match="train mode"):
        dense.residuals(ids)


def test_a_residual_that_the_model_does_not_have_is_refused(opened, ids):
    dense, neox = opened("gpt2"), opened("gpt_neox")
    h = dense.residuals(ids)[0]
    for site in (-1, 7):
        with pytest.raises(ValueError, match=r"gpt2 has sites 0\.\.6"):
            dense.resume(site, h, ids)
    with pytest.raises(ValueError, match="no mid sites, parallel"):
        neox.resume(4, h, ids)
    for wrong in (h[..., :-1], h[0], h[:, :-1], h[:2]):
        with pytest.raises(ValueError, match="residual of gpt2"):
            dense.resume(0, wrong, ids)


def test_ids_that_the_model_cannot_embed_are_refused(opened, ids):
    dense = opened("gpt2")
    for wrong, why in (
        (ids + 50, "embeds 0..100"),
        (ids - 101, "embeds 0..100"),
        (ids[:, :0], "not empty"),
        (ids.repeat(1, 7), "at most 64"),
    ):
        with pytest.raises(ValueError, match=why):
            dense.residuals(wrong)


def test_what_is_no_causal_language_model_is_refused(make):
    with pytest.raises(SiteError, match="no config"):
        DenseModel(torch.nn.Linear(2, 2))
    with pytest.raises(SiteError, match="AutoModelForCausalLM"):
        DenseModel(make("gpt2").transformer)


def test_the_fingerprint_follows_weights_and_shape_and_nothing_else(make, tmp_path):
    dense = DenseModel(make("gpt2"))
    dense.model.save_pretrained(tmp_path)
    again = DenseModel.from_pretrained(tmp_path)
    assert again.fingerprint == dense.fingerprint == dense.fingerprint
    assert DenseModel(make("gpt2", 1)).fingerprint != dense.fingerprint
    heads = make("gpt2")
    heads.config.n_head = 2
    assert DenseModel(heads).fingerprint != dense.fingerprint
    w = again.model.transformer.h[1].mlp.c_fc.bias.data
    w[3] = torch.nextafter(w[3], torch.tensor(9.0))
    assert again.fingerprint != dense.fingerprint


def test_describe_says_which_sites_there_are_and_why(opened):
    assert "7 residual sites of width 32" in opened("llama").describe()
    for family, why in (("gpt_neox", "in parallel"), ("opt_post", "normalise the stream")):
        assert not opened(family).has_mid
        text = opened(family).describe()
        assert "4 residual sites" in text and why in text


def test_the_hookable_twin_is_the_model_and_its_sites_are_the_residuals(dense, ids):
    twin = dense.hookable()
    seen = {}
    for site in range(dense.n_sites):
        module = twin.get_submodule(dense.site_path(site))
        module.register_forward_hook(lambda m, a, out, s=site: seen.__setitem__(s, out))
    assert torch.equal(twin(ids, use_cache=False).logits, dense.logits(ids))
    for site, h in enumerate(dense.residuals(ids)):
        assert torch.equal(seen[site], h)


def test_a_hook_on_the_twin_moves_it_as_resume_says_and_spares_the_original(dense, ids):
    twin, clean = dense.hookable(), dense.logits(ids)
    for site, h in enumerate(dense.residuals(ids)):
        module = twin.get_submodule(dense.site_path(site))
        handle = module.register_forward_hook(lambda m, a, out, h=h: noisy(h))
        assert torch.equal(twin(ids, use_cache=False).logits, dense.resume(site, noisy(h), ids))
        handle.remove()
    assert torch.equal(dense.logits(ids), clean)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_hookable_twin_generates_with_its_cache_as_the_model_does(opened, ids, family):
    dense = opened(family)
    how = dict(max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(dense.hookable().generate(ids, **how), dense.model.generate(ids, **how))


def test_weights_that_move_or_load_are_seen(make, ids):
    dense = DenseModel(make("llama"))
    dense.model.load_state_dict(make("llama", 1).state_dict())
    h, y = dense.residuals_and_logits(ids)
    assert torch.equal(y, DenseModel(make("llama", 1)).logits(ids))
    assert torch.equal(dense.resume(3, h[3], ids), y)
    dense.model.to(torch.bfloat16)
    h, y = dense.residuals_and_logits(ids)
    assert y.dtype == h[1].dtype == torch.bfloat16
    assert torch.equal(dense.resume(3, h[3], ids), y)


def test_a_half_precision_model_passes_its_proof(make):
    for family in ("gpt2", "gemma2", "gpt_neox"):
        assert isinstance(DenseModel(make(family).to(torch.bfloat16)), DenseModel)


def test_a_saved_folder_opens_under_its_name(make, tmp_path):
    make("qwen3").save_pretrained(tmp_path)
    assert DenseModel.from_pretrained(tmp_path).name == str(tmp_path)
    assert isinstance(DenseModel.from_pretrained(tmp_path).model, tf.Qwen3ForCausalLM)


def test_describe_says_how_many_tokens_are_outlying_and_what_they_carry():
    dense = tiny()
    ids = torch.arange(160).view(4, 40)
    assert "none at any site" in dense.describe(ids)
    with torch.no_grad():
        dense.model.transformer.wpe.weight[0, 3] += 500.0
    sunk = DenseModel(dense.model, dense.tokenizer)
    line = sunk.describe(ids).splitlines()[1]
    assert "at 5 of 5 sites, 0 to 4" in line and "2.5% of the tokens" in line
    (first, *_) = outlying_tokens(sunk, ids)
    h = sunk.residuals(ids)[0].double()
    whole, rest = (x.flatten(0, 1) for x in (h, h[:, 1:]))
    by_hand = 1 - (rest - rest.mean(0)).square().sum() / (whole - whole.mean(0)).square().sum()
    assert first.tokens == 1 / 40 and first.variance == pytest.approx(float(by_hand))
    assert sunk.describe() == repr(sunk)  # control: without tokens it says nothing of them
