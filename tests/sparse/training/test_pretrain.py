"""The recipe against a second one, from docs/method.md#the-training-step alone; and its fields."""

import json
from collections import Counter
from math import floor, log, sqrt

import pytest
import torch
import torch.nn.functional as F

from sparse.model.gpt import SparseGPT
from sparse.text.batches import Batches
from sparse.training.config import TrainConfig
from sparse.training.heldout import heldout_nats, unigram_nats
from sparse.training.loop import fit
from sparse.training.pretrain import PretrainConfig, Pretraining, pretrain
from sparse.training.recipes import gao2025
from sparse.training.sparsity import SparsityConfig, budgets

STEPS = 32
SHAPE = dict(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=8,
)
BLOCKS = torch.randint(0, 30, (24, 8), generator=torch.Generator().manual_seed(0))
VARIANTS = {  # name: what differs from gao2025, in PretrainConfig, SparsityConfig and the model
    "gao2025": {},
    "clip": dict(scaling="clip"),
    "no scaling": dict(scaling="none"),
    "adamw": dict(decay="adamw"),
    "all decay": dict(decayed="all"),
    "unnormalised sharkfin": dict(sharkfin="unnormalised"),
    "no sharkfin": dict(sharkfin="none"),
    "one density": dict(sparsity=dict(embedding_density=0.375)),
    "late embeddings": dict(sparsity=dict(embedding_anneal="late")),
    "log anneal": dict(sparsity=dict(anneal_mode="log")),
    "dense biases": dict(sparsity=dict(sparse_biases=False)),
    "rows": dict(sparsity=dict(floor_axis="rows")),
    "bigram trained to the last row": dict(model=dict(bigram_freeze_last=False)),
    "bigram fixed": dict(model=dict(bigram_fixed=True)),
    "positions": dict(model=dict(positions="learned")),
}


def model(**fields):
    torch.manual_seed(1)
    preset = gao2025("unused", 2, 1.5, steps=STEPS, model=SHAPE | fields)
    return SparseGPT(preset.model).double()  # so that rounding cannot blur what is compared


def preset(folder, variant):
    """The preset on a tiny model; 10 % of warm-up, as 1 % of 32 steps would be none."""
    fields = {k: v for k, v in VARIANTS[variant].items() if k != "model"}
    return gao2025(str(folder), 2, 1.5, steps=STEPS, model=SHAPE, warmup=0.1, **fields)


def batches():
    return Batches(BLOCKS, 4, seed=2)


def ours(folder, variant):
    """The weights before step 0, after it, and so on, as `fit` makes them."""
    seen = []

    class Watched(Pretraining):
        def forward(self, ids, step):
            seen.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
            return super().forward(ids, step)

    shape = VARIANTS[variant].get("model", {})
    module = Watched(model(**shape), preset(folder, variant).pretrain)
    fit(module, batches(), module.config.train, after_step=module.sparsifier.project)
    return [*seen, {n: p.detach() for n, p in module.model.named_parameters()}]


def kept_by_sorting(w, k, j, rows):
    """Protect the j largest of every row (or column), then take the largest; lowest index first."""
    ranked = sorted((-abs(x), i, n) for i, line in enumerate(w) for n, x in enumerate(line))
    protected, taken = set(), Counter()
    for _, i, n in ranked:
        line = i if rows else n
        if taken[line] < j:
            protected.add((i, n))
            taken[line] += 1
    rest = [e[1:] for e in ranked if e[1:] not in protected]
    return protected | set(rest[: k - len(protected)])


def theirs(variant):
    """The same weights by a plain loop: S steps, two densities, Adam, sorting, decay by hand."""
    v = dict(VARIANTS[variant])
    s, shape = v.pop("sparsity", {}), v.pop("model", {})
    frozen = shape.get("bigram_freeze_last", True) and "bigram_fixed" not in shape
    m = model(**shape | dict(bigram_freeze_last=False))
    p = dict(m.named_parameters())
    first = {n: torch.zeros_like(w) for n, w in p.items()}
    second = {n: torch.zeros_like(w) for n, w in p.items()}
    S, e, rho_T, e_T = STEPS, 2, 1.5 / 2**2, s.get("embedding_density", 1.5 / 2)
    a0, a1, w = 0.01 * S, 0.5 * S, floor(0.1 * S)
    out = [{n: x.detach().clone() for n, x in p.items()}]
    for t in range(S):
        # 1. densities and learning rate
        u = min(max((t - a0) / (a1 - a0), 0), 1)
        rho = 1 + u * (rho_T - 1)
        if "anneal_mode" in s and a0 < t < a1:
            rho = rho_T ** ((log(t) - log(a0)) / (log(a1) - log(a0)))
        e_t = e_T + (rho - rho_T) / (1 - rho_T) * (1 - e_T)
        if "embedding_anneal" in s:
            e_t = min(1.0, rho * e)
        base = t / w if t < w else 1 - (t - w) / (S - w)
        fin = {"unnormalised": 1 / sqrt(rho), "none": 1.0}.get(v.get("sharkfin"), sqrt(rho_T / rho))
        lr = 1.28e-2 * base * fin
        # 2, 3. cross entropy of position j on token j + 1
        ids = batches().at(t)
        log_p = m(ids).logits.log_softmax(-1)
        loss = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
        if frozen:  # the last token's row of the bigram table gets no gradient (1.2)
            grads["bigram"][-1] = 0
        # 4. pooled over all parameters
        r = sqrt(sum((g**2).sum().item() for g in grads.values()))
        r /= sqrt(sum(g.numel() for g in grads.values()))
        scale = {"clip": min(1, 1 / r), "none": 1.0}.get(v.get("scaling"), 1 / (r + 1e-5))
        with torch.no_grad():
            for n, x in p.items():
                decays = "decayed" in v or (x.ndim > 1 and n != "bigram")
                if decays and "decay" in v:  # AdamW
                    x -= 0.1 * lr * x
                # 5. Adam
                g = grads[n] * scale
                first[n] = 0.9 * first[n] + 0.1 * g
                second[n] = 0.95 * second[n] + 0.05 * g * g
                m_hat, v_hat = first[n] / (1 - 0.9 ** (t + 1)), second[n] / (1 - 0.95 ** (t + 1))
                x -= lr * m_hat / (v_hat.sqrt() + 0.1)
                # 6. projection
                matrix = any(part in n for part in ("qkv.w", "out.w", "fc.w", "proj.w", "wpe.w"))
                embedding = n in ("model.wte.weight", "lm_head.weight")
                bias = n.endswith("bias") and "sparse_biases" not in s
                k = floor((rho if matrix else e_t) * x.numel())
                if (matrix or embedding or bias) and k < x.numel():
                    rows = "out.w" not in n and "proj.w" not in n
                    j = 4 if matrix and "wpe" not in n else 0
                    if "floor_axis" in s:
                        rows, j = True, 4 if matrix or embedding else 0
                    kept = kept_by_sorting(x.view(-1, x.shape[-1]).tolist(), k, j, rows)
                    mask = torch.zeros(x.view(-1, x.shape[-1]).shape)
                    mask[tuple(torch.tensor(sorted(kept)).T)] = 1
                    x *= mask.view(x.shape)
                # 7. decay by hand
                if decays and "decay" not in v:
                    x -= 0.1 * lr * x
        out.append({n: x.detach().clone() for n, x in p.items()})
    return out


@pytest.fixture(scope="module")
def reference():
    return theirs("gao2025")


def distance(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_is_that_of_the_specification_and_every_field_decides(
    tmp_path, variant, reference
):
    got = ours(tmp_path, variant)
    want = reference if variant == "gao2025" else theirs(variant)
    assert len(got) == len(want) == STEPS + 1
    for t, (a, b) in enumerate(zip(got, want, strict=True)):
        assert distance(a, b) < 1e-6, (t, distance(a, b))
        assert all(torch.equal(a[n] == 0, b[n] == 0) for n in a), t
    if variant != "gao2025":  # control: the field decides
        same = [n for n in got[-1] if n in reference[-1]]
        assert len(same) >= len(reference[-1]) - 1
        assert max((got[-1][n] - reference[-1][n]).abs().max() for n in same) > 1e-4


def test_the_learning_rate_is_zero_at_first_peaks_at_0_505_at_half_time_and_ends_at_zero(tmp_path):
    """docs/method.md#learning-rate, with nothing but the defaults."""
    recipe = gao2025(str(tmp_path), 2, 1 / 4, steps=10_000, model=SHAPE, sparsity=dict(floor=0))
    module = Pretraining(SparseGPT(recipe.model), recipe.pretrain)
    lr = [module.lr(t) / 1.28e-2 for t in range(10_001)]
    assert lr[0] == 0.0 == lr[10_000]
    assert max(lr) == pytest.approx(0.505, abs=1e-3) and lr.index(max(lr)) == 5000
    densities = [recipe.pretrain.sparsity.densities(t, 10_000) for t in range(10_001)]
    assert densities[:101] == [(1.0, 1.0)] * 101 and densities[101] < (1.0, 1.0)
    assert densities[5000:] == [(1 / 16, 1 / 8)] * 5001 < densities[4999:]
    for t in range(101, 5000, 97):  # straight lines, both ending at half time
        u = (t - 100) / 4900
        assert densities[t] == pytest.approx((1 - u * 15 / 16, 1 - u * 7 / 8))
        assert lr[t] == pytest.approx((1 - (t - 100) / 9900) * (1 / 16 / densities[t][0]) ** 0.5)
    for t in range(5000, 10_001, 97):  # the factor is 1 at the target
        assert lr[t] == pytest.approx(1 - (t - 100) / 9900)


def test_the_sharkfin_of_the_replication_is_as_much_larger_as_the_target_is_small():
    def peak(sharkfin):
        config = PretrainConfig(
            train=TrainConfig(steps=1000, folder="unused"),
            sparsity=SparsityConfig(density=1 / 64, floor=0),
            sharkfin=sharkfin,
            lr=1.0,
        )
        return max(map(Pretraining(model(), config).lr, range(1000)))

    assert peak("normalised") == pytest.approx(0.505, abs=1e-3)
    assert peak("unnormalised") == pytest.approx(4.04, abs=1e-2)  # docs/method.md#learning-rate
    assert peak("none") == 1.0


def test_the_bigram_table_and_vectors_do_not_decay_and_all_share_one_gradient_size(tmp_path):
    module = Pretraining(model(), preset(tmp_path, "gao2025").pretrain)
    (group,) = module.groups()
    names = {n for n, _ in module.model.named_parameters()}
    assert set(group.params) == names and "bigram" in names
    two_axes = {n for n, p in module.model.named_parameters() if p.ndim > 1}
    assert group.decayed == two_axes - {"bigram"}


def test_pretraining_learns_scores_and_refuses_to_resume_as_something_else(tmp_path):
    rng = torch.Generator().manual_seed(3)
    start = torch.randint(0, 30, (40, 1), generator=rng)
    blocks = (start + 7 * torch.arange(8)) % 30  # every token follows from the one before
    train, held = blocks[:32], blocks[32:].split(3)
    config = gao2025(
        str(tmp_path),
        2,
        1.5,
        steps=80,
        model=SHAPE,
        train=dict(evaluate_every=30),
        lr=0.1,
    )
    torch.manual_seed(0)
    m = SparseGPT(config.model)
    before = heldout_nats(m, held)
    scores = pretrain(m, Batches(train, 8), config.pretrain, held)
    control = unigram_nats(train, held, 30)
    assert scores["ce"] < 0.7 * control and scores["ce"] < before
    assert before == pytest.approx(log(30), abs=0.1) == pytest.approx(control, abs=0.5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "val/ce" in x] == [30, 60, 80]
    assert lines[-1]["val/ce"] == scores["ce"] == heldout_nats(m, held)
    assert lines[-2]["density/matrices"] == 0.375 and lines[-2]["density/embeddings"] == 0.75
    again = SparseGPT(config.model)
    assert pretrain(again, Batches(train, 8), config.pretrain, held) == scores  # nothing to do
    other = gao2025(str(tmp_path), 2, 1.5, steps=80, model=SHAPE, lr=0.2)
    with pytest.raises(ValueError, match="lr: 0.1 there, 0.2 here"):
        pretrain(again, Batches(train, 8), other.pretrain)
    shape = SHAPE | dict(bigram_table=False, bigram_freeze_last=False)
    bare = gao2025(str(tmp_path), 2, 1.5, steps=80, model=shape, lr=0.1)
    with pytest.raises(ValueError, match="model: .* there, .* here"):
        pretrain(SparseGPT(bare.model), Batches(train, 8), bare.pretrain)


def test_held_out_loss_is_over_tokens_and_the_unigram_control_is_the_entropy():
    m = model()
    whole = heldout_nats(m, [BLOCKS])
    assert heldout_nats(m, [BLOCKS[:5], BLOCKS[5:]]) == pytest.approx(whole, rel=1e-12)
    logits = m(BLOCKS).logits[:, :-1].flatten(0, 1)
    assert whole == pytest.approx(F.cross_entropy(logits, BLOCKS[:, 1:].flatten()).item())
    unequal = [heldout_nats(m, [b]) for b in (BLOCKS[:5], BLOCKS[5:])]
    assert sum(unequal) / 2 != pytest.approx(whole, rel=1e-6)  # control: a mean of means
    with pytest.raises(ValueError, match="no token to predict"):
        heldout_nats(m, [])
    text = torch.tensor([[0, 0, 0, 1] * 1000])
    entropy = -(0.75 * log(0.75) + 0.25 * log(0.25))
    assert unigram_nats(text, [text], 2) == pytest.approx(entropy, abs=1e-3)
    assert unigram_nats(text, [torch.tensor([[0, 2, 2]])], 3) == pytest.approx(log(4003))  # unseen


def test_a_prefix_that_nothing_predicts_is_not_counted_by_the_unigram_control():
    text = torch.tensor([[0, 0, 1, 1]] * 100)
    begun = F.pad(text, (1, 0), value=2)
    nats = unigram_nats(begun, [begun], 3, prefix=(2,))
    assert nats == pytest.approx(-log(201 / 403))  # each token of text 200 times, and once more
    assert unigram_nats(begun, [begun], 3) > nats + 0.2  # control: it is counted
    with pytest.raises(ValueError, match=r"block 0 begins with \[0\]"):
        unigram_nats(text, [text], 3, prefix=(2,))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(warmup=1.0), r"warmup=1.0 must be in \[0, 1\)"),
        (dict(lr=0.0), "lr=0.0 must be above 0"),
        (dict(eps=0.0), "eps=0.0 must be above 0"),
        (dict(betas=(0.9, 1.0)), "betas="),
        (dict(weight_decay=-0.1), "weight_decay=-0.1 must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ValueError, match=f"PretrainConfig.{words}"):
        PretrainConfig(train=TrainConfig(steps=1, folder="unused"), **fields)


def test_a_budget_below_the_floor_is_refused_before_anything_is_written(tmp_path):
    config = gao2025(str(tmp_path / "run"), 2, 1 / 4, steps=9, model=SHAPE)
    with pytest.raises(ValueError, match="below the floor of 4 .*raise the density"):
        pretrain(SparseGPT(config.model), batches(), config.pretrain)
    assert not (tmp_path / "run").exists()


def test_floors_on_rows_reach_every_projected_matrix():
    plan = {b.name: (b.floor, b.dim) for b in budgets(model(), SparsityConfig(floor_axis="rows"))}
    biases = {n: how for n, how in plan.items() if n.endswith("bias")}
    assert set(biases.values()) == {(0, 0)} and "model.wte.weight" in plan
    assert {how for n, how in plan.items() if n not in biases} == {(4, 0)}
