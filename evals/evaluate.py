"""Measure every claim about a run folder, beside its controls, and write one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bridges import Run, map_circuit
from evals.claims.bridge import evaluate_bridge
from evals.claims.circuit import evaluate_circuit, nonsense_at_size
from evals.claims.transfer import measure_transfer
from evals.report.page import page
from evals.report.report import Report, provenance
from evals.report.twin_card import twin_card
from evals.scores.curve import Curve
from evals.scores.pictures import Pictures
from evals.scores.score import Score
from sparse.circuits.circuit import Circuit
from sparse.circuits.view.graph import graph

QUICK = {"max_pairs": 24, "curve_draws": 15, "strengths": (0.5, 1, 2, 4)}
"""Smaller settings of `measure_transfer`: less precise, with the same kinds of controls."""
NO_ROOM = (
    "the dense model is no better than unigram frequencies on this text: there is no loss to "
    "recover, and those rows are left out"
)


def evaluate_run(
    run: Run,
    *,
    tasks: Sequence[str] | None = None,
    draws: int = 100,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Report:
    """Return the report of a run: its bridges, then every circuit of it in both models.

    `tasks` picks circuits by task name; by default all are measured. Each circuit is compared with
    the circuit that the run has for its nonsense twin, and with a circuit for the twin of its own
    size. `draws` is the number of random directions, and of rotations, per claim. `quick` uses
    fewer pairs, strengths and blocks. Raises ValueError for a task without a circuit.

    >>> from bridges import load_run
    >>> from evals import evaluate_run
    >>> report = evaluate_run(load_run("tiny"), tasks=[], quick=True)  # the bridges alone
    >>> list(report.sections), report.notes
    (['Bridges'], ('no circuit in this run: only the bridges were measured',))
    """
    found = run.circuits()
    names = _names(run, found, tasks)
    untested = {n: "its task has no test pairs" for n, c in found.items() if not c.task.test}
    skipped = run.skipped() | untested if tasks is None else {}
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    stages = tqdm(["bridges", *names], desc="evaluate", disable=not progress)
    with stages:
        blocks = run.heldout()[: 16 if quick else None]
        sections = {"Bridges": tuple(evaluate_bridge(run, blocks, **options))}
        stages.update()
        curves: list[Curve] = []
        for name in names:
            circuit, twin = found[name], found.get(f"{name}:nonsense")
            rows = _in_the_sparse_model(run, circuit, twin, options)
            mapped = map_circuit(circuit, run.dense, run.bridges, sparse_model=run.sparse)
            smaller = QUICK if quick else {}
            done = measure_transfer(mapped, draws=draws, **options, **smaller)
            sections[f"{name}: the circuit in the sparse model"] = tuple(rows)
            sections[f"{name}: the same circuit in the dense model"] = tuple(done.scores)
            curves += done.curves
            stages.update()
    facts = {"seed": seed, "draws": draws, "quick": quick, "run": run.manifest}
    return Report(
        title=f"Sparse bridges: {run.manifest['dense']['name']}",
        sections=sections,
        pictures=Pictures(curves=tuple(curves)),
        graphs=tuple(graph(run.sparse, found[name]) for name in names),
        notes=_notes({name: found[name] for name in names}, sections["Bridges"], skipped),
        provenance=provenance(**facts),
    )


def _names(run: Run, found: Mapping[str, Circuit], tasks: Sequence[str] | None) -> list[str]:
    """Return the names of the circuits to measure, without those of nonsense twins.

    A circuit whose task has no test pairs cannot be measured. Raises ValueError for a task in
    `tasks` that has no circuit.
    """
    names = [name for name, c in found.items() if not name.endswith(":nonsense") and c.task.test]
    if missing := sorted(set(tasks or ()) - set(names)):
        raise ValueError(
            f"{run.folder} has no circuit for {missing}; it has {names or 'none'}: prune them "
            "first (examples/find_circuit.py), or leave out --tasks"
        )
    return [name for name in names if tasks is None or name in tasks]


def _in_the_sparse_model(
    run: Run, circuit: Circuit, twin: Circuit | None, options: Mapping[str, Any]
) -> list[Score]:
    """Return the scores of a circuit in the sparse model, with both circuits of its nonsense twin.

    `twin` is the one saved in the run; the other, of the circuit's size, is made here.
    """
    same = nonsense_at_size(run.sparse, circuit, run.tokenizer, twin)
    return evaluate_circuit(
        run.sparse, circuit, run.tokenizer, nonsense=twin, equal_size=same, **options
    )


def _notes(
    circuits: Mapping[str, Circuit], bridges: Sequence[Score], skipped: Mapping[str, str]
) -> tuple[str, ...]:
    """Return what a reader must know before believing the numbers."""
    notes = [f"{name}: {note}" for name, circuit in circuits.items() for note in circuit.notes]
    if not circuits:
        notes.append("no circuit in this run: only the bridges were measured")
    notes += [f"{name} was left out: {' '.join(why.split())}" for name, why in skipped.items()]
    if not any(row.key.startswith("bridge.recovered") for row in bridges):
        notes.append(NO_ROOM)
    return tuple(notes)


def write_report(run: Run, report: Report) -> list[Path]:
    """Write report.json, report.md and report.html, all or none, and return their paths.

    They go into the run's `output` folder, which is the run folder except for the built-in run. The
    twin's model card is written anew from the report too, with the licence that it had; that of the
    built-in run is left alone.

    >>> import tempfile
    >>> from dataclasses import replace
    >>> from pathlib import Path
    >>> from bridges import load_run
    >>> from evals import Report, write_report
    >>> run, report = load_run("tiny"), Report(title="empty", sections={})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = write_report(replace(run, output=Path(folder)), report)
    >>> [path.name for path in paths]
    ['report.json', 'report.md', 'report.html']
    """
    log = run.log() if (run.folder / "log.jsonl").is_file() else []
    old = run.sparse.card
    card = twin_card(report, old.license if old else "unknown")  # before anything is written
    paths = report.save(run.output, {"report.html": page(report, log)})
    if run.output == run.folder:
        run.sparse.card = card
        run.sparse.save_card(run.folder / "sparse")
    return paths
