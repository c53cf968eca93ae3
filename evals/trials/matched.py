"""Control circuits: nodes that are not of a circuit, equally many at each of its locations.

    location    location l has n_l nodes of the circuit; the control has n_l others there
    activity    a_i = mean over tokens of |x_i - mu_i|; each of its nodes has about that of its own
                counterpart in the circuit: one of the NEAREST nodes in log a that are left

x_i is the value of node i and mu_i the one that ablation holds it at. So the control moves as much
as the circuit when it is ablated, and knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node, nodes_of
from sparse.circuits.taps import recorded
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import TaskBatch

NEAREST = 8
"""Nodes of nearest activity among which one is drawn."""
SMALL = 1e-6
"""Added to activities before their logarithm, so that dead nodes are far from live ones."""
NONSENSE = "nonsense"
"""The name of the nonsense twin's circuit among the namesakes."""
Activity = Mapping[str, Float[Tensor, " _"]]


@torch.no_grad()
def activity_of(model: SparseGPT, circuit: Circuit, batch: TaskBatch) -> Activity:
    """Return a_i for every node of the model, over the real tokens of the prompts."""
    with recorded(model) as values:
        model.model(batch.ids, use_cache=False)
    real = batch.real[..., None]
    found = {}
    for at, x in values.items():
        gap = (x - circuit.ablation[at].to(x)).abs() * real
        found[at] = (gap.sum((0, 1)) / real.sum()).cpu()
    return found


def apart(circuit: Circuit, seed: int, activity: Activity | None = None) -> Circuit:
    """Return equally many other nodes at every location of the circuit, drawn at random.

    With `activity`, each is about as active as its counterpart. Where a location has too few other
    nodes, all of them are taken.
    """
    rng = torch.Generator().manual_seed(seed)
    nodes: list[Node] = []
    for at, own in circuit.nodes.items():
        taken = set(own)
        others = [i for i in range(len(circuit.ablation[at])) if i not in taken]
        order = torch.randperm(len(others), generator=rng).tolist()
        free = [others[i] for i in order]
        if activity is None:
            nodes += [Node(at, i) for i in free[: len(own)]]
        else:
            nodes += [Node(at, i) for i in _alike(own, free, activity[at], rng)]
    return circuit.with_nodes(nodes, f"other nodes, seed {seed}, alike={activity is not None}")


def _alike(
    own: tuple[int, ...], free: list[int], activity: Tensor, rng: torch.Generator
) -> list[int]:
    """Return one node of `free` for each of `own`, of about its activity, none twice."""
    log = (activity.double() + SMALL).log()
    left = torch.tensor(free)
    picked = []
    for k in torch.randperm(len(own), generator=rng).tolist():
        if not len(left):
            break
        near = (log[left] - log[own[k]]).abs().argsort(stable=True)[:NEAREST]
        chosen = int(near[torch.randint(len(near), (1,), generator=rng)])
        picked.append(int(left[chosen]))
        left = torch.cat([left[:chosen], left[chosen + 1 :]])
    return picked


def at_size(namesake: Circuit, circuit: Circuit, exactly: bool = False) -> Circuit:
    """Return a namesake with no more nodes than the circuit, the first of its own ranking.

    With `exactly` it gets as many as the circuit had before its clean-up, also where that is more
    than it has, so that it never has fewer than the circuit. Without a ranking it is returned as it
    is.
    """
    if not namesake.ranking:
        return namesake
    if exactly:
        return namesake.resized(max(len(circuit), circuit.config.get("k_before_clean_up", 0)))
    return namesake.resized(len(circuit)) if len(namesake) > len(circuit) else namesake


def outside(nonsense: Circuit, circuit: Circuit) -> Circuit:
    """Return the first nodes of another circuit's ranking that are not of `circuit`, equally many.

    Where its ranking is not known, its own nodes that are not of `circuit` are taken, in forward
    order and at most as many.
    """
    own = set(circuit)
    ranked = ranked_nodes(nonsense) if nonsense.ranking else list(nonsense)
    free = [node for node in ranked if node not in own]
    return nonsense.with_nodes(free[: len(circuit)], f"outside {circuit.task.name}")


def called(name: str) -> str:
    """Return a namesake in words; "nonsense" is the circuit of the nonsense twin."""
    return "the nonsense twin's circuit" if name == NONSENSE else f"the circuit for {name}"


def namesakes_of(found: Mapping[str, Circuit], name: str) -> dict[str, Circuit]:
    """Return the circuits for tasks of other families than this one's, without nonsense twins'.

    >>> from bridges import load_run
    >>> from evals import namesakes_of
    >>> list(namesakes_of(load_run("tiny").circuits(), "else_elif"))[:2]
    ['if_equals', 'indent_for']
    """
    own = found[name].task.family
    return {n: c for n, c in found.items() if c.task.family != own and not n.endswith(":nonsense")}


def ranked_nodes(circuit: Circuit) -> list[Node]:
    """Return all nodes of the model in the order of the circuit's ranking, the best first."""
    everything = nodes_of(circuit.ablation)
    tau = torch.cat([circuit.ranking[at] for at in circuit.ablation])
    return [everything[i] for i in tau.argsort(descending=True, stable=True).tolist()]
