"""A plan is right: parameters, state and disk to the byte, what a step keeps within a quarter."""

from dataclasses import replace
from time import sleep

import pytest
import torch
from accelerate import Accelerator

from bridges.cost.plan import plan
from bridges.cost.saved_bytes import saved
from bridges.cost.step_time import StepTime, time_steps
from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.training.config import CotrainConfig
from bridges.training.cotrain import Cotraining, cotrain
from bridges.training.validate import validation_sequences
from sparse.text.batches import Batches
from sparse.training.config import TrainConfig
from sparse.training.sparsity import SparsityConfig, project_model_

TRANSIENT = {"gradients", "a chunk of logits"}  # what a step needs beside what autograd keeps


def of_training(folder="unused", precision="no", steps=4, **fields):
    train = TrainConfig(steps=steps, folder=str(folder), mixed_precision=precision)
    sparsity = SparsityConfig(density=0.25, embedding_density=0.5, floor=1)
    return CotrainConfig(train=train, sparsity=sparsity, **fields)


def between(dense, sparse):
    return BridgeSet(BridgeConfig.between(dense, sparse, k=5))


def storages(*modules):
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def test_parameters_are_those_of_the_modules_and_kept_ones_those_of_the_projection(
    dense, sparse, bridges
):
    config = of_training()
    p = plan(dense, sparse, bridges, config, 4, 6)
    assert p.dense_parameters == sum(x.numel() for x in dense.model.parameters())
    assert p.twin_parameters == sum(x.numel() for x in sparse.parameters())
    assert p.bridge_parameters == sum(x.numel() for x in bridges.parameters())
    module = Cotraining(dense, sparse, bridges, config)
    with torch.no_grad():
        for x in sparse.parameters():
            x.normal_()
    project_model_(module.sparsifier.budgets, config.sparsity.densities(4, 4))
    assert (
        p.twin_nonzero == sum(int((x != 0).sum()) for x in sparse.parameters()) < p.twin_parameters
    )
    assert p.tokens == 4 * 4 * 6


def test_weights_gradients_and_moments_are_the_bytes_that_a_step_leaves(dense, sparse, bridges):
    p = plan(dense, sparse, bridges, of_training(), 4, 6)
    module = Cotraining(dense, sparse, bridges, of_training())
    adam = torch.optim.Adam(module.parameters(), fused=True)
    sum(module(torch.zeros(4, 6, dtype=torch.int64), 0).values()).backward()
    adam.step()
    assert p.state == {
        "dense model": sum(storages(dense.model).values()),
        "weights of twin and bridges": sum(storages(module).values()),
        "Adam's moments": sum(x.nbytes for state in adam.state.values() for x in state.values()),
    }
    grads = [x.grad for x in module.parameters()]
    assert p.step["gradients"] == sum(g.untyped_storage().nbytes() for g in grads)


def test_of_processes_that_share_the_parameters_each_holds_its_part(dense, sparse, bridges):
    config = of_training()
    shared = replace(config, train=replace(config.train, shard=True))
    one, apart = (plan(dense, sparse, bridges, c, 4, 6) for c in (shared, config))
    assert one.state == apart.state and one.step == apart.step  # one process shares with nobody
    two, apart = (plan(dense, sparse, bridges, c, 8, 6, processes=2) for c in (shared, config))
    n = apart.step["gradients"]
    assert two.step["weights, gathered"] == n and two.step["gradients"] == n + n // 2
    assert apart.memory - two.memory == apart.state["Adam's moments"] // 2 + n // 2 - n - n // 2
    assert two.disk == apart.disk and two.step.keys() - apart.step.keys() == {"weights, gathered"}


def really_kept(dense, sparse, bridges, config, rows, length):
    module = Cotraining(dense, sparse, bridges, config)
    ids = torch.randint(dense.vocab_size, (rows, length))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.mixed_precision == "bf16"):
        found, _ = saved(lambda: module(ids, 1))
    given = storages(module, dense.model)
    return sum(n for key, n in found.items() if key not in given)


@pytest.mark.parametrize(
    ("precision", "how", "d", "rows", "length"),
    [
        ("no", "sampled", 64, 5, 48),
        ("bf16", "all", 64, 5, 48),
        ("no", "all", 96, 10, 96),
        ("bf16", "sampled", 96, 10, 96),
    ],
)
def test_what_a_step_keeps_is_predicted_within_a_quarter(build, precision, how, d, rows, length):
    dense = build.dense(n_positions=96, n_embd=32, n_layer=2, vocab_size=200)
    shape = dict(hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // 16, head_dim=16)
    shape |= dict(max_position_embeddings=96, vocab_size=200, bigram_table=False)
    sparse = build.sparse(**shape)
    bridges, config = between(dense, sparse), of_training(precision=precision, hybrid_sites=how)
    real = really_kept(dense, sparse, bridges, config, rows, length)

    def predicted(rows, length):
        p = plan(dense, sparse, bridges, config, rows, length)
        assert not p.unknown
        return sum(n for name, n in p.step.items() if name not in TRANSIENT)

    assert abs(predicted(rows, length) / real - 1) < 0.25
    assert abs(predicted(2 * rows, length) / real - 1) > 0.25  # control: of another batch


def test_a_pass_of_an_accumulated_step_holds_its_share_of_the_batch(dense, sparse, bridges):
    config = of_training()
    whole = plan(dense, sparse, bridges, config, 8, 6)
    train = replace(config.train, accumulate=2)
    halves = plan(dense, sparse, bridges, replace(config, train=train), 16, 6)
    assert halves.step == whole.step and halves.tokens == 2 * whole.tokens
    assert plan(dense, sparse, bridges, config, 16, 6, processes=2).step == whole.step
    with pytest.raises(ValueError, match="9 sequences.*1 processes and 2 passes.*multiple of 2"):
        plan(dense, sparse, bridges, replace(config, train=train), 9, 6)
    for batch in (0, 1, 9):  # before a step is tried
        with pytest.raises(ValueError, match=f"batch of {batch} sequences.*multiple of 2"):
            time_steps(
                dense, sparse, bridges, replace(config, train=train), batch, 6, Accelerator()
            )


def test_a_checkpoint_on_disk_is_as_large_as_planned(build, tmp_path):
    dense = build.dense(n_embd=64)
    sparse = build.sparse(hidden_size=64, intermediate_size=256)
    bridges, config = between(dense, sparse), of_training(tmp_path, steps=1)
    p = plan(dense, sparse, bridges, config, 4, 8, text_tokens=4 * 8)
    blocks = torch.randint(dense.vocab_size, (4, 8))
    cotrain(dense, sparse, bridges, Batches(blocks, 4), config)
    files = (tmp_path / "checkpoints").rglob("*")
    real = sum(f.stat().st_size for f in files if f.is_file())
    [checkpoints] = [n for name, n in p.disk.items() if "checkpoints" in name]
    assert abs(checkpoints / (config.train.keep_checkpoints + 1) / real - 1) < 0.05
    assert p.disk["tokens of the text"] == blocks.int().nbytes


def test_a_probe_takes_the_real_step_at_growing_sizes_and_writes_nothing(
    dense, sparse, bridges, tmp_path
):
    config = of_training(tmp_path)
    config = replace(config, train=replace(config.train, accumulate=2))
    before, drawn = sparse.model.wte.weight.clone(), torch.get_rng_state()
    found = time_steps(dense, sparse, bridges, config, 8, 6, Accelerator())
    assert (found.sequences, found.length, found.device) == (8, 6, "cpu")
    assert found.seconds > 0 and found.peak > 1e7 and "resident" in found.peak_of
    assert found.tokens_per_second == pytest.approx(8 * 6 / found.seconds)
    assert not found.failed and not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(before, sparse.model.wte.weight)  # as the docstring warns
    zero = (sparse.model.wte.weight == 0).float().mean()
    assert 0.45 < zero < 0.55  # at its final density
    p = plan(dense, sparse, bridges, config, 8, 6, step_time=found)
    assert 0 < found.fixed < found.seconds
    assert found.of(8 * 6) == pytest.approx(found.seconds) and found.of(0) == found.fixed
    n = validation_sequences(config, len(bridges.config.sites), 8)
    evaluations = p.steps / (config.train.evaluate_every or p.steps)
    calibrated = -(-config.calibration_tokens // 48) * 48 / (4 + 3)  # one pass of the dense model
    assert p.validated == pytest.approx(evaluations * n * 6 * (2 + 5) / (4 + 3) + calibrated)
    want = found.of(8 * 6 * (1 + p.validated / p.tokens)) / 3600
    assert p.hours() == pytest.approx(p.steps * want)
    assert p.hours(1e9) == pytest.approx(1e9 / (8 * 6) * want)
    assert p.steps_within(2 * p.hours()) in (2 * p.steps - 1, 2 * p.steps)
    assert f"{p.hours(1e9):,.3g}" in str(p) and "resident peak" in str(p)


@pytest.mark.parametrize(("took", "largest"), [(0.01, 8), (1.0, 1)])
def test_what_a_probe_compiles_is_not_of_its_time_but_slow_steps_end_it(
    took, largest, dense, sparse, bridges, monkeypatch
):
    from bridges.cost import step_time as probing

    def slow_to_start(*given):
        sleep(0.1)
        return StepTime(device="cpu", sequences=given[4], length=6, seconds=took)

    monkeypatch.setattr(probing, "_try", slow_to_start)
    found = time_steps(dense, sparse, bridges, of_training(), 8, 6, Accelerator(), seconds=0.15)
    assert found.sequences == largest


@pytest.mark.parametrize("held", [0, 1, 2])
def test_a_probe_that_runs_out_of_memory_says_at_which_size_and_the_rest_is_planned(
    held, dense, sparse, bridges, monkeypatch
):
    from bridges.cost import step_time as probing

    tried, fit = [], probing.fit

    def small(module, batches, *args, **kwargs):
        tried.append(len(batches.ids))
        if len(tried) > held:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        fit(module, batches, *args, **kwargs)

    monkeypatch.setattr(probing, "fit", small)
    found = time_steps(dense, sparse, bridges, of_training(), 8, 6, Accelerator())
    assert tried == [1, 2, 4][: held + 1] and found.sequences == ([0, *tried])[held]
    assert found.failed == f"{2**held} x 6 tokens a process: CUDA out of memory."
    p = plan(dense, sparse, bridges, of_training(), 8, 6, step_time=found)
    assert "CUDA out of memory." in str(p) and f"{p.twin_parameters:,}" in str(p)
    assert (p.hours() is None) == (held == 0)


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(
    dense, sparse, bridges, monkeypatch
):
    def broken(*args, **kwargs):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr("bridges.cost.step_time.fit", broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        time_steps(dense, sparse, bridges, of_training(), 4, 6, Accelerator())


def test_a_dense_model_that_cannot_be_counted_is_named_and_the_rest_is_planned(
    dense, sparse, bridges, monkeypatch
):
    def forward(*args, **kwargs):
        return torch.zeros(3).nonzero()  # as a router of experts does

    monkeypatch.setattr(dense.model, "forward", forward)
    p = plan(dense, sparse, bridges, of_training(), 4, 6)
    assert len(p.unknown) == 1 and "tail: DynamicOutputShapeException" in p.unknown[0]
    assert p.step["kept of the dense model's layers"] == 0 and p.unknown[0] in str(p)


def test_the_table_says_without_a_probe_that_no_speed_is_known(dense, sparse, bridges):
    p = plan(
        dense, sparse, bridges, of_training(), 4, 6, step_time=StepTime(device="cpu", failed="no")
    )
    assert p.hours() is None and "tokens/s" not in str(p)
    assert "probed" not in str(replace(p, step_time=None))
