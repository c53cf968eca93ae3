"""Every claim about a run folder, beside its controls, in one report."""

from __future__ import annotations

from collections.abc import Sequence
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
from sparse.circuits.view.graph import graph

QUICK = {"max_pairs": 24, "curve_draws": 15, "strengths": (0.5, 1, 2, 4)}
"""Smaller settings of the transfer: less precise, equally controlled."""
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
    """Measure the bridges, then every circuit of the run in both models; return the report.

    `tasks` picks circuits by name, all by default. Each is compared with the circuit saved for its
    nonsense twin, and with the twin's best nodes at its own size. `draws` counts the random
    directions; `quick` uses fewer pairs, strengths and blocks. Raises ValueError for a task
    without a circuit.
    """
    found = run.circuits()
    names = [name for name in found if not name.endswith(":nonsense")]
    if missing := sorted(set(tasks or ()) - set(names)):
        raise ValueError(
            f"{run.folder} has no circuit for {missing}; it has {names or 'none'}: prune them "
            "first (examples/find_circuit.py), or leave out --tasks"
        )
    names = [name for name in names if tasks is None or name in tasks]
    stages = tqdm(["bridges", *names], desc="evaluate", disable=not progress)
    blocks = run.heldout()[: 16 if quick else None]
    sections = {"Bridges": tuple(evaluate_bridge(run, blocks, seed=seed, progress=progress))}
    curves: list[Curve] = []
    graphs, notes = [], []
    stages.update()
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    for name in names:
        circuit, twin = found[name], found.get(f"{name}:nonsense")
        mapped = map_circuit(circuit, run.dense, run.bridges, sparse_model=run.sparse)
        same = nonsense_at_size(run.sparse, circuit, run.tokenizer, twin)
        twins = {"nonsense": twin, "equal_size": same}
        rows = evaluate_circuit(run.sparse, circuit, run.tokenizer, **twins, **options)
        done = measure_transfer(mapped, draws=draws, **options, **(QUICK if quick else {}))
        sections[f"{name}: the circuit in the sparse model"] = tuple(rows)
        sections[f"{name}: the same circuit in the dense model"] = tuple(done.scores)
        curves += done.curves
        graphs.append(graph(run.sparse, circuit))
        notes += [f"{name}: {note}" for note in circuit.notes]
        stages.update()
    stages.close()
    if not names:
        notes.append("no circuit in this run: only the bridges were measured")
    if not any(row.name.startswith("loss recovered") for row in sections["Bridges"]):
        notes.append(NO_ROOM)
    facts = {"seed": seed, "draws": draws, "quick": quick, "run": run.manifest}
    return Report(
        title=f"Sparse bridges: {run.manifest['dense']['name']}",
        sections=sections,
        curves=tuple(curves),
        graphs=tuple(graphs),
        notes=tuple(notes),
        provenance=provenance(**facts),
    )


def write_report(run: Run, report: Report) -> list[Path]:
    """Write report.json, report.md and report.html into the run folder, all or none.

    The twin's model card is written anew from the report too, with the licence that it had. (The
    built-in run is only read.)
    """
    log = run.log() if (run.folder / "log.jsonl").is_file() else []
    paths = report.save(run.output, {"report.html": page(report, log)})
    if run.output == run.folder:
        old = run.sparse.card
        run.sparse.card = twin_card(report, old.license if old else "unknown")
        run.sparse.save_card(run.folder / "sparse")
    return paths
