"""A tiny dense model, a tiny sparse one, bridges between them, and one model as both sides."""

import copy
from types import SimpleNamespace

import pytest
import torch

from bridges.maps.bridge import BridgeConfig, BridgeSet
from dense import DenseModel
from sparse.circuits.circuit import Circuit
from sparse.tasks.pair import Pair
from sparse.tasks.task import Task
from tests.helpers.pair import LENGTH, VOCAB, WORDS, build_dense, build_sparse, build_tokenizer


def build_identity(d, n_sites):
    bridges = BridgeSet(
        BridgeConfig(d_dense=d, d_sparse=d, n_dense_sites=n_sites, n_sparse_sites=n_sites, k=d)
    )
    with torch.no_grad():
        for layer in [*bridges.encoders, *bridges.decoders]:
            layer.weight.copy_(torch.eye(d))
    return bridges


@pytest.fixture(scope="session")
def build():
    """`build.dense(...)` and `build.sparse(...)` make models of other shapes and seeds."""
    return SimpleNamespace(dense=build_dense, sparse=build_sparse)


@pytest.fixture(scope="session")
def dense():
    return build_dense()


@pytest.fixture
def sparse():
    return build_sparse()


@pytest.fixture
def bridges(dense, sparse, ids):
    """Random bridges whose centring and scale are the data's."""
    made = BridgeSet(BridgeConfig.between(dense, sparse, k=7), seed=1)
    made.calibrate(dense.residuals(ids))
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return made


@pytest.fixture(scope="session")
def ids():
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (5, LENGTH), generator=rng)


@pytest.fixture(scope="session")
def twice():
    """One model as the dense and the sparse side, joined by identity maps: perfect bridges.

    It keeps all its activations, so that k = d everywhere.
    """
    sparse = build_sparse(seed=2, activation_fraction=1.0, bigram_table=False)
    dense = DenseModel(copy.deepcopy(sparse), build_tokenizer())
    bridges = build_identity(sparse.d_resid, sparse.n_sites)
    return SimpleNamespace(dense=dense, sparse=sparse, bridges=bridges)


@pytest.fixture(scope="session")
def task():
    """A or B opened the line: yes or no?"""
    rng = torch.Generator().manual_seed(3)
    words = torch.randint(5, VOCAB, (60, LENGTH - 1), generator=rng).tolist()
    lines = [" ".join(WORDS[i] for i in row) for row in words]
    pairs = tuple(
        Pair(context_1=f"A {line}", context_2=f"B {line}", target_1=" yes", target_2=" no")
        for line in lines
    )
    return Task(name="opening", train=pairs[:20], validation=pairs[20:40], test=pairs[40:])


@pytest.fixture
def circuit_of(task):
    """`circuit_of(sparse, nodes)`: a circuit of these nodes, of all nodes by default."""

    def make(sparse, nodes=None, kind="mean"):
        widths = sparse.node_widths()
        nodes = {at: tuple(range(n)) for at, n in widths.items()} if nodes is None else nodes
        rng = torch.Generator().manual_seed(4)
        values = {at: torch.randn(n, generator=rng) for at, n in widths.items()}
        if kind == "zero":
            values = {at: torch.zeros(n) for at, n in widths.items()}
        return Circuit(
            task=task,
            nodes=nodes,
            ablation=values,
            ablation_kind=kind,
            model_fingerprint=sparse.fingerprint(),
            d_head=sparse.config.head_dim,
            target_loss=0.15,
            source=sparse.source,
        )

    return make
