"""The shipped pair, its circuits, and trials of a few of their pairs."""

from dataclasses import replace

import pytest
import torch

from bridges import DenseCircuit, load_run
from evals.trials.prompts import picked
from evals.trials.twin_trial import TwinTrial
from sparse.circuits.graph import nodes_of

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
