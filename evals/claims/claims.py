"""All four claims of a circuit, judged on one choice of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from jaxtyping import Int
from torch import Tensor

from bridges.transfer.dense_circuit import DenseCircuit
from evals.scores.verdict import Claim, Kind
from evals.trials.dense_trial import Trial
from evals.trials.prompts import check_numbers, paired_trial, picked, splits, unrelated_splits
from evals.trials.twin_trial import TwinTrial
from sparse.circuits.circuit import Circuit
from sparse.tasks.score import positions_of
from sparse.tasks.task import Task

from .carries import carries, without_sources
from .needed import needed
from .twin import necessary, sufficient

KINDS: tuple[Kind, ...] = get_args(Kind)


class Trials(Mapping[str, Trial]):
    """Test trials of several tasks in one dense model, each made when it is first asked for."""

    def __init__(self, make: Callable[[str], Trial], names: Sequence[str]) -> None:
        self._make, self._names = make, tuple(names)
        self._known: dict[str, Trial] = {}

    def __getitem__(self, name: str) -> Trial:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._make(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def without(self, names: Sequence[str]) -> Trials:
        """Return these trials without some, sharing those that are made already."""
        fewer = Trials(self.__getitem__, [name for name in self._names if name not in names])
        fewer._known = self._known
        return fewer


def trials_of(mapped: Any, tasks: Sequence[Task], tokenizer: Any, most: int, seed: int) -> Trials:
    """Return the test trials of some tasks; `most` is the largest number of pairs of each."""
    by_name = {task.name: task for task in tasks}
    return Trials(
        lambda name: paired_trial(mapped, by_name[name], tokenizer, "test", most, seed),
        list(by_name),
    )


def judge_circuit(
    run: Any,
    circuit: Circuit,
    namesakes: Mapping[str, Circuit],
    others: Sequence[Task] | Trials = (),
    *,
    kinds: Sequence[str] = KINDS,
    draws: int = 39,
    max_pairs: int = 64,
    heldout: Int[Tensor, "block pos"] | None = None,
    seed: int = 0,
    stop_early: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Claim, ...]:
    """Return the claims of a circuit for its task, in the order of `kinds`.

    - `run` has dense, sparse, bridges and tokenizer (a `bridges.Run`, or anything like it).
    - `namesakes` are circuits of the same sparse model by name: "nonsense" for the nonsense twin's,
      which is cut to this circuit's size by its ranking, and those of tasks of other families. The
      circuit must do better than each. Without any, nothing tells a true circuit from one that the
      search would find for everything.
    - `others` are tasks of other families that the dense model does, for the claim "needed".
    - `draws` is the number k of each empty control: 19 is the least that can hold, at p = 0.05.
    - `max_pairs` of every split are used, drawn by `seed`.
    - `heldout` are blocks of text on which the cost of the ablation is shown.
    - `stop_early` leaves out every condition after the first that does not hold. The verdict is
      then not positive, and says only that one reason.

    Raises ValueError for a circuit or bridges of other models, and for fewer than one draw.

    >>> from bridges import load_run
    >>> from evals import judge_circuit
    >>> run = load_run("tiny")
    >>> found = run.circuits()
    >>> circuit = found["single_double_quote"]
    >>> random = circuit.random(run.sparse, seed=0)  # as many nodes, drawn at random
    >>> claims = judge_circuit(run, random, {}, kinds=["sufficient"], draws=19, max_pairs=16)
    >>> claims[0].outcome
    'negative'
    """
    run.bridges.check(run.dense, run.sparse)
    circuit.check(run.sparse)
    for namesake in namesakes.values():
        namesake.check(run.sparse)
    check_numbers("judge_circuit", draws, max_pairs)
    if isinstance(kinds, str):
        raise ValueError(f"judge_circuit: kinds={kinds!r} is a text; give kinds=[{kinds!r}]")
    kinds = list(dict.fromkeys(kinds))
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"judge_circuit: no claim is called {sorted(unknown)}; there are {KINDS}")
    mapped = DenseCircuit(
        circuit=circuit, sparse=run.sparse, bridges=run.bridges, dense=run.dense, site=None
    )
    options: dict[str, Any] = {
        "draws": draws, "seed": seed, "stop_early": stop_early, "tick": tick,
    }  # fmt: skip
    if not isinstance(others, Trials):
        others = trials_of(mapped, others, run.tokenizer, max_pairs, seed)
    claims = []
    for kind in kinds:
        if kind in ("sufficient", "necessary"):
            judge = sufficient if kind == "sufficient" else necessary
            claims.append(
                judge(_twin(run, circuit, max_pairs, seed), circuit, namesakes, **options)
            )
        elif kind == "carries":
            claims.append(_carries(run, mapped, namesakes, max_pairs, options))
        else:
            both = splits(mapped, circuit.task, run.tokenizer, max_pairs, seed)
            claims.append(needed(both, circuit, namesakes, others, heldout=heldout, **options))
    return tuple(claims)


def _twin(run: Any, circuit: Circuit, max_pairs: int, seed: int) -> TwinTrial:
    longest = positions_of(run.dense, run.sparse)
    batch = circuit.task.batch(run.tokenizer, "test", longest)
    return TwinTrial(run.sparse, batch.take(picked(batch, max_pairs, seed)), seed)


def _carries(
    run: Any,
    mapped: DenseCircuit,
    namesakes: Mapping[str, Circuit],
    max_pairs: int,
    options: Mapping[str, Any],
) -> Claim:
    circuit, seed = mapped.circuit, options["seed"]
    both, missing = unrelated_splits(mapped, circuit.task, run.tokenizer, max_pairs, seed)
    if both is None:
        return without_sources(circuit.task.name, missing)
    return carries(both, circuit, namesakes, unmatched=missing, **options)
