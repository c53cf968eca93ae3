"""What a reader of a report must know before believing its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Int
from torch import Tensor

from bridges import Run
from evals.scores.score import Score
from evals.trials.matched import at_size
from sparse.circuits.circuit import Circuit

NO_ROOM = (
    "the dense model is no better than unigram frequencies on this text: there is no loss to "
    "recover, and those rows are left out"
)


def notes_of(
    circuits: Mapping[str, Circuit],
    found: Mapping[str, Circuit],
    bridges: Sequence[Score],
    skipped: Mapping[str, str],
) -> tuple[str, ...]:
    """Return the notes of a report on `circuits`, some of those that were `found` in the run."""
    notes = [f"{name}: {note}" for name, circuit in circuits.items() for note in circuit.notes]
    if not circuits:
        notes.append("no circuit in this run: only the bridges were measured")
    notes += outlying(bridges)
    notes += [f"{name} was left out: {' '.join(why.split())}" for name, why in skipped.items()]
    if not any(row.key.startswith("bridge.recovered") for row in bridges):
        notes.append(NO_ROOM)
    return (*notes, *shared_nodes(circuits, found))


def few_blocks(run: Run, used: Int[Tensor, "_ pos"], quick: bool) -> list[str]:
    """Return a note where the bridges were measured on fewer blocks, to save time on a CPU."""
    n, whole = len(used), len(run.heldout())
    if quick or n == whole:
        return []
    return [f"the bridges were measured on the first {n} of {whole} held-out blocks, to save time"]


def outlying(bridges: Sequence[Score]) -> list[str]:
    """Return a note that says where tokens are outlying, and what one bit about them explains."""
    rows = [row for row in bridges if row.key.endswith(".decoder_fvu.all")]
    if not rows:
        return []
    most = max(rows, key=lambda row: row.detail["variance that they carry"])
    site = most.key.split(".")[2]
    return [
        f"attention sinks: at {len(rows)} of the bridged sites some tokens are outlying and left "
        f"out of the bridges' errors; at site {site} they are {most.detail['outlying tokens']:.1%} "
        f"of the tokens and {most.detail['variance that they carry']:.1%} of the variance, and "
        f"knowing which tokens they are gives a decoder FVU of {most.control:.3g} over all tokens"
    ]


def shared_nodes(circuits: Mapping[str, Circuit], found: Mapping[str, Circuit]) -> list[str]:
    """Return, for every circuit, how many of its nodes its namesakes have too, as a note each.

    A nonsense twin has the same contexts, so its circuit must read the same difference between
    them; where it shares nodes, it carries what the circuit carries.
    """
    notes = []
    for name, circuit in circuits.items():
        counts = {}
        for other, namesake in found.items():
            if other == f"{name}:nonsense":
                cut = at_size(namesake, circuit, exactly=True)
                counts[f"the first {len(cut)} of its nonsense twin's circuit"] = len(circuit & cut)
            elif ":nonsense" not in other and other != name:
                counts[f"the circuit for {other}"] = len(circuit & namesake)
        shared = ", ".join(f"{n} with {whose}" for whose, n in counts.items() if n)
        if shared:
            notes.append(f"{name}: of its {len(circuit)} nodes it shares {shared}")
    return notes
