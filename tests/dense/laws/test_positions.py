"""Logits at the positions wanted are those of the whole, and nothing else is unembedded.

f(.., positions=p)[b, i] = f(..)[b, p[b, i]]        for f in logits, resume, run_edited
"""

import pytest
import torch

from dense import Edit, run_edited
from dense.inputs import check_positions

WANTED = torch.tensor([[9, 4, 6], [5, 5, 4], [7, 4, 9]])  # in any order, also twice


def close(got, want):
    # other shapes, other order of summation in the kernels: 1e-5 of logits of order 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def at(logits, positions=WANTED):
    """The oracle: the wanted logits of all, picked one by one."""
    rows = [torch.stack([y[p] for p in ps]) for y, ps in zip(logits, positions, strict=True)]
    return torch.stack(rows)


def noisy(h, seed=3):
    g = torch.Generator().manual_seed(seed)
    return h + h.square().mean().sqrt() * torch.randn(h.shape, generator=g)


def masks(ids):
    """No mask, and one with padding on either side, none of it at the wanted positions."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 6:] = 0
    return None, mask


def edits_of(dense):
    g = torch.Generator().manual_seed(5)
    return [Edit(site=s, direction=torch.randn(32, generator=g)) for s in (1, dense.n_sites - 1)]


def unembedded(dense, run):
    """Number of tokens that pass through the original's head while `run` runs."""
    seen = []
    head = dense.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda m, args: seen.append(args[0][..., 0].numel()))
    try:
        run()
    finally:
        handle.remove()
    return sum(seen)


@torch.no_grad()
def test_the_wanted_logits_are_those_of_all(dense, ids):
    for mask in masks(ids):
        whole = dense.logits(ids, mask)
        close(dense.logits(ids, mask, positions=WANTED), at(whole))
        assert not torch.allclose(at(whole), at(whole.roll(1, 0)), atol=1e-2)  # control: other rows
        assert not torch.allclose(at(whole), at(whole, WANTED.flip(1)), atol=1e-2)  # other places
        for site, h in enumerate(dense.residuals(ids, mask)):
            want = dense.resume(site, noisy(h), ids, mask)
            close(dense.resume(site, noisy(h), ids, mask, positions=WANTED), at(want))
            assert (at(want) - at(whole)).norm() > 0.1 * at(whole).norm()


@torch.no_grad()
def test_the_logits_at_one_position_of_every_row(dense, ids):
    last = torch.tensor([9, 5, 7])
    for mask in masks(ids):
        want = at(dense.logits(ids, mask), last[:, None])[:, 0]
        close(dense.last_logits(ids, last, mask), want)
    cut = ids.clone()
    cut[1, 6:] = cut[2, 8:] = 0  # padding after the position needs no mask
    close(dense.last_logits(cut, last), dense.last_logits(ids, last))
    assert not torch.allclose(dense.last_logits(ids, last), dense.last_logits(ids, last - 1))


@torch.no_grad()
def test_the_wanted_logits_of_an_edited_run_are_those_of_all(dense, ids):
    edits = edits_of(dense)
    for mask in masks(ids):
        whole = run_edited(dense, ids, edits, mask)
        close(run_edited(dense, ids, edits, mask, positions=WANTED), at(whole))
        none = run_edited(dense, ids, [], mask, positions=WANTED)
        assert torch.equal(none, dense.logits(ids, mask, positions=WANTED))
        assert (at(whole) - none).norm() > 0.1 * none.norm()  # control: the edits do something
        for edit in edits:  # nor is one of them left out
            assert not torch.allclose(run_edited(dense, ids, [edit], mask), whole, atol=1e-2)
        again = run_edited(dense, ids, edits, mask)  # a trace that was cut short leaves nothing
        assert torch.equal(again, whole)


def test_gradients_are_those_of_the_wanted_logits_of_all(dense, ids):
    g = torch.Generator().manual_seed(4)
    towards = torch.randn(*WANTED.shape, dense.vocab_size, generator=g)
    for site, h in enumerate(dense.residuals(ids)):
        a, b = (noisy(h).requires_grad_() for _ in range(2))
        (want,) = torch.autograd.grad((at(dense.resume(site, a, ids)) * towards).sum(), a)
        got = dense.resume(site, b, ids, positions=WANTED)
        (got,) = torch.autograd.grad((got * towards).sum(), b)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert want.norm() > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_gradients_reach_an_edit_through_the_wanted_logits(opened, ids, family):
    dense = opened(family)
    slopes = []
    for positions in (None, WANTED):
        u = torch.linspace(-1, 1, 32).requires_grad_()
        amount = torch.tensor(0.3, requires_grad=True)
        edit = Edit(site=1, direction=u, amount=amount)
        y = run_edited(dense, ids, [edit], positions=positions)
        y = at(y) if positions is None else y
        slopes.append(torch.autograd.grad(y.square().sum(), (u, amount)))
    for want, got in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # sums of squares, of order 10
        assert want.norm() > 0


@torch.no_grad()
def test_the_head_runs_on_the_wanted_tokens_only(dense, ids):
    n, h, edits = WANTED.numel(), dense.residuals(ids), edits_of(dense)
    for site in range(dense.n_sites):
        run = lambda s=site: dense.resume(s, h[s], ids, positions=WANTED)  # noqa: E731
        assert unembedded(dense, run) == n
    assert unembedded(dense, lambda: dense.logits(ids, positions=WANTED)) == n
    assert unembedded(dense, lambda: run_edited(dense, ids, edits, positions=WANTED)) == n
    assert unembedded(dense, lambda: dense.residuals(ids)) == 0
    assert unembedded(dense, lambda: dense.joined({1: h[1], 2: h[2]}, {1: ids, 2: ids})) == 0
    assert unembedded(dense, lambda: dense.logits(ids)) == ids.numel()  # control


def test_positions_that_the_ids_do_not_have_are_refused_before_anything_runs(opened, ids):
    dense = opened("gpt2")
    h = dense.residuals(ids)
    for wrong, why in (
        (WANTED + 1, r"range over 5\.\.10, but the ids have 0\.\.9; count from the first column"),
        (WANTED - 10, r"range over -6\.\.-1, but the ids have 0\.\.9"),
    ):
        for run in (
            lambda p: dense.logits(ids, positions=p),
            lambda p: dense.resume(3, h[3], ids, positions=p),
            lambda p: dense.resume(6, h[6], ids, positions=p),
            lambda p: run_edited(dense, ids, edits_of(dense), positions=p),
        ):
            assert unembedded(dense, lambda: refused(run, wrong, why)) == 0  # noqa: B023
    with pytest.raises(ValueError, match=r"range over 10\.\.10"):
        dense.last_logits(ids, torch.full((3,), 10))


def refused(run, wrong, why):
    with pytest.raises(ValueError, match=why):
        run(wrong)


def test_what_is_no_list_of_positions_for_every_row_is_refused(opened, ids):
    for wrong, why in (
        (WANTED[:2], r"\(2, 3\), but 3 rows need \(batch, wanted\) = \(3, 1 or more\)"),
        (WANTED[:, 0], r"one position a row, last, give last\[:, None\]"),
        (WANTED[:, :0], r"\(3, 0\), but 3 rows need"),
        (WANTED.float(), r"torch\.float32, but a position is a whole number"),
        (WANTED > 4, r"torch\.bool, but a position is a whole number"),
    ):
        refused(lambda p: check_positions(p, ids), wrong, why)
    dense = opened("gpt2")
    close(dense.logits(ids, positions=WANTED.int()), at(dense.logits(ids)))
