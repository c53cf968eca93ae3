"""Trained small models, circuits whose worth is known, and the shipped pair."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bridges import DenseCircuit, load_run
from dense import DenseModel
from evals.trials.prompts import picked
from evals.trials.twin_trial import TwinTrial
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import nodes_of
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import task_nats
from sparse.tasks.own import SPLITS
from sparse.tasks.suite import get_task


@pytest.fixture(scope="session")
def dense():
    return DenseModel.from_pretrained("tiny")


@pytest.fixture(scope="session")
def task():
    return get_task("single_double_quote")


def sparse_model(dense, seed=0):
    torch.manual_seed(seed)
    config = SparseGPTConfig(
        vocab_size=dense.vocab_size,
        hidden_size=24,
        num_hidden_layers=dense.n_layers,
        num_attention_heads=4,
        head_dim=4,
        intermediate_size=32,
        activation_fraction=0.5,
        initializer_range=0.2,
    )
    return SparseGPT(config).eval()


@pytest.fixture(scope="session")
def sparse(dense, task):
    """A sparse model that was taught the task on all its splits, and nothing else.

    On the train split alone this small one learns its frames, and not the other splits'.
    """
    model = sparse_model(dense)
    batches = [task.batch(dense.tokenizer, split) for split in SPLITS]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    for step in range(150):
        batch = batches[step % len(batches)]
        part = batch.take(torch.randperm(batch.n_pairs, generator=rng)[:24])
        loss = task_nats(part.scored(model(part.ids).logits), part).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model.eval().requires_grad_(False)


def circuit_of(model, task, nodes, kind="zero"):
    widths = model.node_widths()
    return Circuit(
        task=task,
        nodes=nodes,
        ablation={at: torch.zeros(width) for at, width in widths.items()},
        ablation_kind=kind,
        model_fingerprint=model.fingerprint(),
        d_head=model.config.head_dim,
        target_loss=0.15,
    )


@pytest.fixture
def make_circuit(sparse, task):
    return lambda nodes, kind="zero": circuit_of(sparse, task, nodes, kind)


@pytest.fixture
def everything(sparse, make_circuit):
    return make_circuit({at: tuple(range(n)) for at, n in sparse.node_widths().items()})


@pytest.fixture
def blocks(dense):
    text = open(torch.__file__, encoding="utf-8").read()[:20000]
    ids = torch.tensor(dense.tokenizer(text)["input_ids"])
    return ids[: 12 * 32].view(12, 32)


@pytest.fixture
def run(dense, sparse):
    from bridges.maps.bridge import BridgeConfig, BridgeSet

    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=12)).eval()
    return SimpleNamespace(dense=dense, sparse=sparse, bridges=bridges)


# The shipped pair, its circuits, and trials of a few of their pairs.

QUOTES = "single_double_quote"


@pytest.fixture(scope="session")
def tiny():
    return load_run("tiny")


@pytest.fixture(scope="session")
def found(tiny):
    """The circuits of the shipped pair, by task name."""
    return tiny.circuits()


@pytest.fixture(scope="session")
def quotes(found):
    return found[QUOTES]


@pytest.fixture(scope="session")
def nonsense(found):
    """The circuit of quotes' nonsense twin."""
    return found[f"{QUOTES}:nonsense"]


@pytest.fixture(scope="session")
def mapped(tiny):
    """A circuit of the shipped pair as interventions on its dense model; other bridges at will."""
    return lambda circuit, bridges=None: DenseCircuit(
        circuit=circuit,
        sparse=tiny.sparse,
        bridges=tiny.bridges if bridges is None else bridges,
        dense=tiny.dense,
        site=0,
    )


@pytest.fixture(scope="session")
def batch_of(tiny):
    """The first pairs of a seeded choice of a task's split."""

    def batch(task, split="test", pairs=10_000):
        found = task.batch(tiny.tokenizer, split)
        return found.take(picked(found, pairs))

    return batch


@pytest.fixture(scope="session")
def twin_trial(tiny, batch_of):
    return lambda circuit, pairs=16: TwinTrial(tiny.sparse, batch_of(circuit.task, pairs=pairs))


@pytest.fixture(scope="session")
def random_of():
    """As many nodes as a circuit has, from anywhere in the model."""

    def random(circuit, seed=0):
        everything = nodes_of(circuit.ablation)
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        return circuit.with_nodes([everything[i] for i in order[: len(circuit)].tolist()], "random")

    return random


@pytest.fixture(scope="session")
def asked_on():
    """A circuit, asked on the task of another one."""
    return lambda circuit, other: replace(circuit, task=other.task)
