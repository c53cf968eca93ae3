import pytest
import torch

from dense import DenseModel, SiteError


@pytest.fixture(params=["gpt2", "gemma2", "bloom", "qwen3_moe", "gpt_neox"])
def dense(request, opened) -> DenseModel:
    return opened(request.param)


def noisy(h, seed=3):
    g = torch.Generator().manual_seed(seed)
    return h + h.square().mean().sqrt() * torch.randn(h.shape, generator=g)


def groups(dense, ids):
    """Rows for every site: one or two sequences each, all different, all with moved residuals."""
    entries, own, masks = {}, {}, {}
    for s in range(dense.n_sites):
        own[s] = (ids[: 1 + s % 2] + 7 * s) % dense.vocab_size
        masks[s] = torch.ones_like(own[s])
        if s % 3 == 1:
            masks[s][0, :4] = 0
        if s % 3 == 2:
            masks[s][-1, 7:] = 0
        entries[s] = noisy(dense.residuals(own[s], masks[s])[s], s)
    return entries, own, masks


def test_rows_that_join_one_pass_answer_as_they_do_alone(dense, ids):
    entries, own, masks = groups(dense, ids)
    for mask in (None, masks):
        final = dense.joined(entries, own, mask)
        assert list(final) == sorted(entries)
        for s, h in entries.items():
            m = None if mask is None else mask[s]
            seen = torch.ones_like(own[s], dtype=torch.bool) if m is None else m.bool()
            got, want = dense.unembed(final[s], own[s]), dense.resume(s, h, own[s], m)
            # other batches, other order of summation; experts and masks choose kernels by batch
            torch.testing.assert_close(got[seen], want[seen], atol=2e-6, rtol=1e-5)
            assert (want - dense.logits(own[s], m))[seen].norm() > 0.1 * want[seen].norm()


def test_every_block_runs_once_on_the_rows_that_have_entered(dense, ids):
    assert dense.apart_because is None
    entries, own, _ = groups(dense, ids)
    seen = []
    for k, block in enumerate(dense.layout.blocks):
        for part in dense.layout.halves[k] if dense.has_mid else (block,):
            part.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    try:
        dense.joined(entries, own)
    finally:
        for part in [*dense.layout.blocks, *(h for pair in dense.layout.halves for h in pair)]:
            part._forward_pre_hooks.clear()
    sizes = [len(entries[s]) for s in range(dense.n_sites)]
    assert seen == [sum(sizes[: s + 1]) for s in range(dense.n_sites - 1)]


def test_gradients_reach_every_entry_as_they_do_in_separate_passes(dense, ids):
    entries, own, _ = groups(dense, ids)
    g = torch.Generator().manual_seed(5)
    towards = {s: torch.randn(*own[s].shape, dense.vocab_size, generator=g) for s in entries}
    a = {s: h.detach().requires_grad_() for s, h in entries.items()}
    final = dense.joined(a, own)
    sum((dense.unembed(final[s], own[s]) * towards[s]).sum() for s in a).backward()
    for s, h in entries.items():
        b = h.detach().requires_grad_()
        (dense.resume(s, b, own[s]) * towards[s]).sum().backward()
        # sums over rows in another order
        torch.testing.assert_close(a[s].grad, b.grad, atol=1e-5, rtol=1e-4)
        assert b.grad.norm() > 0


def test_logits_in_chunks_of_tokens_are_those_of_the_whole(dense, ids):
    h, want = dense.residuals_and_logits(ids)
    assert torch.equal(dense.unembed(h[-1], ids), want)
    parts = [dense.unembed(h[-1][:, a : a + 3], ids[:, a : a + 3]) for a in range(0, 10, 3)]
    # chunks sum in another order
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(dense.unembed(h[-1][2, 4], ids[2, 4]), want[2, 4])


def counted(model):
    """A llama that tells its blocks how many rows there are: a number cannot be cut."""

    class Counting(type(model.model)):
        def forward(self, input_ids, **kwargs):
            return super().forward(input_ids, n_rows=len(input_ids), **kwargs)

    class Told(type(model.model.layers[0])):
        def forward(self, h, n_rows, **kwargs):
            assert n_rows == len(h)
            return super().forward(h, **kwargs)

    model.model.__class__ = Counting
    for block in model.model.layers:
        block.__class__ = Told
    return model


def test_a_model_whose_arguments_cannot_be_cut_takes_a_pass_per_site_and_says_so(make, ids):
    dense, plain = DenseModel(counted(make("llama"))), DenseModel(make("llama"))
    assert dense.apart_because == "'n_rows' of block 0 (int) is no tensor and differs with the rows"
    entries, own, masks = groups(plain, ids)
    got, want = dense.joined(entries, own, masks), plain.joined(entries, own, masks)
    for s in entries:
        torch.testing.assert_close(got[s], want[s], atol=2e-6, rtol=1e-5)


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused(make):
    class Mixing(torch.nn.Module):
        def forward(self, x):
            return x + 0.1 * x.mean(0)

    model = make("gpt2")
    model.transformer.h[1].mlp.dropout = Mixing()
    with pytest.raises(SiteError, match="by another way than the residual"):
        DenseModel(model)


def test_rows_that_do_not_fit_are_refused(opened, ids):
    dense = opened("gpt2")
    h = dense.residuals(ids)
    for entries, own, why in (
        ({7: h[0]}, {7: ids}, r"sites 0\.\.6"),
        ({1: h[1]}, {}, "site 1 come without ids"),
        ({1: h[1][:2]}, {1: ids}, "residual of gpt2 for these ids"),
        ({1: h[1], 2: h[2][:, :4]}, {1: ids, 2: ids[:, :4]}, "one number of positions"),
    ):
        with pytest.raises(ValueError, match=why):
            dense.joined(entries, own)
    assert dense.joined({}, {}) == {}
    with pytest.raises(ValueError, match="without ids or attention_mask"):
        dense.joined({1: h[1]}, {1: ids}, {})
    with pytest.raises(ValueError, match="residual of gpt2 for these ids"):
        dense.unembed(h[6][..., :-1], ids)
