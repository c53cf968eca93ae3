"""The paths through the library, each as a function of the device that it runs on.

    python -m tests.helpers.device_paths DEVICE NAME

runs a path on the CPU and on DEVICE, "cuda" or "other" (other_device.py), and prints one JSON
object: the numbers of both, and how often the host waited for "other".
"""

import json
import sys
import tempfile
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from bridges import (
    BridgeConfig,
    BridgeSet,
    CotrainConfig,
    cotrain,
    fit_sites,
    load_run,
    map_circuit,
    plan,
    time_steps,
    validate,
)
from bridges.training.cotrain import Cotraining
from evals import evaluate_bridge, evaluate_circuit, evaluate_transfer
from sparse import (
    Batches,
    PretrainConfig,
    PruneConfig,
    SparsityConfig,
    TrainConfig,
    extract,
    get_task,
    heldout_nats,
    node_means,
    pretrain,
    prune,
    task_table,
)
from sparse.training.groups import scale_
from tests.helpers.other_device import OtherDevice
from tests.helpers.pair import LENGTH, VOCAB, build_dense, build_sparse

BLOCKS = torch.randint(VOCAB, (16, LENGTH), generator=torch.Generator().manual_seed(0))
SPARSITY = SparsityConfig(density=0.5, embedding_density=0.5, floor=1, anneal_start=0.0)
TASK = "single_double_quote"
Numbers = dict[str, float]


def accelerator(device: str, precision: str = "no") -> Accelerator:
    """An accelerator on `device`; that of the path before it is forgotten."""
    AcceleratorState._reset_state(True)
    made = Accelerator(cpu=device != "cuda", mixed_precision=precision)
    if device == "other":
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = torch.device(device, 0)
    assert made.device.type == device
    return made


def pair(device: str):
    """A tiny dense model, twin and bridges, with a limit that makes some tokens outlying."""
    dense, twin = build_dense(), build_sparse()
    bridges = BridgeSet(BridgeConfig.between(dense, twin, k=4))
    dense.model.to(device), twin.to(device), bridges.to(device)
    h = dense.residuals(BLOCKS[:4].to(device))
    bridges.calibrate(h)
    with torch.no_grad():
        bridges.limit.copy_(torch.stack([x.norm(dim=-1).median() for x in h]))
    return dense, twin, bridges


def built_in(device: str):
    """The run that comes with the library."""
    run = load_run("tiny")
    run.dense.model.to(device), run.sparse.to(device), run.bridges.to(device)
    return run


def twin(device: str) -> Numbers:
    """Forward, backward, padding on the left, generation."""
    model, ids = build_sparse().to(device), BLOCKS[:4].to(device)
    loss = model(ids, labels=ids).loss
    loss.backward()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded = model(ids, attention_mask=mask).logits[:, -1]
    said = model.generate(ids[:, :2], max_new_tokens=3, do_sample=False, pad_token_id=0)
    slope = sum(p.grad.square().sum() for p in model.parameters())
    return dict(loss=loss.item(), slope=slope.item(), padded=padded.square().mean().item()) | {
        f"token {i}": float(t) for i, t in enumerate(said.flatten().tolist())
    }


def dense(device: str) -> Numbers:
    """Residuals, a pass resumed from each, outlying tokens."""
    model, _, bridges = pair(device)
    ids = BLOCKS[:4].to(device)
    h = model.residuals(ids)
    model.describe(ids.cpu())
    kept = bridges.ordinary_tokens(model, BLOCKS[:4])
    ends = {str(s): model.resume(s, x, ids).square().mean().item() for s, x in enumerate(h)}
    return ends | {"ordinary": kept.float().mean().item()}


def steps(device: str) -> Numbers:
    """Three co-training steps by hand, with sites and positions drawn; the third one's losses."""
    model, sparse, bridges = pair(device)
    train = TrainConfig(steps=9, folder="never written")
    config = CotrainConfig(train=train, sparsity=SPARSITY, hybrid_tokens=0.5)
    module = Cotraining(model, sparse, bridges, config)
    groups, ids, terms = module.groups(), BLOCKS[:4].to(device), {}
    adam = [{"params": list(g.params.values()), "eps": g.eps} for g in groups]
    optimizer = torch.optim.Adam(adam, lr=1e-2, fused=True)
    for step in range(3):
        waits.clear()
        optimizer.zero_grad()
        terms = module(ids, step)
        torch.stack(list(terms.values())).sum().backward()
        for g in groups:
            scale_(list(g.params.values()), g.scaling)
        optimizer.step()
        module.sparsifier.project(8)
    waits_of_a_step.update(waits)
    kept = sum(int((p != 0).sum()) for p in sparse.parameters())
    return {name: x.item() for name, x in terms.items()} | {"kept": kept}


def cotraining(device: str, precision: str = "no") -> Numbers:
    """`cotrain`, with passes, validation and checkpoints, and the probe of a step."""
    model, sparse, bridges = pair("cpu")
    made = accelerator(device, precision)
    with tempfile.TemporaryDirectory() as folder:
        train = TrainConfig(steps=3, folder=folder, accumulate=2, mixed_precision=precision)
        config = CotrainConfig(train=train, sparsity=SPARSITY, calibration_tokens=20)
        assert time_steps(*pair("cpu"), config, 4, LENGTH, made).seconds
        cotrain(model, sparse, bridges, Batches(BLOCKS, 4), config, [BLOCKS[:2]], made)
    assert sparse.lm_head.weight.device.type == device
    memory = plan(model, sparse, bridges, config, 4, LENGTH).memory
    found = validate(model, sparse, bridges, [BLOCKS[:4]], device)
    return found | {"planned MB": memory / 1e6}


def cotraining_bf16(device: str) -> Numbers:
    return cotraining(device, "bf16")


def pretraining(device: str) -> Numbers:
    """`pretrain`, stopped in the middle and resumed from its checkpoint."""
    model = build_sparse()
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig(train=TrainConfig(steps=4, folder=folder), sparsity=SPARSITY)
        pretrain(model, Batches(BLOCKS, 4), config, [BLOCKS[:2]], accelerator(device))
        resumed = build_sparse(seed=1)
        pretrain(resumed, Batches(BLOCKS, 4), config, [BLOCKS[:2]], accelerator(device))
    return {name: heldout_nats(m, [BLOCKS]) for name, m in (("one", model), ("other", resumed))}


def sites(device: str) -> Numbers:
    """`fit_sites` and `task_table`."""
    run = built_in(device)
    fitted = fit_sites(run.dense, run.sparse, [run.heldout()[:2]], device=device)
    scores = task_table(run.dense, tasks=[get_task(TASK)]).scores
    return {f"score {i}": row.nats for i, row in enumerate(scores)} | {
        str(s): float(x) for s, x in enumerate(fitted.encoder_fvu.diagonal())
    }


def pruning(device: str) -> Numbers:
    """`prune`, the circuit's edges, and its extraction."""
    run = built_in(device)
    config = PruneConfig(n_steps=3, n_pairs=8, n_trials=3)
    means = node_means(run.sparse, run.heldout()[:4])
    task = get_task(TASK)
    found = prune(run.sparse, task, config, tokenizer=run.tokenizer, means=means, force=True)
    circuit = run.circuits()[TASK]
    ids = run.heldout()[:2, :16].to(device)
    sliced = extract(circuit, run.sparse, "sliced")(ids)
    return found.loss | {
        "weights": sum(e.weight for e in circuit.edges(run.sparse)),
        "sliced": sliced.square().mean().item(),
    }


def mapping(device: str) -> Numbers:
    """`map_circuit`, the choice of a site, ablation and steering in the dense model."""
    run = built_in(device)
    circuit = run.circuits()[TASK]
    mapped = map_circuit(circuit, run.dense, run.bridges, sparse_model=run.sparse)
    batch = circuit.task.batch(run.tokenizer, "test").take(torch.arange(4)).to(device)
    logits = mapped.ablate(batch.ids)
    return {"site": float(mapped.site), "ablated": logits.square().mean().item()}


def evaluation(device: str) -> Numbers:
    """The claims about bridges and about a circuit, on as few prompts as they take."""
    run = built_in(device)
    found = run.circuits()
    few = dict(nonsense=found[f"{TASK}:nonsense"], draws=19, max_pairs=8, facts=False)
    rows = evaluate_bridge(run, run.heldout()[:2], draws=1)
    rows += evaluate_circuit(run.sparse, found[TASK], run.tokenizer, **few).rows
    return {f"{row.key} {i}": float(row.value) for i, row in enumerate(rows)}


def transfer(device: str) -> Numbers:
    """The claims about a mapped circuit, on as few prompts as they take."""
    run = built_in(device)
    found = run.circuits()
    mapped = map_circuit(found[TASK], run.dense, run.bridges, sparse_model=run.sparse)
    few = dict(nonsense=found[f"{TASK}:nonsense"], draws=19, max_pairs=8, facts=False)
    claims = evaluate_transfer(mapped, tokenizer=run.tokenizer, **few).claims
    conditions = [c for claim in claims for c in claim.conditions]
    return {c.key: float(c.value) for c in conditions} | {c.kind: c.value for c in claims}


PATHS = (twin, dense, steps, cotraining, cotraining_bf16, pretraining, sites)
PATHS = {path.__name__: path for path in (*PATHS, pruning, mapping, evaluation, transfer)}
waits: dict[str, int] = {}
waits_of_a_step: dict[str, int] = {}


def main(device: str, name: str) -> None:
    global waits
    other = OtherDevice() if device == "other" else None  # before the first backward pass
    said = {"cpu": PATHS[name]("cpu")}
    with other or nullcontext():
        waits = other.waits if other else waits
        waits_of_a_step.clear()
        said[device] = PATHS[name](device)
    sys.stdout.write("\n" + json.dumps(said | {"waits": dict(waits_of_a_step)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
