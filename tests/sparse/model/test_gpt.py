import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sparse.circuits.taps import edited
from sparse.model.blocks import SparseGPTRMSNorm
from sparse.model.config import RESIDUAL_TOPK, TOPK_LOCATIONS, SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.model.trunk import SparseGPTModel
from sparse.ops.abs_topk import abs_topk
from sparse.storage.hub import Source

FIELDS = dict(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=4,
    intermediate_size=20,
    max_position_embeddings=16,
    activation_fraction=0.5,
    initializer_range=0.4,
)
VARIANTS = {
    "plain": dict(attention_sinks=False),
    "sinks": dict(),
    "everything": dict(bigram_table=True, positions="learned", activation="relu"),
    "dense": dict(activation_fraction=1.0),
    "eager": dict(attn_implementation="eager"),
}
BESIDE = dict(positions="concatenated", position_channels=5)
RARE = {  # what only the released format asks for; the oracle is in release/test_model.py
    "beside": BESIDE,
    "beside, sinusoids": BESIDE | dict(position_sinusoids=True, position_channels=6),
    "layer norm": BESIDE | dict(norm="layer", norm_bias=True, linear_bias=False),
    "settled": dict(
        residual_activation="relu", activation_locations=[*TOPK_LOCATIONS, *RESIDUAL_TOPK]
    ),
    "tied": dict(tie_word_embeddings=True, logits_bias=True, dropout=0.3),
    "fixed table": dict(bigram_table=True, bigram_fixed=True, positions="learned"),
}
VARIANTS |= RARE


def build(seed=0, **fields):
    torch.manual_seed(seed)
    model = SparseGPT(SparseGPTConfig(**(FIELDS | fields))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # norms, biases and sinks that do something
                p += 0.3 * torch.randn_like(p)
        for b in (model.bigram, model.logits_bias):
            if b is not None:
                b.normal_()
    return model


def random_ids(n=3, length=9, seed=0):
    return torch.randint(0, 31, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(VARIANTS))
def model(request):
    return build(**VARIANTS[request.param])


def by_hand(model, ids):
    """The forward of docs/method.md#the-sparse-model, written again; one sequence, float64."""
    c, w = model.config, {n: p.double() for n, p in model.named_parameters()}
    act = {"gelu": F.gelu, "relu": F.relu}[c.activation]

    def rms_norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name]

    x = w["model.wte.weight"][ids]
    if c.positions == "learned":
        x = x + w["model.wpe.weight"][: len(ids)]
    streams = [x]
    for i in range(c.num_hidden_layers):
        p = f"model.blocks.{i}."
        u = abs_topk(rms_norm(x, p + "norm_1.weight"), c.k("attn_in"))
        qkv = u @ w[p + "attn.qkv.weight"].T + w[p + "attn.qkv.bias"]
        q, k, v = (
            abs_topk(part, c.k(place)).view(len(ids), c.num_attention_heads, c.head_dim)
            for part, place in zip(qkv.chunk(3, -1), ("attn_q", "attn_k", "attn_v"), strict=True)
        )
        scores = torch.einsum("thc,uhc->htu", q, k) / c.head_dim**0.5
        e = scores.exp().tril()
        sink = w[p + "attn.sinks"].exp() if c.attention_sinks else torch.zeros(q.shape[1])
        a = e / (e.sum(-1, keepdim=True) + sink.view(-1, 1, 1))
        y = torch.einsum("htu,uhc->thc", a, v).flatten(1)
        out = y @ w[p + "attn.out.weight"].T + w[p + "attn.out.bias"]
        x = x + abs_topk(out, c.k("attn_out"))
        streams.append(x)
        u = abs_topk(rms_norm(x, p + "norm_2.weight"), c.k("mlp_in"))
        z = act(u @ w[p + "mlp.fc.weight"].T + w[p + "mlp.fc.bias"])
        z = abs_topk(z, c.k("mlp_neuron"))
        out = z @ w[p + "mlp.proj.weight"].T + w[p + "mlp.proj.bias"]
        x = x + abs_topk(out, c.k("mlp_out"))
        streams.append(x)
    logits = rms_norm(x, "model.norm.weight") @ w["lm_head.weight"].T
    return streams, logits + (w["bigram"][ids] if c.bigram_table else 0)


@torch.no_grad()
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - RARE.keys()))
def test_the_forward_is_the_specified_sequence_of_operations(variant):
    model, ids = build(**VARIANTS[variant]).double(), random_ids()
    logits, streams = model(ids).logits, model.residuals(ids)
    for row, sequence in enumerate(ids):
        want_streams, want = by_hand(model, sequence)
        assert (logits[row] - want).abs().max() < 1e-10
        for got, stream in zip(streams, want_streams, strict=True):
            assert (got[row] - stream).abs().max() < 1e-10


@torch.no_grad()
def test_resuming_anywhere_and_editing_by_the_identity_are_the_whole_model(model):
    ids = random_ids()
    logits = model(ids).logits
    residuals = model.residuals(ids)
    assert len(residuals) == model.n_sites == 5 and residuals[0].shape[-1] == model.d_resid == 12
    for site, z in enumerate(residuals):
        assert torch.equal(model.resume(site, z, ids), logits)
        assert not torch.equal(model.resume(site, 2 * z + 1, ids), logits)  # control
    identity = {at: lambda x: x for at in model.node_widths()}
    with edited(model, identity):
        assert torch.equal(model(ids).logits, logits)
        for got, want in zip(model.residuals(ids), residuals, strict=True):
            assert torch.equal(got, want)


@torch.no_grad()
def test_rows_that_enter_at_every_site_at_once_end_as_they_do_alone(model):
    z, ids = model.residuals(random_ids()), random_ids()
    entries = {s: z[s] * (1 + s) for s in range(model.n_sites)}
    for s, end in model.joined(entries, dict.fromkeys(entries, ids)).items():
        alone = model.resume(s, entries[s], ids)
        assert (model.unembed(end, ids) - alone).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_wanted_logits_are_those_of_all(model, implementation):
    model.set_attn_implementation(implementation)
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 7:] = 0
    wanted = torch.tensor([[8, 4, 5], [6, 6, 1], [0, 8, 2]])  # in any order, also twice
    for given in (None, mask):
        for site, z in enumerate(model.residuals(ids, given)):
            whole = model.resume(site, 2 * z + 1, ids, given)
            want, other = (whole.take_along_dim(p[..., None], 1) for p in (wanted, wanted.flip(1)))
            got = model.resume(site, 2 * z + 1, ids, given, wanted)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(want, other, atol=1e-2)  # control
            assert not torch.allclose(want, want.roll(1, 0), atol=1e-2)
    for got in (
        model.last_logits(ids, wanted[:, 1]),
        model.resume(0, model.residuals(ids)[0], ids, positions=wanted[:, 1:2])[:, 0],
    ):
        want = model(ids).logits[torch.arange(3), wanted[:, 1]]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_wanted_logits_of_all(model):
    ids, wanted = random_ids(3, 9), torch.tensor([[8, 4], [6, 6], [0, 2]])
    for site, z in enumerate(model.residuals(ids)):
        slopes = []
        for positions in (None, wanted):
            h = (2 * z + 1).detach().requires_grad_()
            y = model.resume(site, h, ids, positions=positions)
            y = y.take_along_dim(wanted[..., None], 1) if positions is None else y
            slopes.append(torch.autograd.grad(y.sin().sum(), h)[0])
        torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)  # other order of summation
        assert slopes[0].norm() > 0


@torch.no_grad()
def test_the_last_sublayers_and_the_head_run_on_the_wanted_positions_only():
    model, ids = build(**VARIANTS["everything"]), random_ids(3, 9)
    wanted, seen = torch.tensor([[8, 4], [6, 6], [0, 2]]), {}
    for name in ("model.blocks.1.mlp.fc", "model.blocks.0.mlp.fc", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: args[0][..., 0].numel()})
        )
    for site, z in enumerate(model.residuals(ids)):
        seen.clear()
        model.resume(site, z, ids, positions=wanted)
        assert seen["lm_head"] == 6 and seen.get("model.blocks.1.mlp.fc", 6) == 6
        assert seen.get("model.blocks.0.mlp.fc", 27) == 27
    model.resume(0, model.residuals(ids)[0], ids)
    assert seen["lm_head"] == seen["model.blocks.1.mlp.fc"] == 27  # control


def test_positions_that_the_ids_do_not_have_are_refused():
    model, ids = build(), random_ids(3, 9)
    z, wanted = model.residuals(ids)[2].detach(), torch.tensor([[8], [4], [0]])
    for wrong, why in (
        (wanted + 1, r"range over 1\.\.9, but the ids have 0\.\.8; count from the first column"),
        (wanted - 9, r"range over -9\.\.-1, but the ids have 0\.\.8"),
        (wanted[:, :0], r"\(3, 0\), but 3 rows need whole numbers of shape \(3, 1 or more\)"),
    ):
        with pytest.raises(ValueError, match=why):
            model.resume(2, z, ids, positions=wrong)
    with pytest.raises(ValueError, match="range over 9"):
        model.last_logits(ids, torch.full((3,), 9))


@torch.no_grad()
def test_resuming_computes_nothing_before_the_site():
    model, ids = build(**VARIANTS["everything"]), random_ids()
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    z = model.residuals(ids)
    for site, blocks in enumerate((["0", "1"], ["0", "1"], ["1"], ["1"], [])):
        ran.clear()
        model.resume(site, z[site], ids)
        assert "model.wte" not in ran
        assert sorted({name.split(".")[2] for name in ran if "blocks." in name}) == blocks
        assert any("attn" in name for name in ran) == (site < 3)


@torch.no_grad()
def test_padded_rows_answer_as_they_do_alone(model):
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    padded = ids.clone()
    padded[0, :4] = 7
    alone = model(ids[:1, 4:]).logits
    for site, z in [(None, None), *enumerate(model.residuals(padded, mask))]:
        if site is None:
            got = model(padded, attention_mask=mask).logits
        else:
            got = model.resume(site, z, padded, mask)
        assert (got[0, 4:] - alone[0]).abs().max() < 1e-5
        assert (got[1] - model(ids[1:]).logits[0]).abs().max() < 1e-5
    assert (model(padded).logits[0, 4:] - alone[0]).abs().max() > 0.01  # control: no mask


@torch.no_grad()
def test_right_padding_needs_no_mask(model):
    ids = random_ids()
    longer = torch.cat([ids, random_ids(3, 4, seed=1)], dim=1)
    assert (model(longer).logits[:, :9] - model(ids).logits).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("variant", ["everything", *RARE])
def test_the_eager_form_gives_the_same_logits_and_the_attention_weights(variant):
    flash = build(**VARIANTS[variant])
    eager = build(**VARIANTS[variant], attn_implementation="eager")
    ids = random_ids()
    out = eager(ids, output_attentions=True)
    assert (out.logits - flash(ids).logits).abs().max() < 1e-5
    assert [a.shape for a in out.attentions] == [(3, 2, 9, 9)] * 2
    assert all(((a.sum(-1) < 1) & (a.sum(-1) > 0)).all() for a in out.attentions)


@torch.no_grad()
def test_hidden_states_are_the_residuals_between_blocks_and_the_normed_last():
    model, ids = build(), random_ids()
    hidden = model(ids, output_hidden_states=True).hidden_states
    z = model.residuals(ids)
    assert len(hidden) == 3
    assert torch.equal(hidden[0], z[0]) and torch.equal(hidden[1], z[2])
    assert torch.equal(hidden[2], model.model.norm(z[4]))


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, ids = build(), random_ids()
    out = model(ids, labels=ids)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(out.loss, want)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_cache_is_generation_without(variant):
    model, prompt = build(**VARIANTS[variant]), random_ids(2, 5)
    how = dict(max_new_tokens=5, do_sample=True, pad_token_id=0, eos_token_id=None)

    def sample(use_cache):
        torch.manual_seed(0)
        return model.generate(prompt, use_cache=use_cache, **how)

    cached = sample(True)
    assert torch.equal(cached, sample(False)) and len(cached[:, 5:].unique()) > 2
    greedy = model.generate(prompt, **(how | {"do_sample": False}))
    for t in range(5, 10):  # an oracle that knows nothing of generate
        assert torch.equal(model(greedy[:, :t]).logits[:, -1].argmax(-1), greedy[:, t])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_from_left_padded_prompts_is_generation_alone(variant):
    model, prompt = build(**VARIANTS[variant]), random_ids(2, 6)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    both = model.generate(prompt, attention_mask=mask, **how)
    alone = model.generate(prompt[:1, 3:], **how)
    assert torch.equal(both[0, 6:], alone[0, 3:])


@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_sequence(model):
    ids = random_ids()
    whole = model(ids).logits
    past = model(ids[:, :4], use_cache=True).past_key_values
    chunk = model(ids[:, 4:7], past_key_values=past, use_cache=True)
    single = model(ids[:, 7:8], past_key_values=chunk.past_key_values, use_cache=True)
    assert (chunk.logits - whole[:, 4:7]).abs().max() < 1e-5
    assert (single.logits - whole[:, 7:8]).abs().max() < 1e-5


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed():
    model, ids = build(**VARIANTS["everything"]), random_ids()
    whole = model(ids).logits
    last = model(ids, logits_to_keep=2).logits  # a product of another shape may round otherwise
    torch.testing.assert_close(last, whole[:, -2:], atol=1e-5, rtol=0)
    chosen = torch.tensor([1, 5])
    kept = model(ids, logits_to_keep=chosen).logits
    torch.testing.assert_close(kept, whole[:, chosen], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_is_the_identity_by_every_road(variant, tmp_path):
    model, ids = build(**VARIANTS[variant]), random_ids()
    assert model.source is None
    model.save_pretrained(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} >= {"config.json", "model.safetensors"}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == set(model.state_dict()) - tied
    how = dict(attn_implementation=model.config._attn_implementation)
    for loader in (SparseGPT, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path / "m", **how).eval()
        assert type(again) is SparseGPT
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.fingerprint() == model.fingerprint()
        assert again.source == Source(str(tmp_path / "m"), model.fingerprint())
    assert model.source == again.source  # the saved one knows it too
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert type(config) is SparseGPTConfig
    assert config.architecture() == model.config.architecture()
    trunk = AutoModel.from_pretrained(tmp_path / "m", **how).eval()
    assert type(trunk) is SparseGPTModel
    assert torch.equal(trunk(ids).last_hidden_state, model.model(ids).last_hidden_state)
    _, info = SparseGPT.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()), "nothing is missing, unexpected or mismatched"


def test_a_saved_config_that_was_spoiled_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"activation_fraction": 3}))
    with pytest.raises(ValueError, match="activation_fraction=3"):
        SparseGPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", ["plain", "fixed table", "tied"])
def test_the_fingerprint_is_of_the_function_and_nothing_else(variant):
    fields = VARIANTS[variant]
    model = build(**fields)
    mark = model.fingerprint()
    assert mark == build(**fields).fingerprint() == copy.deepcopy(model).train().fingerprint()
    assert mark != build(seed=1, **fields).fingerprint()
    assert mark != build(**fields | dict(activation_fraction=0.25)).fingerprint()
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        before = p.data.flatten()[0].clone()
        p.data.view(-1)[0] += 1
        assert model.fingerprint() != mark, name
        p.data.view(-1)[0] = before
    assert model.fingerprint() == mark


def test_the_fingerprint_of_a_first_model_has_not_moved():
    """Folders saved by the first version name it; this one was computed then."""
    config = dict(vocab_size=4, hidden_size=2, num_hidden_layers=1, num_attention_heads=1)
    config |= dict(head_dim=2, intermediate_size=2, positions="learned", bigram_table=True)
    model = SparseGPT(SparseGPTConfig(**config, max_position_embeddings=4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel(), dtype=p.dtype).view(p.shape) / 8)
    assert model.fingerprint() == "e51de0fc521a2f0e"


@pytest.mark.parametrize("sinks", [True, False])
def test_weights_start_as_specified(sinks):
    torch.manual_seed(0)
    shape = dict(hidden_size=128, num_hidden_layers=3, bigram_table=True, positions="learned")
    config = SparseGPTConfig(**shape, attention_sinks=sinks)
    model = SparseGPT(config)
    w = dict(model.named_parameters())
    std = {name: p.std().item() for name, p in w.items() if p.ndim == 2}
    for name, value in std.items():
        shrunk = name.endswith(("attn.out.weight", "mlp.proj.weight"))
        want = 0.02 / 6**0.5 if shrunk else 0.02
        if name != "bigram":
            assert abs(value / want - 1) < 0.05, name
    assert 0 <= w["bigram"].min() and w["bigram"].max() < 0.02
    assert all((p == 0).all() for n, p in w.items() if n.endswith(("bias", "sinks")))
    assert all((p == 1).all() for n, p in w.items() if "norm" in n)


def test_fixed_tables_start_as_specified_and_are_not_trained():
    fields = BESIDE | dict(position_sinusoids=True, position_channels=7, logits_bias=True)
    model = SparseGPT(SparseGPTConfig(**FIELDS | fields, bigram_table=True, bigram_fixed=True))
    trained = dict(model.named_parameters())
    assert not {"model.wpe.weight", "bigram", "logits_bias"} & set(trained)
    assert (model.bigram == 0).all() and (model.logits_bias == 0).all()
    table = model.model.wpe.weight
    assert table.shape == (16, 7) and (table[:, 6] == 0).all()
    for j, period in enumerate((4, 8, 16)):
        for t in range(16):
            turn = 2 * math.pi * t / period
            assert abs(table[t, j] - math.sin(turn)) < 1e-5
            assert abs(table[t, 3 + j] - math.cos(turn)) < 1e-5


@pytest.mark.parametrize("frozen", [True, False])
def test_the_last_row_of_the_bigram_table_learns_unless_it_is_frozen(frozen):
    model = build(bigram_table=True, bigram_freeze_last=frozen)
    ids = torch.tensor([[30, 3, 30, 5]])
    model(ids, labels=ids).loss.backward()
    learned = model.bigram.grad.abs().sum(-1) > 0
    assert learned[3] and learned[30] == (not frozen)


def test_dropout_acts_in_training_only_and_on_positions_if_asked():
    ids = random_ids()
    model = build(dropout=0.5)
    assert torch.equal(model(ids).logits, build().eval()(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for asked in (False, True):
        model = build(**BESIDE, dropout=0.5, position_dropout=asked).train()
        beside = model.model.context(model.model.wte(ids))["positions"]
        assert (beside == 0).any() == asked


@torch.no_grad()
def test_the_last_residual_can_be_held_and_is_no_node_of_the_model():
    model, ids = build(), random_ids()
    assert "final_resid" not in model.node_widths()
    z = model.residuals(ids)
    with edited(model, {"final_resid": lambda x: 2 - x}):
        held = model(ids).logits
        assert all(torch.equal(a, b) for a, b in zip(model.residuals(ids), z, strict=True))
        assert torch.equal(model.resume(2, z[2], ids), held)
    assert torch.equal(held, model.lm_head(model.model.norm(2 - z[-1])))


def test_the_embeddings_are_found_by_hugging_face_and_are_untied():
    model = build()
    assert model.get_input_embeddings() is model.model.wte
    assert model.get_output_embeddings() is model.lm_head
    assert model.lm_head.weight is not model.model.wte.weight and model.lm_head.bias is None


def test_every_node_location_is_a_module_of_its_width():
    model = build()
    widths = model.node_widths()
    assert list(widths)[:3] == ["0.attn.act_in", "0.attn.q", "0.attn.k"] and len(widths) == 16
    assert widths["1.mlp.post_act"] == 20 and widths["0.attn.v"] == 8
    assert model.node("1.attn.q") is model.model.blocks[1].attn.q
    for bad in ("2.attn.q", "0.attn.y", "attn.q", "-1.attn.q", "0.attn", ""):
        with pytest.raises(ValueError, match="no node location .* layer 0..1 and name one of"):
            model.node(bad)


@pytest.mark.parametrize("variant", ["everything", *RARE])
def test_gradients_are_the_same_with_checkpointing(variant):
    ids = random_ids()
    grads = []
    for checkpointed in (False, True):
        model = build(**VARIANTS[variant]).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)  # of the dropout, where there is some
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(g.abs().sum() > 0 for g in grads[0])


def test_nothing_ahead_is_seen_and_all_behind_is():
    model, ids = build(), random_ids(1)
    z = model.residuals(ids)[0].detach().requires_grad_()
    model.resume(0, z, ids)[0, 4].sum().backward()
    assert (z.grad[0, 5:] == 0).all() and (z.grad[0, :5] != 0).any(-1).all()


def test_bad_calls_get_the_fact_and_the_limit():
    model, ids = build(**VARIANTS["everything"]), random_ids()
    z = model.residuals(ids)[0]
    for site in (-1, 5):
        with pytest.raises(ValueError, match=f"site {site} is outside 0..4"):
            model.resume(site, z, ids)
    with pytest.raises(ValueError, match=r"need \(3, 9, 12\)"):
        model.resume(0, torch.cat([z, z], dim=-1), ids)
    with pytest.raises(ValueError, match="17 positions, but the model has 16 learned"):
        model(random_ids(1, 17))
    padded = torch.ones(1, 20, dtype=torch.long)
    mask = (torch.arange(20) >= 4)[None].long()  # 16 real tokens: positions 0..15
    assert model(padded, attention_mask=mask).logits.shape == (1, 20, 31)
    past = model(random_ids(1, 16), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="17 positions, but the model has 16 learned"):
        model(ids[:1, :1], past_key_values=past)
    with pytest.raises(ValueError, match="17 positions, but the model has 16 learned"):
        build(**BESIDE).resume(1, torch.zeros(1, 17, 12), random_ids(1, 17))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=z)
    plain = build()
    assert plain(random_ids(1, 17)).logits.shape == (1, 17, 31)
    assert torch.equal(plain(inputs_embeds=plain.model.wte(ids)).logits, plain(ids).logits)


def test_the_rms_norm_and_its_gradients_are_those_of_torch():
    torch.manual_seed(0)
    norm = SparseGPTRMSNorm(7, 0.3).double()
    x, dy = (torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=i == 0) for i in range(2))
    with torch.no_grad():
        norm.weight.normal_()
    asked = [x, norm.weight]
    ours = norm(x)
    theirs = torch.nn.functional.rms_norm(x, (7,), norm.weight, 0.3)
    other = torch.nn.functional.rms_norm(x, (7,), norm.weight, 0.31)
    assert torch.equal(ours, theirs)
    got, want, control = (torch.autograd.grad(y, asked, dy) for y in (ours, theirs, other))
    for a, b, c in zip(got, want, control, strict=True):
        assert (a - b).abs().max() < 1e-13 < (c - b).abs().max()
