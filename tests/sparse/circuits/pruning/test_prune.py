from dataclasses import replace

import pytest
import torch

from sparse.circuits.mask import masked
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.prune import prune
from sparse.circuits.score import last_logits
from sparse.storage.hub import Source
from sparse.tasks.batch import task_nats

FAST = PruneConfig(n_steps=60, n_pairs=16, k_coef=3e-3, lr=5e-2)


def found(planted, words, **changes):
    config = replace(FAST, **changes)
    return prune(planted.model, planted.task, config, tokenizer=words, means=planted.means)


def test_pruning_finds_exactly_the_planted_circuit_from_nearly_every_seed(planted, words):
    circuits = [found(planted, words, seed=seed) for seed in range(10)]
    exact = [circuit.nodes == planted.nodes and circuit.met for circuit in circuits]
    assert sum(exact) >= 9, [dict(circuit.nodes) for circuit in circuits]
    assert all(circuit.loss["circuit/test"] <= 0.15 for circuit in circuits)


def test_control_no_small_circuit_does_the_nonsense_twin(planted, words):
    """The twin's targets are unknown to the model: whatever is found is far from the target."""
    swapped = tuple(replace(p, target_1=" w1", target_2=" w2") for p in planted.task.train)
    twin = replace(planted.task, name="twin", train=swapped, validation=(), test=())
    circuit = prune(planted.model, twin, FAST, tokenizer=words, means=planted.means, force=True)
    assert not circuit.met and "NOT met" in " ".join(circuit.notes)
    assert any("full model itself" in note for note in circuit.notes)
    assert any("no validation split" in note for note in circuit.notes)
    assert set(circuit.loss) == {
        f"{what}/train" for what in ("full", "circuit", "empty", "complement", "calibrated")
    }


def test_the_record_holds_every_loss_and_they_are_the_models_own(planted, words):
    circuit = found(planted, words)
    model, loss = planted.model, circuit.loss
    batch = planted.task.batch(words, "test")
    with torch.no_grad():
        full = task_nats(batch.scored(model(batch.ids).logits), batch).mean().item()
        with masked(model, circuit.masks(), circuit.ablation):
            kept = task_nats(last_logits(model, batch), batch).mean().item()
    assert loss["full/test"] == pytest.approx(full, abs=1e-5)
    assert loss["circuit/test"] == pytest.approx(kept, abs=1e-6)
    assert min(loss["empty/test"], loss["complement/test"]) > 0.6 > 0.15 > loss["full/test"]
    assert loss["calibrated/train"] <= loss["circuit/train"] + 1e-6
    assert circuit.config["target_loss"] == 0.15 and circuit.config["curve"][0][0] == 0


def test_pruning_is_a_function_of_the_seed_and_leaves_the_model_alone(planted, words):
    model = planted.model
    before = model.fingerprint()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    one, two = found(planted, words, seed=3), found(planted, words, seed=3)
    assert one.to_dict() == two.to_dict()
    assert model.training and model.fingerprint() == before
    assert not model.lm_head.weight.requires_grad and model.model.wte.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    model.eval().requires_grad_(True)


def test_zero_ablation_needs_no_means_and_no_clean_up_drops_nothing(planted, words):
    config = replace(FAST, ablation="zero", clean_up=0.0)
    circuit = prune(planted.model, planted.task, config, tokenizer=words)
    assert circuit.ablation_kind == "zero" and not any(v.any() for v in circuit.ablation.values())
    assert len(circuit) == circuit.config["k_before_clean_up"]
    assert circuit.resized(len(circuit)).nodes == circuit.nodes  # the ranking is the one it used


def test_an_impossible_target_returns_the_best_there_is(planted, words):
    circuit = found(planted, words, target_loss=1e-6, n_steps=5)
    assert not circuit.met and len(circuit.notes) == 2
    assert circuit.loss["circuit/validation"] == pytest.approx(
        min(nats for _, nats in circuit.config["curve"]), abs=1e-6
    )


def test_what_is_missing_is_named_with_the_argument_that_gives_it(planted, words, tmp_path):
    model, task = planted.model, planted.task
    with pytest.raises(ValueError, match="tokenizer="):
        prune(model, task)
    with pytest.raises(ValueError, match="means="):
        prune(model, task, tokenizer=words)
    wrong = {at: value[:-1] for at, value in planted.means.items()}
    with pytest.raises(ValueError, match="make them with node_means"):
        prune(model, task, tokenizer=words, means=wrong)
    model.source = Source(str(tmp_path), "0")
    try:
        with pytest.raises(ValueError, match="no tokenizer in"):
            prune(model, task)
        with pytest.raises(ValueError, match="node_means.safetensors is missing"):
            prune(model, task, tokenizer=words)
    finally:
        model.source = None


def test_a_foreign_tokenizer_is_refused(planted, bpe):
    with pytest.raises(ValueError, match="17 logits"):
        prune(planted.model, planted.task, FAST, tokenizer=bpe, means=planted.means)


def test_a_number_added_to_all_logits_changes_no_loss(planted, words):
    batch = planted.task.batch(words, "test")
    with torch.no_grad():
        logits = last_logits(planted.model, batch)
    torch.testing.assert_close(task_nats(logits + 7.0, batch), task_nats(logits, batch))
    assert (task_nats(1.5 * logits, batch) != task_nats(logits, batch)).all()  # a factor does


@pytest.mark.parametrize(
    "field", [{"target_loss": 0.0}, {"margin": 1.0}, {"theta": -1.0}, {"lr": 0.0}, {"n_steps": -1}]
)
def test_an_impossible_config_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        PruneConfig(**field)
    with pytest.raises(ValueError, match="unknown keys"):
        PruneConfig.from_dict({"target": 0.1})
    assert PruneConfig.from_dict({"target_loss": 0.1}).target_loss == 0.1
