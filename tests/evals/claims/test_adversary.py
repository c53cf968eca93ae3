"""Laws of the adversary: it finds planted harm, and never less than the masks it starts from."""

import pytest
import torch

from evals.claims.adversary import attack
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.circuits.score import circuit_logits
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still
from sparse.tasks.batch import TaskBatch, task_nats
from sparse.tasks.pair import pair_of
from sparse.tasks.task import Task

AT = "0.mlp.post_act"
CLAIMED, AGAINST, FOR = (0, 1), (2, 4), (3, 5)
"""Neurons: of the circuit; outside it, those that speak against the right answer, and for it."""


@pytest.fixture
def planted():
    """A model of which two neurons say the answer, and four others cancel each other.

    The token says the answer by the sign of channel 0. Even neurons see +, odd ones -, 3 and 4 the
    other way round. The first two write 1 for the answer into channel 1, 2 and 4 write 5 against
    it and 3 and 5 write 5 for it. With all of them or none the answer is the same; without 3 and 5
    alone it is the wrong one.
    """
    config = SparseGPTConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=2,
        intermediate_size=6, positions="none", activation_fraction=1.0, activation="relu",
    )  # fmt: skip
    model = SparseGPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for norm in (model.model.norm, model.model.blocks.get_submodule("0.norm_2")):
            norm.weight.fill_(1.0)  # pyright: ignore[reportCallIssue]
        model.model.wte.weight[0, 0], model.model.wte.weight[1, 0] = -2.0, 2.0
        sees = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
        says = torch.tensor([1.0, 1.0, -5.0, 5.0, -5.0, 5.0])
        model.model.blocks.get_parameter("0.mlp.fc.weight")[:, 0] = sees
        model.model.blocks.get_parameter("0.mlp.proj.weight")[1] = sees * says
        model.lm_head.weight[1, 1] = 1.0
    ids = torch.tensor([[0], [0], [1], [1]])
    answers = torch.tensor([0, 0, 1, 1])
    batch = TaskBatch(
        task="t", split="validation", ids=ids, real=torch.ones_like(ids).bool(),
        last=torch.zeros(4, dtype=torch.long), target=answers, foil=1 - answers,
        targets=(("a", "b"),), dropped={},
    )  # fmt: skip
    task = Task(
        name="t",
        train=(
            pair_of({"context_1": "a", "context_2": "b", "target_1": "x", "target_2": "y"}, "t"),
        ),
    )
    circuit = Circuit(
        task=task,
        nodes={"0.mlp.act_in": (0,), AT: CLAIMED, "0.mlp.resid_delta": (1,)},
        ablation={at: torch.zeros(n) for at, n in model.node_widths().items()},
        ablation_kind="zero",
        model_fingerprint=model.fingerprint(),
        d_head=2,
        target_loss=0.15,
    )
    with still(model):
        yield model, circuit, batch


def loss(model, circuit, batch, ablated):
    keep = {at: torch.ones(n, dtype=torch.bool) for at, n in model.node_widths().items()}
    keep[AT][list(ablated)] = False
    with torch.no_grad():
        return float(task_nats(circuit_logits(model, batch, keep, circuit.ablation), batch).mean())


def test_it_finds_the_planted_set_that_neither_all_nor_nothing_shows(planted):
    model, circuit, batch = planted
    none, all_four = (loss(model, circuit, batch, set_) for set_ in ((), AGAINST + FOR))
    planted_harm = loss(model, circuit, batch, FOR)
    assert max(none, all_four) < 0.5 < 1 < planted_harm
    found = attack(model, circuit, batch)
    assert found.nats >= planted_harm - 1e-6
    assert found.keep[AT].tolist() == [True, True, True, False, True, False]
    more = circuit.with_nodes([*circuit, *(Node(AT, i) for i in FOR)], "what it attacked too")
    assert attack(model, more, batch).nats < 0.5  # control: kept nodes are out of its reach


def test_it_is_never_below_its_starts_nor_the_whole_model_nor_the_circuit_alone(planted):
    model, circuit, batch = planted
    shallow = attack(model, circuit, batch, steps=0, starts=())
    with torch.no_grad():
        logits = circuit_logits(model, batch, circuit.masks(), circuit.ablation)
    alone = float(task_nats(logits, batch).mean())
    assert shallow.nats == pytest.approx(max(loss(model, circuit, batch, ()), alone), abs=1e-6)
    harmful = circuit.with_nodes(
        [Node(at, i) for at, i in circuit if at != AT] + [Node(AT, i) for i in AGAINST], "wrong"
    )
    with torch.no_grad():
        logits = circuit_logits(model, batch, harmful.masks(), circuit.ablation)
    alone = float(task_nats(logits, batch).mean())
    assert alone > 1 > loss(model, circuit, batch, ())
    kept = attack(model, harmful, batch, steps=0, starts=(1.0,))  # a start that ablates nothing
    assert kept.nats == pytest.approx(alone, abs=1e-6) and kept.ablated == 1
    starts = attack(model, circuit, batch, steps=0)
    deep = attack(model, circuit, batch, steps=20)
    assert shallow.nats <= starts.nats <= deep.nats
    keep = deep.keep
    with torch.no_grad():
        again = task_nats(circuit_logits(model, batch, keep, circuit.ablation), batch).mean()
    assert float(again) == pytest.approx(deep.nats, abs=1e-6), "the loss is that of a whole mask"
    same = attack(model, circuit, batch, steps=20)
    assert all(torch.equal(same.keep[at], keep[at]) for at in keep)


def test_against_all_nodes_it_can_do_nothing(planted):
    model, circuit, batch = planted
    whole = circuit.with_nodes(
        [Node(at, i) for at, n in model.node_widths().items() for i in range(n)], "all"
    )
    found = attack(model, whole, batch, steps=2)
    assert found.nats == pytest.approx(loss(model, circuit, batch, ()), abs=1e-6)
    assert found.ablated == 0 and all(mask.all() for mask in found.keep.values())
