"""Interventions of a circuit composed with traces of one's own, in generation, with gradients.

The oracle runs the sparse model with plain hooks and adds the decoded difference by a hook on a
block of the original dense model (a GPT-2): no twin, no nnsight.
"""

import copy
import gc
from contextlib import ExitStack

import pytest
import torch
from torch.nn.functional import pad

from bridges import DenseCircuit
from bridges.transfer.intervention import Ablation, Steering
from dense import DenseModel, apply_edits, editing, generate_edited, trace_model
from sparse.circuits.graph import Node

SOME = {"0.attn.v": (1, 6), "0.mlp.post_act": (0, 3, 7), "1.attn.resid_delta": (2,)}
GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
STEPS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def spoken(dense):
    """The dense model with a tokenizer that pads, so that invokes may differ in length."""
    tokenizer = copy.deepcopy(dense.tokenizer)
    tokenizer.pad_token = "[UNK]"
    return DenseModel(dense.model, tokenizer)


@pytest.fixture
def mapped(spoken, sparse, bridges, circuit_of):
    circuit = circuit_of(sparse, SOME)
    return DenseCircuit(circuit=circuit, sparse=sparse, bridges=bridges, dense=spoken, site=2)


@pytest.fixture
def other(ids):
    return ids.roll(1, dims=0)


def change(mapped, ids, values):
    """sigma D (z' - z) at site 2, with `values` put on the nodes of SOME by hooks."""
    sparse, i = mapped.sparse, mapped.bridges.index(2)
    clean = sparse.residuals(ids)[2]
    with ExitStack() as stack:
        for at, indices in SOME.items():

            def put(_m, _a, x, at=at, chosen=indices):
                x = x.clone()
                x[..., list(chosen)] = values[at][..., list(chosen)]
                return x

            stack.callback(sparse.node(at).register_forward_hook(put).remove)
        changed = sparse.residuals(ids)[2]
    return mapped.bridges.scale[i] * (changed - clean) @ mapped.bridges.decoders[i].weight.T


def values_on(sparse, ids):
    seen = {}
    with ExitStack() as stack:
        for at in SOME:
            hook = lambda _m, _a, x, at=at: seen.__setitem__(at, x)  # noqa: E731
            stack.callback(sparse.node(at).register_forward_hook(hook).remove)
        sparse.residuals(ids)
    return seen


def hooked(dense, ids, delta):
    """Dense logits with `delta` added at site 2, before the second block of the original."""
    block = dense.model.transformer.h[1]
    handle = block.register_forward_pre_hook(lambda _m, args: (args[0] + delta, *args[1:]))
    try:
        return dense.model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()


def calls(mapped, ids, other):
    """(edits, logits) of every kind of intervention."""
    read = [Node("1.attn.act_in", 3)]
    yield mapped.edits_of(Ablation(), ids, strength=0.7), mapped.ablate(ids, strength=0.7)
    yield mapped.live_ablation(kind="zero"), mapped.ablate(ids, kind="zero")
    yield mapped.edits_of(Steering(other), ids), mapped.steer(ids, other)
    yield (
        mapped.edits_of(Steering(other, read, "read"), ids),
        mapped.steer(ids, other, read, mode="read"),
    )
    yield mapped.edits_of(Steering(other), ids, site=4), mapped.interchange(ids, other, site=4)


@torch.no_grad()
def test_every_call_can_be_entered_inside_a_trace_of_ones_own_and_around_it(mapped, ids, other):
    lm, dense, path = trace_model(mapped.dense), mapped.dense, mapped.dense.site_path(4)
    for edits, want in calls(mapped, ids, other):
        with lm.trace(**dense.inputs(ids)):
            start = lm.get(dense.site_path(0)).output.clone().save()
            apply_edits(lm, dense, edits, ids=ids)
            inside = lm.output.logits.save()
        with editing(lm, dense, edits) as edited:
            with edited.trace(**dense.inputs(ids)):
                late = edited.get(path).output.clone().save()
                around = edited.output.logits.save()
        assert torch.equal(inside, want) and torch.equal(around, want)
        assert torch.equal(start, dense.residuals(ids)[0])
        assert torch.equal(dense.unembed(late, ids), dense.resume(4, late, ids))
        assert (want - dense.logits(ids)).abs().max() > 1e-3
    with lm.trace(**dense.inputs(ids)):  # made inside the body, and composed with another
        apply_edits(lm, dense, mapped.edits_of(Ablation(), ids, site=1))
        apply_edits(lm, dense, mapped.edits_of(Steering(other), ids, site=4))
        composed = lm.output.logits.save()
    both = mapped.edits_of(Ablation(), ids, site=1) + mapped.edits_of(Steering(other), ids, site=4)
    with editing(lm, dense, both) as edited:
        with edited.trace(**dense.inputs(ids)):
            want = edited.output.logits.save()
    assert torch.equal(composed, want)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_moved_as_it_is_alone(mapped, ids, other, side):
    gap = (2, 0) if side == "left" else (0, 2)
    rows = [(ids[0], other[0]), (ids[1, :4], other[1, :4])]

    def together(which):
        return torch.stack([rows[0][which], pad(rows[1][which], gap)])

    mask = torch.stack([torch.ones(6), pad(torch.ones(4), gap)]).long()
    x, y = together(0), together(1)
    read = [Node("1.attn.act_in", 3)]
    for call in (
        lambda a, b, m: mapped.ablate(a, attention_mask=m),
        lambda a, b, m: mapped.steer(a, b, attention_mask=m),
        lambda a, b, m: mapped.steer(a, b, read, mode="read", attention_mask=m),
        lambda a, b, m: mapped.interchange(a, b, attention_mask=m),
    ):
        got = call(x, y, mask)
        for i, (a, b) in enumerate(rows):
            alone = call(a[None], b[None], None)[0]
            assert (got[i][mask[i].bool()] - alone).abs().max() < 1e-4
    assert (mapped.delta(Ablation(), x, attention_mask=mask)[mask == 0] == 0).all()


@torch.no_grad()
def test_prompts_of_unequal_length_are_moved_each_in_its_invoke(mapped, ids, other):
    dense, lm = mapped.dense, trace_model(mapped.dense)
    a, b, c = ids[:1, :3], ids[1:2], ids[2:3, :5]
    text = [dense.tokenizer.decode(x[0]) for x in (a, b, c)]
    with lm.trace() as tracer:
        with tracer.invoke(text[0]):
            apply_edits(lm, dense, mapped.edits_of(Ablation(), a))
            at_a = lm.output.logits.save()
        with tracer.invoke(text[1]):
            plain = lm.output.logits.save()
        with tracer.invoke(text[2]):
            apply_edits(lm, dense, mapped.edits_of(Steering(other[2:3, :5]), c, strength=2.0))
            at_c = lm.output.logits.save()
    assert (at_a[:, -3:] - mapped.ablate(a)).abs().max() < 1e-4
    assert (plain - dense.logits(b)).abs().max() < 1e-4
    want = mapped.steer(c, other[2:3, :5], strength=2.0)
    assert (at_c[:, -5:] - want).abs().max() < 1e-4
    delta = change(mapped, a, mapped.circuit.ablation)
    assert (at_a[:, -3:] - hooked(dense, a, delta)).abs().max() < 1e-4


@torch.no_grad()
def test_a_live_ablation_holds_the_nodes_at_every_generated_position(mapped, ids):
    prompt, values = ids[:, :4], mapped.circuit.ablation
    seen, logits, static = prompt, [], []
    fixed = change(mapped, prompt, values)
    for _ in range(4):
        logits.append(hooked(mapped.dense, seen, change(mapped, seen, values))[:, -1])
        static.append(hooked(mapped.dense, seen, pad(fixed, (0, 0, 0, seen.shape[1] - 4)))[:, -1])
        seen = torch.cat([seen, logits[-1].argmax(-1, keepdim=True)], -1)
    live = mapped.live_ablation()
    for cached in (True, False):
        out = generate_edited(mapped.dense, prompt, live, use_cache=cached, **GREEDY, **STEPS)
        assert torch.equal(out.sequences, seen)
        assert (torch.stack(out.logits) - torch.stack(logits)).abs().max() < 1e-3
    # control: what was computed for the prompt alone is another thing at new positions
    assert (torch.stack(static[1:]) - torch.stack(logits[1:])).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 1])
def test_a_steering_holds_at_the_prompt_and_leaves_new_positions_alone(mapped, ids, other, length):
    prompt, source = ids[:, :length], other[:, :length]
    delta = 2 * change(mapped, prompt, values_on(mapped.sparse, source))
    seen, logits = prompt, []
    for _ in range(4):
        padded = pad(delta, (0, 0, 0, seen.shape[1] - length))
        logits.append(hooked(mapped.dense, seen, padded)[:, -1])
        seen = torch.cat([seen, logits[-1].argmax(-1, keepdim=True)], -1)
    edits = mapped.edits_of(Steering(source), prompt, strength=2.0)
    for cached in (True, False):
        out = generate_edited(mapped.dense, prompt, edits, use_cache=cached, **GREEDY, **STEPS)
        assert torch.equal(out.sequences, seen)
        assert (torch.stack(out.logits) - torch.stack(logits)).abs().max() < 1e-3


@torch.no_grad()
def test_padded_prompts_generate_under_a_live_ablation_as_each_does_alone(mapped, ids):
    rows = [ids[0], ids[1, :3]]
    x = torch.stack([rows[0], pad(rows[1], (3, 0))])
    mask = torch.stack([torch.ones(6), pad(torch.ones(3), (3, 0))]).long()
    got = generate_edited(mapped.dense, x, mapped.live_ablation(), mask, **GREEDY, **STEPS)
    for i, row in enumerate(rows):
        edits = mapped.live_ablation()
        alone = generate_edited(mapped.dense, row[None], edits, **GREEDY, **STEPS)
        assert torch.equal(got.sequences[i, 6:], alone.sequences[0, len(row) :])
        gap = torch.stack(got.logits)[:, i] - torch.stack(alone.logits)[:, 0]
        assert gap.abs().max() < 1e-3


def test_gradients_reach_the_strength_and_the_change_of_the_sparse_stream(mapped, ids, other):
    mapped.sparse.requires_grad_(False), mapped.bridges.requires_grad_(False)

    def slope(run, x):
        x = x.clone().requires_grad_()
        run(x)[:, -1].logsumexp(-1).sum().backward()
        return x.grad

    delta = change(mapped, ids, values_on(mapped.sparse, other))
    want = slope(lambda w: hooked(mapped.dense, ids, w * delta), torch.tensor(0.5))
    got = slope(lambda w: mapped.steer(ids, other, strength=w), torch.tensor(0.5))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert want.abs() > 1e-4
    scale, weight = mapped.bridges.scale[2], mapped.bridges.decoders[2].weight
    dz = torch.randn(*ids.shape, 20, generator=torch.Generator().manual_seed(9))
    want = slope(lambda d: hooked(mapped.dense, ids, scale * d @ weight.T), dz)

    def by_trace(d):
        lm = trace_model(mapped.dense)
        with lm.trace(**mapped.dense.inputs(ids)):
            apply_edits(lm, mapped.dense, mapped.transport_edits(d))
            logits = lm.output.logits.save()
        return logits

    torch.testing.assert_close(slope(by_trace, dz), want, rtol=1e-3, atol=1e-5)
    assert want.norm() > 1e-3


@torch.no_grad()
def test_choosing_a_site_runs_the_sparse_model_three_times(mapped):
    runs = []
    handle = mapped.sparse.model.blocks[0].mlp.register_forward_hook(lambda *a: runs.append(1))
    chosen = mapped.choose_site()
    handle.remove()
    assert len(runs) == 3 and set(chosen.site_effects) == {1, 2, 3, 4}


@torch.no_grad()
def test_interventions_leave_no_tensor_behind(mapped, ids, other):
    def alive():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    def grown(times, kept):
        before = alive()
        for i in range(times):
            y = mapped.steer(ids, other) if i % 2 else mapped.ablate(ids)
            if kept is not None:
                kept.append(y)
            del y
        return alive() - before

    grown(3, None)
    assert grown(30, None) == 0
    assert grown(3, leak := []) == len(leak) == 3  # control


def test_a_mapped_circuit_shows_itself_in_a_line(mapped):
    want = "DenseCircuit('opening', 6 nodes, in gpt2 at site 2 of 0..4)"
    assert repr(mapped) == want
