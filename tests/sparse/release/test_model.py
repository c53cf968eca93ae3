"""Fixtures and oracle are from docs/method.md#released-files, with the authors' names alone."""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sparse import release
from sparse.circuits.circuit import Circuit
from sparse.circuits.means import node_means, save_means
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.storage.hub import Source

PLACES = "attn_in,attn_out,attn_q,attn_k,attn_v,mlp_in,mlp_neuron,mlp_out"
BASE = dict(
    block_size=12,
    vocab_size=31,
    n_layer=2,
    n_head=4,
    d_head=4,
    d_model=16,
    d_mlp=24,
    dropout=0.0,
    bias=True,
    ln_bias=False,
    rms_norm=True,
    residual_activation_type="identity",
    activation_type="gelu",
    afrac=0.25,
    afrac_loctypes=PLACES,
    debug_nans=False,
    tied_unembed=False,
    tokenizer_name="tinypython_2k",
    grad_checkpointing=False,
    enable_bigram_table=True,
    learnable_bigram_table=False,
    d_pos_emb=None,
    dropout_cat_pos_emb=False,
    sinusoidal_cat_pos_emb=False,
    enable_sparse_kernels=False,
    flash=True,
    sink=False,
    afrac_approx=False,
    bigram_table_rank=None,
    pfrac=0.5,
    expansion_factor=8,
)
SETTLED = PLACES + ",resid_post_attn,resid_post_mlp"
LAYER = dict(rms_norm=False, ln_bias=True)
OPTIONS = {
    "as csp_bridges2": {},
    "sinks": dict(sink=True),
    "relu": dict(activation_type="relu"),
    "dense": dict(afrac=None),
    "all kept": dict(afrac=1.0),
    "two places": dict(afrac=0.5, afrac_loctypes="mlp_neuron,attn_q"),
    "default places": dict(afrac_loctypes=...),
    "residual topk": dict(afrac_loctypes=SETTLED, afrac=0.5),
    "residual relu": dict(residual_activation_type="relu"),
    "both": dict(afrac_loctypes=SETTLED, afrac=0.4, residual_activation_type="relu"),
    "layer norm": LAYER,
    "layer norm, no bias": dict(rms_norm=False, ln_bias=False),
    "layer norm by default": dict(rms_norm=..., ln_bias=...),
    "no bias": dict(bias=False),
    "beside": dict(d_pos_emb=6),
    "beside, odd": dict(d_pos_emb=5, sinusoidal_cat_pos_emb=True, dropout_cat_pos_emb=True),
    "beside, layer norm": dict(d_pos_emb=3, sink=True) | LAYER,
    "tied": dict(tied_unembed=True),
    "tied by default": dict(tied_unembed=...),
    "learned table": dict(learnable_bigram_table=True),
    "no table": dict(enable_bigram_table=False, learnable_bigram_table=True),
    "narrow heads": dict(d_head=3),
    "default widths": dict(d_head=..., d_mlp=...),
    "alias": dict(d_mlp=..., n_mlp=20, use_tied_aux_matrix=False),
    "dropout": dict(dropout=0.1, debug_nans=True, n_embd=16, rtopk=True),
    "slow attention": dict(flash=False, grad_checkpointing=True),
}

IDLE = {  # flags that say nothing where another key is off, and come back false then
    "learnable_bigram_table": "enable_bigram_table",
    "sinusoidal_cat_pos_emb": "d_pos_emb",
    "dropout_cat_pos_emb": "d_pos_emb",
}


def released(seed=0, positions=True, logits_bias=True, **changes):
    """A random model in the released format: its keys, and its state dict."""
    values = {k: v for k, v in (BASE | changes).items() if v is not ...}
    get = full(values).get
    torch.manual_seed(seed)
    d, V, L = get("d_model"), get("vocab_size"), get("n_layer")
    beside, width, d_mlp = get("d_pos_emb") or 0, get("n_head") * get("d_head"), get("d_mlp")
    state = {}

    def matrix(name, rows, columns):
        state[name] = torch.randn(rows, columns) / columns**0.5

    def linear(name, rows, columns):
        matrix(f"{name}.weight", rows, columns)
        if get("bias"):
            state[f"{name}.bias"] = 0.3 * torch.randn(rows)

    def norm(name, n):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(n)
        if not get("rms_norm") and get("ln_bias"):
            state[f"{name}.bias"] = 0.3 * torch.randn(n)

    matrix("transformer.wte.weight", V, d)
    state["transformer.wpe.weight"] = 0.5 * positions * torch.randn(get("block_size"), beside or d)
    for i in range(L):
        at = f"transformer.h.{i}"
        norm(f"{at}.ln_1", d)
        linear(f"{at}.attn.c_attn", 3 * width, d + beside)
        linear(f"{at}.attn.c_proj", d, width)
        if get("sink"):
            state[f"{at}.attn.attn_imp.sink_logit"] = torch.randn(get("n_head"))
        if not get("flash"):
            n = get("block_size")
            state[f"{at}.attn.bias"] = torch.ones(n, n).tril()[None, None]
        norm(f"{at}.ln_2", d)
        linear(f"{at}.mlp.c_fc", d_mlp, d + beside)
        linear(f"{at}.mlp.c_proj", d, d_mlp)
        if beside:
            norm(f"{at}.ln_p1", beside)
            norm(f"{at}.ln_p2", beside)
    norm("transformer.ln_f", d)
    matrix("lm_head.weight", V, d)
    if get("tied_unembed"):
        state["transformer.wte.weight"] = state["lm_head.weight"]
    if get("enable_bigram_table"):
        state["bigram_table"] = torch.rand(V, V)
    if logits_bias:
        state["final_logits_bias"] = torch.randn(V)
    return values, state


def full(values):
    """What absent keys mean."""
    absent = dict(dropout=0.0, bias=True, ln_bias=True, rms_norm=False, tied_unembed=True)
    absent |= dict(afrac=None, afrac_loctypes="attn_in,attn_out,mlp_in,mlp_out")
    v = absent | values
    v["d_mlp"] = v.get("d_mlp") or v.get("n_mlp") or 4 * v["d_model"]
    v["d_head"] = v.get("d_head") or v["d_model"] // v["n_head"]
    return v


def oracle(values, state, ids, hold=None):
    """The logits of the authors' forward (docs/method.md#the-sparse-model).

    `hold` maps a location to what replaces it.
    """
    v, w, hold = full(values), state, hold or {}
    batch, n = ids.shape

    def seen(at, x):
        return hold[at](x) if at in hold else x

    def topk(x, place):
        if v["afrac"] is None or place not in v["afrac_loctypes"].split(","):
            return x
        best = x.abs().topk(int(v["afrac"] * x.shape[-1]), dim=-1).indices
        return x * torch.zeros_like(x).scatter(-1, best, 1.0)

    def norm(x, at):
        gain, bias = w[f"{at}.weight"], w.get(f"{at}.bias", 0.0)
        if v["rms_norm"]:
            return (
                x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * gain
            )
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias

    def linear(x, at):
        return x @ w[f"{at}.weight"].T + w.get(f"{at}.bias", 0.0)

    def read(x, at, i, place):
        u = norm(x, f"{at}.ln_{i}")
        if v["d_pos_emb"]:
            p = norm(w["transformer.wpe.weight"][:n], f"{at}.ln_p{i}")
            u = torch.cat([u, p.expand(batch, n, -1)], dim=-1)
        return topk(u, place)

    def settle(x, place):
        return topk(x.relu() if v["residual_activation_type"] == "relu" else x, place)

    x = w["transformer.wte.weight"][ids]
    if not v["d_pos_emb"]:
        x = x + w["transformer.wpe.weight"][:n]
    for i in range(v["n_layer"]):
        at = f"transformer.h.{i}"
        u = seen(f"{i}.attn.act_in", read(x, at, 1, "attn_in"))
        thirds = linear(u, f"{at}.attn.c_attn").split(v["n_head"] * v["d_head"], dim=-1)
        q, k, z = (
            seen(f"{i}.attn.{name}", topk(part, f"attn_{name}")).view(batch, n, v["n_head"], -1)
            for name, part in zip("qkv", thirds, strict=True)
        )
        scores = torch.einsum("bthc,buhc->bhtu", q, k) / math.sqrt(v["d_head"])
        e = scores.exp().tril()
        total = e.sum(-1, keepdim=True)
        if v.get("sink"):
            total = total + w[f"{at}.attn.attn_imp.sink_logit"].exp().view(1, -1, 1, 1)
        y = torch.einsum("bhtu,buhc->bthc", e / total, z).flatten(2)
        o = seen(f"{i}.attn.resid_delta", topk(linear(y, f"{at}.attn.c_proj"), "attn_out"))
        x = settle(x + o, "resid_post_attn")
        u = seen(f"{i}.mlp.act_in", read(x, at, 2, "mlp_in"))
        act = {"gelu": F.gelu, "relu": F.relu}[v["activation_type"]]
        a = seen(f"{i}.mlp.post_act", topk(act(linear(u, f"{at}.mlp.c_fc")), "mlp_neuron"))
        o = seen(f"{i}.mlp.resid_delta", topk(linear(a, f"{at}.mlp.c_proj"), "mlp_out"))
        x = settle(x + o, "resid_post_mlp")
    logits = norm(seen("final_resid", x), "transformer.ln_f") @ w["lm_head.weight"].T
    logits = logits + w.get("final_logits_bias", 0.0)
    return logits + (w["bigram_table"][ids] if v["enable_bigram_table"] else 0.0)


def write(folder, values, state):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "beeg_config.json").write_text(json.dumps(values))
    torch.save(state, folder / "final_model.pt")
    return folder


def random_ids(n=3, length=12, seed=0):
    return torch.randint(0, 31, (n, length), generator=torch.Generator().manual_seed(seed))


def mixed(seed):
    """A config with every option drawn at random."""
    rng = random.Random(seed)
    flag = lambda: rng.random() < 0.5  # noqa: E731
    places = [p for p in SETTLED.split(",") if flag()]
    beside = rng.choice([None, 3, 8])
    return dict(
        afrac=rng.choice([None, 0.25, 0.5, 1.0]),
        afrac_loctypes=",".join(places),
        residual_activation_type=rng.choice(["identity", "relu"]),
        activation_type=rng.choice(["gelu", "relu"]),
        d_head=rng.choice([2, 4, 5]),
        n_layer=rng.choice([1, 3]),
        d_pos_emb=beside,
        **{
            key: flag()
            for key in ("bias", "ln_bias", "rms_norm", "tied_unembed", "enable_bigram_table")
        },
        **{key: flag() for key in ("learnable_bigram_table", "sink", "sinusoidal_cat_pos_emb")},
    )


def assert_same_function(folder, values, state, tolerance=1e-5):
    model, ids = release.load_model(folder), random_ids()
    with torch.no_grad():
        want = oracle(values, state, ids)
        assert (model(ids).logits - want).abs().max() < tolerance
        for site, z in enumerate(model.residuals(ids)):
            assert (model.resume(site, z, ids) - want).abs().max() < tolerance
    assert want.std() > 0.3  # control: the outputs are no constants
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_the_forward_is_the_authors_for_every_key_of_the_format(option, tmp_path):
    values, state = released(**OPTIONS[option])
    model = assert_same_function(write(tmp_path, values, state), values, state)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert model.source == Source(str(tmp_path), model.fingerprint())


@pytest.mark.parametrize("option", ["sinks", "beside, layer norm", "slow attention"])
def test_every_tensor_of_a_file_matters(option):
    """The control of the laws above: an oracle that ignored one could agree with a bad loader."""
    values, state = released(**OPTIONS[option])
    before = oracle(values, state, random_ids())
    for name in state.keys() - {f"transformer.h.{i}.attn.bias" for i in (0, 1)}:
        other = state | {name: state[name] + 0.5 * torch.randn_like(state[name])}
        after = oracle(values, other, random_ids())
        assert (after - before).abs().max() > 1e-4, name


@pytest.mark.parametrize("seed", range(8))
def test_the_forward_is_the_authors_for_keys_at_random(seed, tmp_path):
    positions, bias = seed % 3 > 0, seed % 2 > 0
    values, state = released(seed, positions, bias, **mixed(seed))
    assert_same_function(write(tmp_path, values, state), values, state)


@pytest.mark.parametrize("option", OPTIONS)
def test_saving_and_loading_is_the_identity_in_the_released_format(option, tmp_path):
    values, state = released(**OPTIONS[option])
    model = release.load_model(write(tmp_path / "a", values, state))
    release.save_model(model, tmp_path / "b")
    again = release.load_model(tmp_path / "b")
    assert again.fingerprint() == model.fingerprint()
    assert again.config.to_dict() == model.config.to_dict()
    saved = torch.load(tmp_path / "b" / "final_model.pt", weights_only=True)
    lasting = {n: t for n, t in state.items() if not n.endswith(".attn.bias")}
    assert saved.keys() == lasting.keys()
    assert all(torch.equal(saved[name], t) for name, t in lasting.items())
    written = json.loads((tmp_path / "b" / "beeg_config.json").read_text())
    told, back = full(values), full(written)
    for key in told.keys() & back.keys() - {"afrac", "grad_checkpointing", "ln_bias", *IDLE}:
        assert back[key] == told[key], key
    for key, needed in IDLE.items():
        assert back[key] == (told.get(key, False) and bool(told[needed])), key


def test_a_model_of_ours_goes_there_and_back(tmp_path):
    torch.manual_seed(0)
    shape = dict(vocab_size=31, hidden_size=16, num_attention_heads=4, head_dim=3)
    config = SparseGPTConfig(**shape, positions="learned", bigram_table=True, dropout=0.1)
    model = SparseGPT(config).eval()
    release.save_model(model, tmp_path)
    again, ids = release.load_model(tmp_path), random_ids()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.fingerprint() == model.fingerprint() and again.config.bigram_freeze_last
    state = torch.load(tmp_path / "final_model.pt", weights_only=True)
    values = json.loads((tmp_path / "beeg_config.json").read_text())
    assert (oracle(values, state, ids) - model(ids).logits).abs().max() < 1e-5


def test_what_a_model_without_positions_stores_is_zeros(tmp_path):
    values, state = released(positions=False, logits_bias=False)
    model = release.load_model(write(tmp_path, values, state))
    assert model.config.positions == "none" and model.model.wpe is None
    assert not model.config.logits_bias
    assert model(random_ids(1, 40)).logits.shape == (1, 40, 31)  # no table, no limit
    release.save_model(model, tmp_path)
    saved = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert (saved["transformer.wpe.weight"] == 0).all() and (saved["final_logits_bias"] == 0).all()
    with pytest.raises(ValueError, match="13 positions, but the model has 12"):
        release.load_model(write(tmp_path / "b", *released()))(random_ids(1, 13))


def test_the_end_of_text_is_known_by_the_tokenizers_name(tmp_path):
    assert release.load_model(write(tmp_path, *released())).config.eos_token_id is None
    values, state = released(vocab_size=2048)
    assert release.load_model(write(tmp_path, values, state)).config.eos_token_id == 2047
    values["tokenizer_name"] = "another"
    assert release.load_model(write(tmp_path, values, state)).config.eos_token_id is None


def test_tensors_of_the_model_are_its_own(tmp_path):
    values, state = released()
    state["transformer.wte.weight"] = state["lm_head.weight"]  # shared in the file, not tied
    model = release.load_model(write(tmp_path, values, state))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (model.model.wte.weight != 0).any() and all(p.requires_grad for p in model.parameters())
    tied = release.load_model(write(tmp_path, *released(tied_unembed=True)))
    assert tied.lm_head.weight is tied.model.wte.weight


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (dict(rotary=True), r"unknown keys \['rotary'\]; known: block_size"),
        (dict(n_layer=...), r"\['n_layer'\] missing"),
        (dict(use_tied_aux_matrix=True), "use_tied_aux_matrix is true"),
        (dict(n_mlp=25), "n_mlp=25 is another name of d_mlp=24"),
        (dict(sink=True), "missing .*sink_logit.*sink is true"),
        (dict(d_model="16"), "d_model='16' must be int"),
        (dict(rms_norm=1), "rms_norm=1 must be bool"),
        (dict(bias=None), "bias=None must be bool"),
        (dict(d_pos_emb=0), "d_pos_emb=0 must be at least 1"),
        (dict(n_head=0), "n_head=0 must be at least 1"),
        (dict(activation_type="swish"), "activation='swish' must be one of"),
        (dict(afrac=1.5), r"activation_fraction=1.5 must be in \(0, 1\]"),
        (dict(afrac=0.05), "0.05 keeps 0 of 16 entries at attn_in"),
        (dict(afrac_loctypes="attn_in, mlp_in"), r"has \[' mlp_in'\]"),
        (dict(d_mlp=25), r"c_fc.weight is \(24, 16\), but beeg_config.json asks for \(25, 16\)"),
        (dict(block_size=16), r"wpe.weight is \(12, 16\)"),
        (dict(enable_bigram_table=False), r"unknown \['bigram_table'\]"),
        (dict(tied_unembed=True), "differ, but beeg_config.json says tied_unembed is true"),
        (dict(rms_norm=False, ln_bias=True), r"missing \['transformer.h.0.ln_1.bias'"),
    ],
)
def test_a_config_that_is_not_the_models_is_refused_by_its_key(keys, says, tmp_path):
    values, state = released()
    write(tmp_path, {k: v for k, v in (values | keys).items() if v is not ...}, state)
    with pytest.raises(ValueError, match=says):
        release.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(extra=torch.zeros(1)), r"missing \[\], unknown \['extra'\]"),
        ({"transformer.wpe.weight": ...}, r"missing \['transformer.wpe.weight'\]"),
        ({"transformer.h.0.attn.bias": torch.ones(3, 3)}, "attn.bias is"),
        ({"final_logits_bias": torch.ones(3)}, r"final_logits_bias is \(3,\)"),
        ({"lm_head.weight": torch.ones(31, 16).double()}, "float64"),
        ({"transformer.h.0.attn.attn_imp.sink_logit": torch.ones(4)}, "sink is false"),
        ({"lm_head.weight": [1.0]}, "holds no state dict"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused_by_name(change, says, tmp_path):
    values, state = released()
    write(tmp_path, values, {k: v for k, v in (state | change).items() if v is not ...})
    with pytest.raises(ValueError, match=says):
        release.load_model(tmp_path)


class Code:
    """What runs on being unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def test_a_broken_or_unsafe_file_is_refused_with_what_to_do(tmp_path):
    values, state = released()
    weights = write(tmp_path, values, state) / "final_model.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no zip directory.*cut short.*csp_bridges1"):
        release.load_model(tmp_path)
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes.*final_bridges.pt"):
        release.load_model(tmp_path)
    torch.save({"a": Code()}, weights)
    with pytest.raises(ValueError, match="more than tensors.*could run code"):
        release.load_model(tmp_path)
    weights.write_bytes(whole.replace(b"data.pkl", b"dada.pkl"))
    with pytest.raises(ValueError, match="is damaged"):
        release.load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="final_model.pt is missing"):
        release.load_model(tmp_path)
    for text, says in (("{", "is no JSON"), ("[]", "holds a list")):
        (tmp_path / "beeg_config.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            release.load_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(rms_norm_eps=1e-6), "rms_norm_eps=1e-06: the released format has"),
        (dict(norm="layer", layer_norm_eps=1e-6), "layer_norm_eps=1e-06"),
        (dict(num_attention_heads=3), "num_attention_heads=3 does not divide hidden_size=16"),
        (dict(activation_fraction=0.01), "activation_fraction .* keeps 0 of 16"),
    ],
)
def test_a_model_that_the_format_cannot_express_is_refused_by_field(fields, says, tmp_path):
    shape = dict(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match=says):
        release.save_model(SparseGPT(SparseGPTConfig(**shape | fields)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Circuits (docs/method.md#released-files). The vocabulary is that of a tokenizer of bytes and the
# end of text.

N_PAIRS = 5
LOCATIONS = ("attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta")
LOCATIONS += ("mlp.act_in", "mlp.post_act", "mlp.resid_delta")
A, B = "x", "y"


def widths(values, final):
    read = values["d_model"] + (values["d_pos_emb"] or 0)
    heads = values["n_head"] * values["d_head"]
    one = [read, heads, heads, heads, values["d_model"], read, values["d_mlp"], values["d_model"]]
    sizes = dict(zip(LOCATIONS, one, strict=True))
    found = {f"{i}.{at}": n for i in range(values["n_layer"]) for at, n in sizes.items()}
    return found | ({"final_resid": values["d_model"]} if final else {})


def token(text):
    """In a tokenizer without merges, by the order that GPT-2 gives the bytes."""
    return ord(text) - ord("!")


def pair_sum(values, state, tokens, nodes, means, one_sided=False):
    """The authors' loss of a pair, mean over pairs, with nodes outside `nodes` at their means."""
    hold = {}
    for at, mean in means.items() if nodes is not None else ():
        kept = torch.zeros(len(mean), dtype=torch.bool)
        kept[nodes[at]] = True
        hold[at] = lambda x, kept=kept, mean=mean: torch.where(kept, x, mean)
    last = [max(i for i in range(len(row)) if row[i]) for row in tokens.tolist()]
    logits = oracle(values, state, tokens, hold)[torch.arange(len(tokens)), last]
    first, second = logits.chunk(2)
    if one_sided:
        p1, p2 = (half.softmax(-1)[:, token(A)] for half in (first, second))
        return -(p1.log() + (1 - p2).log()).mean()
    two = [half[:, [token(A), token(B)]].log_softmax(-1) for half in (first, second)]
    return -(two[0][:, 0] + two[1][:, 1]).mean()


@pytest.fixture(params=["plain", "final", "beside, final", "one-sided"])
def case(request, tmp_path):
    """A released model, a tokenizer, and a circuit in it with the losses its authors measured."""
    final, one_sided = "final" in request.param, request.param == "one-sided"
    beside = dict(d_pos_emb=3, sink=True) if "beside" in request.param else {}
    values, state = released(vocab_size=257, **beside)
    model = release.load_model(write(tmp_path / "models" / "m", values, state))
    release.save_tokenizer([], tmp_path)
    rng = torch.Generator().manual_seed(3)
    sizes = widths(values, final)
    kept = {at: torch.randperm(n, generator=rng)[: n // 2] for at, n in sizes.items()}
    means = {at: torch.randn(n, generator=rng) * 0.1 for at, n in sizes.items()}
    tokens = torch.randint(1, 90, (2 * N_PAIRS, 11), generator=rng)
    for i in range(N_PAIRS):
        tokens[[i, i + N_PAIRS], 6 + i % 4 :] = 0
        tokens[i, 3] = 0  # a real token 0 in the middle
    loss = lambda nodes: pair_sum(values, state, tokens, nodes, means, one_sided).item()  # noqa: E731
    without = {at: [loss(kept | {at: x[x != i]}) for i in x] for at, x in list(kept.items())[:2]}
    viz = {
        "circuit_data": kept | {"prune_config": {"lr": 0.01}},
        "samples": {},
        "importances": {
            "ch_interv_losses": without,
            "layer_interv_losses": {"0.attn": 1.5},
            "loss": loss(None),
            "interv_loss": torch.tensor(loss(kept)),
            "pair_data": [
                [torch.tensor([[0.5], [0.0], [0.25]]), [3, 1, "bias"], [2], ("0.attn.v", "x")]
            ],
            "pair_data_connections": [],
            "task_samples": (tokens, {}),
            "beeg_model_config": values | {"from_another_version": 1},
        },
        "all_loss": [(0, 2.0), (1, torch.tensor(1.0))],
        "prune_config": {"lr": 0.01, "steps": torch.tensor([1, 2])},
        "num_total_nodes": sum(sizes.values()),
    }
    path = tmp_path / "viz" / "m" / "quotes_beeg" / "prune_v4" / "k_optim" / "viz_data.pt"
    path.parent.mkdir(parents=True)
    torch.save(viz, path)
    tokenizer, targets = release.load_tokenizer(tmp_path), (A, None if one_sided else B)
    open_it = lambda **how: release.load_circuit(path, model, tokenizer, targets, **how)  # noqa: E731
    return SimpleNamespace(**locals())


def test_the_loss_of_a_released_circuit_is_the_stored_one_halved(case):
    replay = case.open_it(means=case.means)
    assert replay.stored == pytest.approx(case.loss(case.kept) / 2, abs=1e-6)
    assert replay.loss(case.model) == pytest.approx(replay.stored, abs=1e-5)
    assert replay.loss(case.model, whole=True) == pytest.approx(case.loss(None) / 2, abs=1e-5)
    assert replay.circuit.loss["circuit/train"] == replay.stored
    assert replay.circuit.loss["full/train"] == pytest.approx(case.loss(None) / 2)
    assert abs(case.loss(case.kept) - case.loss(None)) > 0.01  # control: the mask matters
    zero = case.open_it(ablation="zero").loss(case.model)  # and so do the values of the rest
    assert abs(zero - replay.stored) > 1e-3


def test_every_released_node_and_word_is_in_the_circuit(case):
    circuit = case.open_it(means=case.means).circuit
    assert circuit.nodes == {at: tuple(sorted(x.tolist())) for at, x in case.kept.items()}
    assert list(circuit.ablation) == list(case.sizes) and circuit.n_total == sum(
        case.sizes.values()
    )
    assert circuit.task.name == "quotes_beeg" and len(circuit.task.train) == N_PAIRS
    texts = [p.context_1 for p in circuit.task.train] + [p.context_2 for p in circuit.task.train]
    for text, row in zip(texts, case.tokens.tolist(), strict=True):
        n = max(i for i in range(len(row)) if row[i]) + 1
        assert case.tokenizer(text).input_ids == row[:n]
    said = circuit.config["released"]
    for at, losses in case.without.items():
        order = case.kept[at].argsort()
        assert said["node_nats"][at] == pytest.approx([losses[i] / 2 for i in order])
    assert said["layer_nats"] == {"0.attn": 0.75} and said["search"] == [[0, 1.0], [1, 0.5]]
    assert said["edge_nats"] == [["0.attn.v", 3, "x", 2, 0.25], ["0.attn.v", "bias", "x", 2, 0.125]]
    assert said["prune_config"] == {"lr": 0.01, "steps": [1, 2]}
    assert not any("nodes in the whole" in note for note in circuit.notes)


def test_a_released_circuit_is_saved_in_our_format_and_found_again(case, tmp_path):
    replay = case.open_it(means=case.means)
    replay.circuit.save(tmp_path / "c")
    again = Circuit.load(tmp_path / "c")
    assert again.nodes == replay.circuit.nodes and list(again.ablation) == list(case.sizes)
    assert replay.measure(case.model, again) == replay.loss(case.model)
    assert len(again.random(case.model, 0)) == len(again)
    again.check(case.model)


def test_a_circuit_goes_back_to_the_released_format(case, tmp_path):
    replay = case.open_it(means=case.means)
    release.save_circuit(replay, case.model, tmp_path / "viz_data.pt")
    viz = torch.load(tmp_path / "viz_data.pt", weights_only=True)
    assert {at: x.tolist() for at, x in viz["circuit_data"].items()} == {
        at: sorted(x.tolist()) for at, x in case.kept.items()
    }
    told = viz["importances"]
    assert told["interv_loss"] == pytest.approx(case.loss(case.kept), abs=1e-4)
    assert told["loss"] == pytest.approx(case.loss(None), abs=1e-4)
    assert told["beeg_model_config"]["d_model"] == 16 and viz["num_total_nodes"] == len(
        torch.cat(list(case.means.values()))
    )
    tokens, activations = told["task_samples"]
    assert torch.equal(tokens, case.tokens[:, : tokens.shape[1]])
    assert {at: list(x) for at, x in activations.items()} == {
        at: sorted(x.tolist()) for at, x in case.kept.items()
    }
    for matrix, sources, targets, (a, b) in told["pair_data_connections"]:
        sublayer, layer = a.split(".")[1], int(a.split(".")[0])
        name = {"attn": "c_attn", "mlp": "c_fc"}[sublayer] if a.endswith("act_in") else "c_proj"
        at = f"transformer.h.{layer}.{sublayer}.{name}"
        w, bias = case.state[f"{at}.weight"], case.state[f"{at}.bias"]
        third = "qkv".find(b[-1]) if b.endswith((".q", ".k", ".v")) else 0
        assert sources[-1] == "bias"
        for j, target in enumerate(targets):
            row = third * 16 + target
            assert matrix[-1, j] == bias[row]
            assert matrix[:-1, j].tolist() == w[row, sources[:-1]].tolist()
    again = release.load_circuit(
        tmp_path / "viz_data.pt", case.model, case.tokenizer, case.targets, means=case.means
    )
    assert again.circuit.nodes == replay.circuit.nodes
    assert again.loss(case.model) == pytest.approx(replay.loss(case.model), abs=1e-6)
    old, new = (r.circuit.config["released"] for r in (replay, again))
    assert new["search"] == old["search"]
    for at, losses in old["node_nats"].items():
        assert new["node_nats"][at] == pytest.approx(losses)


def test_the_importances_of_a_circuit_of_ours_are_measured(case, tmp_path):
    replay = case.open_it(means=case.means)
    fewer = {at: indices[:2] for at, indices in replay.circuit.nodes.items()}
    ours = dataclasses.replace(replay, circuit=dataclasses.replace(replay.circuit, nodes=fewer))
    ours = dataclasses.replace(ours, circuit=dataclasses.replace(ours.circuit, config={}))
    release.save_circuit(ours, case.model, tmp_path / "viz_data.pt")
    told = torch.load(tmp_path / "viz_data.pt", weights_only=True)["importances"]
    kept = {at: torch.tensor(indices) for at, indices in fewer.items()}
    at = "1.mlp.post_act"
    for i, loss in zip(fewer[at], told["ch_interv_losses"][at], strict=True):
        assert loss == pytest.approx(case.loss(kept | {at: kept[at][kept[at] != i]}), abs=1e-4)
    none = {a: x[:0] if a.startswith("1.attn.") else x for a, x in kept.items()}
    assert told["layer_interv_losses"]["1.attn"] == pytest.approx(case.loss(none), abs=1e-4)


def test_the_means_come_from_the_models_folder_and_must_cover_what_is_held(case):
    sizes = widths(case.values, True)
    text = torch.randint(0, 257, (4, 12))
    means = node_means(case.model, text, locations=list(sizes))
    assert {at: len(x) for at, x in means.items()} == sizes
    last = case.model.residuals(text)[-1].mean((0, 1))
    torch.testing.assert_close(means["final_resid"], last)
    with pytest.raises(ValueError, match="node_means.safetensors is missing"):
        case.open_it()
    save_means(case.model.source.folder, means, case.model.fingerprint())
    assert case.open_it().circuit.ablation.keys() == case.sizes.keys()
    with pytest.raises(ValueError, match="no value, or not one for every node, at .*'0.attn.q'"):
        case.open_it(means={at: x for at, x in means.items() if at != "0.attn.q"})
    in_memory = SparseGPT(case.model.config)
    with pytest.raises(ValueError, match="was made in memory"):
        release.load_circuit(case.path, in_memory, case.tokenizer, case.targets)


def test_what_a_file_lacks_is_noted(case):
    case.viz["circuit_data"].pop("0.attn.q")
    case.viz["num_total_nodes"] = 7
    case.viz["importances"]["task_samples"][0][0, 7:] = 9
    torch.save(case.viz, case.path)
    circuit = case.open_it(means=case.means).circuit
    assert not circuit.masks()["0.attn.q"].any()
    notes = " ".join(circuit.notes)
    assert "counts 7 nodes" in notes and "1 locations are not in the file" in notes
    assert f"1 of {N_PAIRS} pairs differ in length" in notes


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda v: v.pop("importances"), "a circuit file has circuit_data and importances"),
        (lambda v: v["circuit_data"].update({"9.attn.q": torch.zeros(0)}), r"\['9.attn.q'\]"),
        (lambda v: v["importances"]["beeg_model_config"].update(d_mlp=9), "d_mlp=9, .* has 24"),
        (lambda v: v["importances"]["task_samples"][0].fill_(0), "none empty"),
        (lambda v: v["importances"]["task_samples"][0].fill_(300), "largest token is 300"),
        (lambda v: v["circuit_data"].update({"0.attn.q": torch.tensor([99])}), "nodes 0..15"),
    ],
)
@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_a_circuit_of_another_model_or_form_is_refused(case, spoil, says):
    spoil(case.viz)
    torch.save(case.viz, case.path)
    with pytest.raises(ValueError, match=says):
        case.open_it(means=case.means)


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_a_target_must_be_one_token_and_the_model_the_circuits(case):
    with pytest.raises(ValueError, match="'xy' is 2 tokens"):
        release.load_circuit(case.path, case.model, case.tokenizer, ("xy", "y"), means=case.means)
    replay = case.open_it(means=case.means)
    with torch.no_grad():
        case.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="has fingerprint"):
        replay.loss(case.model)
