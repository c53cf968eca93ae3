import pytest
import torch

from sparse.circuits.taps import edited, recorded

IDS = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))


def n_hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_what_is_recorded_is_the_output_of_the_module_at_every_location(small):
    seen = {}
    for at in small.node_widths():
        small.node(at).register_forward_hook(lambda _m, _a, x, at=at: seen.__setitem__(at, x))
    with recorded(small) as values:
        small(IDS)
    assert list(values) == list(small.node_widths())
    for at, width in small.node_widths().items():
        assert torch.equal(values[at], seen[at]) and values[at].shape == (3, 8, width)
        # after AbsTopK: no more entries than it keeps
        assert (values[at].count_nonzero(-1) <= small.node(at).k).all()


def test_writes_are_what_the_residual_stream_gains(small):
    with recorded(small) as values:
        z = small.residuals(IDS)
    for s, at in enumerate(a for a in small.node_widths() if a.endswith("resid_delta")):
        assert torch.equal(z[s] + values[at], z[s + 1])


def test_an_edit_replaces_the_value_for_everything_downstream_and_nothing_upstream(small):
    at = "0.mlp.post_act"
    with recorded(small) as before:
        clean = small(IDS).logits
    with edited(small, {at: lambda x: 2 * x}), recorded(small) as after:
        moved = small(IDS).logits
    assert torch.equal(after[at], 2 * before[at])
    place = list(before).index(at)
    for i, name in enumerate(before):
        assert torch.equal(before[name], after[name]) == (i < place), name
    assert not torch.equal(moved, clean)
    assert torch.equal(small(IDS).logits, clean)  # nothing stays behind


def test_recording_inside_an_edit_sees_it_and_outside_does_not(small):
    at = "1.attn.q"
    with recorded(small, [at]) as outer, edited(small, {at: torch.zeros_like}):
        with recorded(small, [at]) as inner:
            small(IDS)
    assert (inner[at] == 0).all() and (outer[at] != 0).any()
    assert list(inner) == [at]


def test_edits_at_one_location_act_in_the_order_in_which_they_were_opened(small):
    at = "0.attn.v"
    with recorded(small, [at]) as values:
        small(IDS)
    with edited(small, {at: lambda x: x + 1}), edited(small, {at: lambda x: 3 * x}):
        with recorded(small, [at]) as both:
            small(IDS)
    assert torch.equal(both[at], 3 * (values[at] + 1))


def test_gradients_flow_to_and_through_edits(small):
    bump = torch.zeros(16, requires_grad=True)
    with edited(small, {"0.attn.act_in": lambda x: x + bump}), recorded(small) as values:
        small(IDS).logits.square().sum().backward()
    assert (bump.grad != 0).any() and values["1.mlp.act_in"].requires_grad


def test_hooks_leave_with_the_context_even_after_an_error(small):
    before = n_hooks(small)
    with pytest.raises(ZeroDivisionError):
        with edited(small, {"0.attn.q": lambda x: x}), recorded(small):
            assert n_hooks(small) == before + 17
            raise ZeroDivisionError
    with pytest.raises(ValueError, match="no node location '7.attn.q'"):
        with edited(small, {"0.attn.q": lambda x: x, "7.attn.q": lambda x: x}):
            pass
    assert n_hooks(small) == before
