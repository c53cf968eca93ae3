"""Judge every claim about a run folder, beside what could refute it, and write one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from bridges import Run
from bridges.transfer.dense_circuit import DenseCircuit
from evals.claims.bridge import affordable, evaluate_bridge
from evals.claims.circuit import evaluate_circuit
from evals.claims.claims import Trials, trials_of
from evals.claims.evaluation import Evaluation
from evals.claims.transfer import evaluate_transfer
from evals.report.page import page
from evals.report.replay import IN_THE_TWIN
from evals.report.report import Report, provenance
from evals.report.twin_card import twin_card
from evals.scores.pictures import Matrix, Pictures
from evals.scores.score import Score
from evals.scores.verdict import Claim, Condition, Kind
from evals.trials.matched import namesakes_of
from evals.trials.prompts import check_numbers
from sparse.circuits.circuit import Circuit
from sparse.circuits.view.graph import graph
from sparse.tasks.score import positions_of, score_batch
from sparse.tasks.suite import get_task, task_names
from sparse.tasks.task import Task

from .cache import bridges_mark, circuit_mark, fingerprint, kept
from .notes import few_blocks, notes_of

QUICK = {"draws": 19, "max_pairs": 24, "facts": False}
"""Smaller settings: the fewest draws that can hold at p = 0.05, fewer pairs, no rows of facts."""
FACT_BLOCKS = 16
"""Held-out blocks on which the cost of an ablation, and of other text, is measured."""
DENSE: tuple[Kind, ...] = ("carries", "needed")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is evaluated, and how."""

    run: Run
    found: Mapping[str, Circuit]
    others: Trials
    """Test trials of all tasks that the dense model does."""
    family: Mapping[str, str]
    """The family of each of these tasks."""
    draws: int
    max_pairs: int
    facts: bool
    seed: int
    cache: Path | None
    tick: Callable[[], object]
    progress: bool

    def mark(self) -> dict[str, Any]:
        """Return what every part depends on."""
        return {
            "dense": self.run.dense.fingerprint,
            "sparse": self.run.sparse.fingerprint(),
            "bridges": bridges_mark(self.run.bridges),
            "seed": self.seed,
        }

    def evaluations(self, names: Sequence[str], bar: tqdm) -> dict[str, Evaluation]:
        """Return everything about these circuits, and move the bar on."""
        circuits = sum(not name.endswith(":nonsense") for name in self.found)
        steps = 8 * self.draws + 4 + circuits  # of one circuit: draws, rivals and namesakes
        bar.reset(len(names) * steps)
        each = {}
        for i, name in enumerate(names):
            each[name] = self.evaluation(name)
            bar.update((i + 1) * steps - bar.n)  # what was kept, or could not be asked, took none
        return each

    def evaluation(self, name: str) -> Evaluation:
        """Return everything about one circuit, each half from the cache if it is there."""
        beside = [f"{name}:nonsense", *namesakes_of(self.found, name)]
        circuits = {n: circuit_mark(self.found[n]) for n in [name, *beside] if n in self.found}
        about = self.mark() | {
            "circuits": circuits,
            "others": sorted(self.others),
            "settings": [self.draws, self.max_pairs, self.facts],
        }
        twin = self._kept(about | {"in": "sparse"}, lambda: self._in_twin(name))
        if (does := twin["sufficient"]["does"]).state != "holds":  # a twin at chance
            claims = tuple(untold(kind, twin["sufficient"].task, does) for kind in DENSE)
            return replace(twin, claims=(*twin.claims, *claims))
        dense = self._kept(about | {"in": "dense"}, lambda: self._in_dense(name))
        return Evaluation(
            claims=(*twin.claims, *dense.claims),
            rows=(*twin.rows, *dense.rows),
            pictures=dense.pictures,
        )

    def _kept(self, about: dict[str, Any], make: Callable[[], Evaluation]) -> Evaluation:
        return Evaluation.from_dict(kept(self.cache, about, lambda: make().to_dict()))

    def _given(self, name: str) -> dict[str, Any]:
        return {
            "nonsense": self.found.get(f"{name}:nonsense"),
            "namesakes": namesakes_of(self.found, name),
            "draws": self.draws,
            "max_pairs": self.max_pairs,
            "facts": self.facts,
            "seed": self.seed,
            "tick": self.tick,
        }

    def _in_twin(self, name: str) -> Evaluation:
        run, circuit = self.run, self.found[name]
        blocks, options = run.heldout()[:FACT_BLOCKS], self._given(name)
        return evaluate_circuit(
            run.sparse, circuit, run.tokenizer, blocks=blocks, progress=self.progress, **options
        )

    def _in_dense(self, name: str) -> Evaluation:
        run, circuit = self.run, self.found[name]
        siblings = [n for n in self.others if self.family[n] == circuit.task.family]
        return evaluate_transfer(
            mapped_of(run, circuit),
            tokenizer=run.tokenizer,
            others=self.others.without(siblings),
            heldout=run.heldout()[:FACT_BLOCKS],
            **self._given(name),
        )


def evaluate_run(
    run: Run,
    *,
    tasks: Sequence[str] | None = None,
    draws: int = 39,
    max_pairs: int = 64,
    facts: bool = True,
    seed: int = 0,
    quick: bool = False,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Return the report of a run: four claims about each of its circuits, and its bridges.

    - `tasks` picks circuits by task name; by default all are judged. Each is compared with the
      circuit that the run has for its nonsense twin (one is learned if there is none) and with
      those for tasks of other families.
    - `draws` is the number k of each empty control, `max_pairs` the largest number of pairs of a
      split, and `facts` adds rows and pictures on which no verdict rests.
    - `quick` uses 19 draws, 24 pairs, fewer blocks and no facts: more claims cannot be told.
    - `cache` is a folder in which finished parts are kept, so that an evaluation that was
      interrupted goes on where it was (`run.output / "evaluated"` is what the command uses).

    Raises ValueError for a task without a circuit.

    >>> from bridges import load_run
    >>> from evals import evaluate_run
    >>> report = evaluate_run(load_run("tiny"), tasks=[], quick=True)  # the bridges alone
    >>> list(report.sections), report.notes
    (['Bridges'], ('no circuit in this run: only the bridges were measured',))
    """
    settings = {"draws": draws, "max_pairs": max_pairs, "facts": facts} | (QUICK if quick else {})
    check_numbers("evaluate_run", settings["draws"], settings["max_pairs"])
    found = run.circuits()
    names = _names(run, found, tasks)
    others = _done_by_dense(run, found, cache) if names else []
    with tqdm(desc="evaluate", disable=not progress) as bar:
        job = _Job(
            run=run,
            found=found,
            others=_trials(run, found, names, others, settings["max_pairs"], seed),
            family={task.name: task.family for task in others},
            seed=seed,
            cache=Path(cache) if cache else None,
            tick=bar.update,
            progress=progress,
            **settings,
        )
        heldout = affordable(run, run.heldout()[: 16 if quick else None])
        bridges = _bridges(job, heldout)
        each = job.evaluations(names, bar)
    facts_of = {**settings, "seed": seed, "quick": quick, "tasks": names, "run": run.manifest}
    untested = {n: "its task has no test pairs" for n, c in found.items() if not c.task.test}
    skipped = run.skipped() | untested if tasks is None else {}
    circuits = {name: found[name] for name in names}
    return Report(
        title=f"Sparse bridges: {run.manifest['dense']['name']}",
        claims=tuple(claim for evaluation in each.values() for claim in evaluation.claims),
        sections={"Bridges": bridges, **_sections(each)},
        pictures=_pictures(each),
        graphs=tuple(graph(run.sparse, circuit) for circuit in circuits.values()),
        notes=(*notes_of(circuits, found, bridges, skipped), *few_blocks(run, heldout, quick)),
        provenance=provenance(**facts_of),
    )


def untold(kind: Kind, task: str, premise: Condition) -> Claim:
    """Return a claim of which only a premise was looked at, and missed."""
    return Claim(kind=kind, task=task, value=0.0, unit="fraction", conditions=(premise,))


def _sections(each: Mapping[str, Evaluation]) -> dict[str, tuple[Score, ...]]:
    """Return the rows of every circuit under two headings, one for each model."""
    found = {}
    for name, evaluation in each.items():
        of = {IN_THE_TWIN: "circuit.", ": the same circuit in the dense model": "transfer."}
        for ending, start in of.items():
            rows = tuple(row for row in evaluation.rows if row.key.startswith(start))
            if rows:
                found[f"{name}{ending}"] = rows
    return found


def mapped_of(run: Run, circuit: Circuit) -> DenseCircuit:
    """Return the circuit in the run's dense model, without a site: every claim chooses its own."""
    return DenseCircuit(
        circuit=circuit, sparse=run.sparse, bridges=run.bridges, dense=run.dense, site=None
    )


def _names(run: Run, found: Mapping[str, Circuit], tasks: Sequence[str] | None) -> list[str]:
    """Return the names of the circuits to judge, without those of nonsense twins.

    A circuit whose task has no test pairs cannot be judged. Raises ValueError for a task in
    `tasks` that has no circuit.
    """
    tasks = [tasks] if isinstance(tasks, str) else tasks
    names = [name for name, c in found.items() if not name.endswith(":nonsense") and c.task.test]
    if missing := sorted(set(tasks or ()) - set(names)):
        raise ValueError(
            f"{run.folder} has no circuit for {missing}; it has {names or 'none'}: prune them "
            "first (examples/find_circuit.py), or leave out --tasks"
        )
    return [name for name in names if tasks is None or name in tasks]


def _done_by_dense(run: Run, found: Mapping[str, Circuit], cache: str | Path | None) -> list[Task]:
    """Return the tasks that the dense model does: built-in ones, and those of its circuits."""
    own = {c.task.name: c.task for c in found.values() if ":nonsense" not in c.task.name}
    tasks = {name: get_task(name) for name in task_names()} | own
    about = {
        "dense": run.dense.fingerprint,
        "vocabulary": fingerprint(run.tokenizer.get_vocab()),
        "tasks": fingerprint({name: task.to_dict() for name, task in tasks.items()}),
    }

    def does(task: Task) -> bool:
        if not (task.validation and task.test):
            return False
        try:
            batches = task.batches(run.tokenizer, positions_of(run.dense, run.sparse))
        except ValueError:
            return False  # the tokenizer cannot express it: `sparse.task_table` says why
        return score_batch(run.dense, batches["validation"]).does

    folder = Path(cache) if cache else None
    names = kept(folder, about, lambda: {"does": [n for n, task in tasks.items() if does(task)]})
    return [tasks[name] for name in names["does"]]


def _trials(
    run: Run,
    found: Mapping[str, Circuit],
    names: Sequence[str],
    tasks: Sequence[Task],
    most: int,
    seed: int,
) -> Trials:
    if not names:
        return Trials(lambda name: {}[name], ())
    return trials_of(mapped_of(run, found[names[0]]), tasks, run.tokenizer, most, seed)


def _bridges(job: _Job, heldout: Int[Tensor, "block pos"]) -> tuple[Score, ...]:
    about = job.mark() | {"blocks": len(heldout)}

    def make() -> dict[str, Any]:
        rows = evaluate_bridge(job.run, heldout, seed=job.seed, progress=job.progress)
        return {"rows": [row.to_dict() for row in rows]}

    return tuple(map(Score.from_dict, kept(job.cache, about, make)["rows"]))


def _pictures(each: Mapping[str, Evaluation]) -> Pictures:
    """Return the pictures of all circuits, with the matrix of harms by circuit and task."""
    of = [evaluation.pictures for evaluation in each.values()]
    matrix = specificity([evaluation["needed"] for evaluation in each.values()])
    return Pictures(
        scatters=tuple(x for p in of for x in p.scatters),
        curves=tuple(x for p in of for x in p.curves),
        matrices=() if matrix is None else (matrix,),
        examples=tuple(x for p in of for x in p.examples),
    )


def specificity(claims: Sequence[Claim]) -> Matrix | None:
    """Return the harm to every task (column) of ablating every circuit (row) in the dense model."""
    rows: dict[str, dict[str, float]] = {}
    for claim in claims:
        harms = {
            c.key.partition(".")[2]: c.against for c in claim.conditions if "specific." in c.key
        }
        if harms:
            rows[claim.task] = {claim.task: claim.value, **harms}
    columns = list(dict.fromkeys([*rows, *(name for harms in rows.values() for name in harms)]))
    if not rows:
        return None
    return Matrix(
        name="harm to the column's task of ablating the row's circuit in the dense model",
        unit="fraction",
        rows=tuple(rows),
        columns=tuple(columns),
        values=tuple(tuple(harms.get(name) for name in columns) for harms in rows.values()),
    )


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
