import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dense as package
from dense import Edit, apply_edits, run_edited, trace_model


def direction(seed, *shape):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def by_hooks(dense, ids, edits, attention_mask=None):
    """The oracle: plain torch hooks on the hookable twin, the formula written again."""
    twin = dense.hookable()
    for edit in edits:

        def add(module, args, out, e=edit):
            delta = torch.as_tensor(e.amount)[..., None] * e.direction * torch.ones_like(out)
            where = torch.ones(out.shape[1], 1)
            if e.position is not None:
                where = torch.zeros(out.shape[1], 1)
                where[[*e.position] if isinstance(e.position, tuple) else [e.position]] = 1
            return out + delta * where

        twin.get_submodule(dense.site_path(edit.site)).register_forward_hook(add)
    return twin(**dense.inputs(ids, attention_mask)).logits


def some_edits(dense):
    last = dense.n_sites - 1
    return [
        Edit(site=last, direction=direction(0)),
        Edit(site=0, direction=direction(1), amount=-0.3, position=-1),
        Edit(site=1, direction=direction(2, 10), amount=torch.linspace(0, 1, 10)),
        Edit(site=2, direction=direction(3, 3, 1), amount=0.5, position=(0, 4, -2)),
    ]


def test_edits_through_nnsight_are_what_plain_hooks_do(dense, ids):
    edits = some_edits(dense)
    got = run_edited(dense, ids, edits)
    assert torch.equal(got, by_hooks(dense, ids, edits))
    for edit in edits:
        assert torch.equal(run_edited(dense, ids, [edit]), by_hooks(dense, ids, [edit]))
        assert not torch.equal(got, run_edited(dense, ids, [edit]))


def test_an_edit_is_a_resume_from_the_moved_residual(dense, ids):
    for site, h in enumerate(dense.residuals(ids)):
        edit = Edit(site=site, direction=direction(site), amount=0.5)
        moved = h + 0.5 * edit.direction
        assert torch.equal(run_edited(dense, ids, [edit]), dense.resume(site, moved, ids))


def test_no_edits_and_edits_of_amount_zero_are_the_model_bit_for_bit(dense, ids):
    want = dense.model(input_ids=ids, use_cache=False).logits
    silent = [
        Edit(site=s, direction=direction(s), amount=0.0, position=None if s % 2 else (0, 3))
        for s in range(dense.n_sites)
    ]
    assert torch.equal(run_edited(dense, ids, []), want)
    assert torch.equal(run_edited(dense, ids, silent), want)


def test_edits_commute_when_their_sites_differ_and_add_when_they_are_one(sequential, ids):
    a, b = (Edit(site=s, direction=direction(s)) for s in (1, 4))
    both = run_edited(sequential, ids, [a, b])
    assert torch.equal(both, run_edited(sequential, ids, [b, a]))
    assert not torch.equal(both, run_edited(sequential, ids, [a]))
    u, v = direction(5), direction(6)
    apart = [Edit(site=3, direction=u), Edit(site=3, direction=v, amount=2.0)]
    together = [Edit(site=3, direction=u + 2 * v)]
    assert torch.equal(run_edited(sequential, ids, apart), run_edited(sequential, ids, together))


def test_an_edit_and_its_negative_one_site_later_move_only_what_the_sublayer_reads(
    sequential, ids, by_hand
):
    """Oracle: h_post = h_mid + f(h_mid + d), with f(x) = mlp_half(x) - x written by hand."""
    h, d, k = sequential.residuals(ids), 0.5 * direction(0), 1
    there, back = Edit(site=3, direction=d), Edit(site=4, direction=-d)
    read = by_hand(sequential, k, h[3] + d) - d
    want = sequential.resume(4, read, ids)
    got = run_edited(sequential, ids, [there, back])
    assert torch.equal(got, want)
    assert (got - run_edited(sequential, ids, [there])).abs().max() > 1e-3
    assert (got - sequential.logits(ids)).abs().max() > 1e-4


def test_edits_of_padded_batches_move_each_row_as_it_moves_alone(opened, ids):
    dense = opened("llama")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    edit = Edit(site=3, direction=direction(1), position=-1)
    got = run_edited(dense, ids, [edit], mask)
    assert torch.equal(got, by_hooks(dense, ids, [edit], mask))
    alone = run_edited(dense, ids[:1, 4:], [edit])
    torch.testing.assert_close(got[0, 4:], alone[0], atol=1e-5, rtol=1e-5)


def test_gradients_reach_direction_and_amount(opened, ids):
    dense = opened("gpt2")
    u, amount = direction(0).requires_grad_(), torch.tensor(0.1, requires_grad=True)
    run_edited(dense, ids, [Edit(site=1, direction=u, amount=amount)]).square().sum().backward()
    h = dense.residuals(ids)[1]
    v, scale = direction(0).requires_grad_(), torch.tensor(0.1, requires_grad=True)
    dense.resume(1, h + scale * v, ids).square().sum().backward()
    torch.testing.assert_close(u.grad, v.grad)
    torch.testing.assert_close(amount.grad, scale.grad)
    assert u.grad.norm() > 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_edits_enter_the_trace_of_a_user_beside_reads_and_a_gradient(opened, ids, family):
    dense = opened(family)
    edits = [Edit(site=1, direction=direction(1)), Edit(site=2, direction=direction(2))]
    traced = trace_model(dense)
    with traced.trace(**dense.inputs(ids)):
        first = traced.get(dense.site_path(0)).output.clone().save()
        apply_edits(traced, dense, edits)
        late = traced.get(dense.site_path(3)).output
        late.requires_grad_(True)
        read = late.clone().save()
        logits = traced.output.logits.save()
        with logits[:, -1].logsumexp(-1).sum().backward():
            slope = late.grad.save()
    assert torch.equal(first, dense.residuals(ids)[0])
    assert torch.equal(logits, run_edited(dense, ids, edits))
    h = read.detach().requires_grad_()
    dense.resume(3, h, ids)[:, -1].logsumexp(-1).sum().backward()
    torch.testing.assert_close(slope, h.grad)
    assert torch.equal(dense.logits(ids), dense.model(input_ids=ids, use_cache=False).logits)


def test_edits_that_do_not_fit_are_refused_before_anything_runs(opened, ids):
    dense, u = opened("gpt2"), direction(0)
    for edit, why in (
        (Edit(site=7, direction=u), r"sites 0\.\.6"),
        (Edit(site=-1, direction=u), r"sites 0\.\.6"),
        (Edit(site=1, direction=u[:-1]), "width 31, but the residuals of gpt2 have 32"),
    ):
        with pytest.raises(ValueError, match=why):
            run_edited(dense, ids, [edit])
    h = dense.residuals(ids)[0]
    for edit, why in (
        (Edit(site=1, direction=direction(0, 4, 1)), "direction of shape .4, 1, 32. does not"),
        (Edit(site=1, direction=u, amount=torch.ones(3)), "amount of shape .3,. does not"),
        (Edit(site=1, direction=u, position=10), r"positions \[10\] are outside -10\.\.9"),
    ):
        with pytest.raises(ValueError, match=why):
            edit.delta(h)


def test_only_the_edits_import_nnsight_and_only_when_asked():
    for file in Path(package.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {
            name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None), *(a.name for a in node.names)]
        }
        assert ("nnsight" in names) == (file.name == "traced.py"), file.name
    code = "import sys, dense; print({'nnsight', 'transformers'} & sys.modules.keys())"
    here = Path(package.__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert out.stdout.strip() == "set()", out.stderr
