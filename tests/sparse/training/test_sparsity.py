from math import log

import pytest
import torch

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.training.sparsity import Anneal, SparsityConfig, budgets, check_budgets, project_model_


def test_the_density_is_one_then_a_line_then_the_target():
    steps = 1000
    anneal = SparsityConfig(density=1 / 64).anneal(steps)
    assert [anneal.keep(t) for t in (0, 5, 10)] == [1.0, 1.0, 1.0]
    assert [anneal.keep(t) for t in (500, 501, 999, 5000)] == [1 / 64] * 4
    for t in range(10, 501):
        assert anneal.keep(t) == pytest.approx(1 - (t - 10) / 490 * (1 - 1 / 64), abs=1e-12)
    assert anneal.keep(499) > 1 / 64


def test_the_sharkfin_factor_is_one_at_the_target_and_smaller_before():
    anneal = Anneal(target=1 / 16, start=10, end=50)
    assert anneal.lr_scale(0) == 0.25 and anneal.lr_scale(50) == anneal.lr_scale(99) == 1.0
    scales = [anneal.lr_scale(t) for t in range(10, 51)]
    assert scales == sorted(scales)
    for t in range(60):
        assert anneal.lr_scale(t) == pytest.approx((anneal.target / anneal.keep(t)) ** 0.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 99, 100, 1001])
def test_any_number_of_steps_has_a_schedule_that_ends_at_the_target(steps):
    config = SparsityConfig(density=0.1, embedding_density=0.4)
    assert config.densities(steps, steps) == (0.1, pytest.approx(0.4))
    assert config.densities(0, steps) == (1.0, 1.0)


def test_embeddings_anneal_in_step_with_the_matrices_or_late():
    linked = SparsityConfig(density=1 / 64, embedding_density=1 / 16, anneal_start=0.0)
    late = SparsityConfig(
        density=1 / 64, embedding_density=1 / 16, anneal_start=0.0, embedding_anneal="late"
    )
    for t in range(0, 1001, 50):
        rho, e = linked.densities(t, 1000)
        # e_t = lerp(e_T, 1, (rho_t - rho_T) / (1 - rho_T)), docs/method.md#the-anneal
        assert e == pytest.approx(1 / 16 + (rho - 1 / 64) / (1 - 1 / 64) * (1 - 1 / 16))
        assert late.densities(t, 1000) == (rho, pytest.approx(min(1, 4 * rho)))
    assert late.densities(375, 1000)[1] == 1.0 > linked.densities(375, 1000)[1]
    assert late.densities(500, 1000)[1] == pytest.approx(1 / 16)


def small(**fields):
    torch.manual_seed(0)
    return SparseGPT(
        SparseGPTConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=4,
            intermediate_size=32,
            max_position_embeddings=10,
            positions="learned",
            bigram_table=True,
            **fields,
        )
    )


def test_the_plan_names_every_tensor_that_is_projected_and_how():
    plan = {b.name: (b.is_embedding, b.floor, b.dim) for b in budgets(small(), SparsityConfig())}
    blocks = {}
    for i in (0, 1):
        for name in ("attn.qkv", "attn.out", "mlp.fc", "mlp.proj"):
            dim = int(name in ("attn.out", "mlp.proj"))
            blocks[f"model.blocks.{i}.{name}.weight"] = (False, 4, dim)
            blocks[f"model.blocks.{i}.{name}.bias"] = (True, 0, 0)
    ends = {"model.wte.weight": (True, 0, 0), "lm_head.weight": (True, 0, 0)}
    assert plan == blocks | ends | {"model.wpe.weight": (False, 0, 0)}
    matrices = {b.name for b in budgets(small(), SparsityConfig(sparse_biases=False))}
    assert matrices == {name for name in plan if not name.endswith("bias")}


def test_projecting_the_model_leaves_exactly_the_budgets_and_touches_nothing_else():
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = SparsityConfig(density=0.3, embedding_density=0.5, floor=2)
    plan = budgets(model, config)
    project_model_(plan, config.densities(100, 100))
    for b in plan:
        density = 0.5 if b.is_embedding else 0.3
        assert b.weight.count_nonzero() == int(density * b.weight.numel()), b.name
        if b.floor:
            assert b.weight.count_nonzero(dim=1 - b.dim).min() >= 2, b.name
    projected = {b.name for b in plan}
    spared = {name for name in before if name not in projected}
    assert {name.split(".")[-2] for name in spared if "norm" in name}
    assert any("sinks" in name for name in spared) and "bigram" in spared
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in spared), name


def test_a_density_of_one_leaves_the_model_alone():
    model = small()
    before = model.fingerprint()
    project_model_(budgets(model, SparsityConfig()), (1.0, 1.0))
    assert model.fingerprint() == before


def test_a_final_budget_below_the_floor_is_refused_with_the_density_that_would_do():
    config = SparsityConfig(density=0.01)
    plan = budgets(small(), config)
    with pytest.raises(ValueError, match="blocks.0.attn.qkv.weight: .* raise the density") as error:
        check_budgets(plan, (0.01, 0.25))
    needed = float(str(error.value).split("at least ")[1].split()[0])
    assert needed == pytest.approx(4 * 24 / (24 * 16))
    check_budgets(budgets(small(), SparsityConfig(floor=0)), (0.01, 0.25))
    check_budgets(plan, (0.51, 0.25))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(density=0.0), r"density=0.0 must be in \(0, 1\]"),
        (dict(embedding_density=1.5), r"embedding_density=1.5 must be in \(0, 1\]"),
        (dict(floor=-1), "floor=-1"),
        (dict(anneal_start=0.5, anneal_end=0.5), "anneal_start < anneal_end"),
        (dict(anneal_end=1.1), "anneal_end <= 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SparsityConfig(**fields)


def test_an_anneal_that_makes_no_sense_is_refused():
    for fields in (dict(target=0.0), dict(target=2.0), dict(start=5), dict(start=-1)):
        with pytest.raises(ValueError, match="Anneal"):
            Anneal(**(dict(target=0.5, start=0, end=5) | fields))


def test_the_biases_of_norms_and_fixed_tables_are_not_projected_and_a_tied_matrix_is_once():
    rare = dict(norm="layer", norm_bias=True, tie_word_embeddings=True)
    beside = dict(positions="concatenated", position_channels=4, position_sinusoids=True)
    config = SparseGPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, **rare, **beside)
    names = [b.name for b in budgets(SparseGPT(config), SparsityConfig(floor=0))]
    assert not [n for n in names if "norm" in n or "wpe" in n or "lm_head" in n]
    assert names.count("model.wte.weight") == 1 and "model.blocks.0.mlp.fc.bias" in names


def test_a_log_anneal_is_a_straight_line_in_log_step_and_log_density():
    anneal = Anneal(target=1 / 64, start=10, end=1000, mode="log")
    assert [anneal.keep(t) for t in (0, 10)] == [1.0, 1.0]
    assert [anneal.keep(t) for t in (1000, 5000)] == [1 / 64] * 2
    assert anneal.keep(100) == pytest.approx(1 / 8)  # half way in log step
    slope = [log(anneal.keep(t)) / log(t / 10) for t in range(11, 1000, 13)]
    assert slope == pytest.approx([slope[0]] * len(slope))
    with pytest.raises(ValueError, match="start must be above 0"):
        Anneal(target=1 / 64, start=0, end=10, mode="log")
