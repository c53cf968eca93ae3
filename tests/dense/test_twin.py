import pytest
import torch
from torch import nn

from dense.twin import deep_twin, forwarding, replaced, silent, site_block, transplanted, twin


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))


def test_a_twin_computes_the_same_with_the_same_weights():
    original, x = net(), torch.randn(2, 4)
    t = twin(original)
    assert torch.equal(t(x), original(x)) and t is not original
    assert [id(p) for p in t.parameters()] == [id(p) for p in original.parameters()]
    original[0].weight.data.zero_()
    assert torch.equal(t(x), original(x))


def test_replacing_in_a_twin_leaves_the_original_alone():
    original, x = net(), torch.randn(2, 4)
    before, children = original(x), dict(original.named_modules())
    t = replaced(original, {"1.0": nn.Identity(), "0": nn.Identity()})
    assert torch.equal(t(x), original[1][1](x))
    assert torch.equal(original(x), before) and dict(original.named_modules()) == children
    with pytest.raises(AttributeError):
        replaced(original, {"7.0": nn.Identity()})


def test_hooks_and_wrapped_forwards_of_the_original_stay_with_it():
    original, x = net(), torch.randn(2, 4)
    clean = original(x)
    original.register_forward_hook(lambda m, a, out: out * 0)
    assert torch.equal(twin(original)(x), clean) and not original(x).any()
    original.forward = lambda x: x + 100
    assert torch.equal(twin(original)(x), clean)


def test_hooks_on_a_deep_twin_reach_nothing_of_the_original_and_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    original, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(2, 4)
    clean, t = original(x), deep_twin(original)
    assert t[0] is t[2] and t[0] is not shared and t[0].weight is shared.weight
    t[0].register_forward_hook(lambda m, a, out: out * 0)
    assert torch.equal(original(x), clean) and not t(x).any()


def test_a_forwarding_twin_keeps_the_attributes_that_a_loop_may_read():
    original = net()
    original.attention_type = "sliding"
    t = forwarding(original, lambda x: x + 1)
    assert t.attention_type == "sliding" and torch.equal(t(torch.ones(4)), torch.full((4,), 2.0))


def test_silence_is_zero_or_the_argument_named_in_the_dtype_of_its_input():
    x, r = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 3, 4)
    child, out = nn.Linear(8, 4), torch.ones(2, 3, 4)
    assert torch.equal(silent(child, out)(x), torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert silent(child, (out, out, None))(hidden_states=x)[1:] == (None, None)
    assert silent(child, [out, None])(x)[1:] == [None]
    assert silent(child, out, through=1)(x, r) is r
    assert silent(child, (out, None), through="residual")(x, residual=r)[0] is r


def test_a_silent_child_keeps_the_weights_and_attributes_that_its_block_may_read():
    child = nn.Linear(8, 4)
    quiet = silent(child, torch.ones(4))
    assert quiet.weight is child.weight and quiet.out_features == 4
    assert child(torch.ones(8)).any() and not quiet(torch.ones(8)).any()


def test_what_was_replaced_moves_onto_another_twin():
    original, x = net(), torch.randn(2, 4)
    part = twin(original, {"0": nn.Identity()})
    onto = deep_twin(original)
    moved = transplanted(part, original, onto)
    assert torch.equal(moved(x), part(x)) and moved[1] is onto[1]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states):
        h = hidden_states + self.attn(hidden_states)
        return h + self.mlp(h), "weights"


def test_a_site_block_is_its_block_with_the_stream_in_the_open():
    block, x = Block(), torch.randn(2, 3, 4)
    halves = (
        twin(block, {"mlp": silent(block.mlp, x)}),
        twin(block, {"attn": silent(block.attn, x)}),
    )
    for pair, names in ((halves, {"resid_pre", "resid_mid"}), ((), {"resid_pre"})):
        sites = site_block(block, pair, last=True)
        assert set(sites._modules) == {"attn", "mlp", "resid_post"} | names
        out = sites(hidden_states=x)
        assert torch.equal(out[0], block(x)[0]) and out[1] == "weights"
        assert isinstance(sites, Block)
