"""Test whether a sparse circuit moves the dense model, and whether it does so more than chance.

    delta        what the circuit's intervention adds to the dense stream at one site
    steer        P(target of the other context), two-token softmax, at h + strength * delta
    ablate       task nats of the dense model at h + delta of ablating the circuit's nodes
    directions   at every token, a direction drawn at random of the length of delta there
    rotations    delta turned by one random rotation: same lengths, same structure, other directions

The first three lines say what is measured. The last two are controls: changes of the same size
that know nothing of the circuit. Rotations are the harder ones to beat, because they keep how delta
at one token relates to delta at another. Means are over pairs, the independent unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bridges.transfer.intervention import Ablation
from evals.scores.controls import random_like, rotated
from evals.scores.curve import Curve
from evals.scores.paired import paired, per_pair
from evals.scores.score import Score
from sparse.tasks.task import Task

from .trial import Trial

DIRECTIONS = "random directions of equal norm"
ROTATIONS = "random rotations of the same delta"
CIRCUITS = "random circuits of equal size"
NODES = "random sets of equally many other nodes"
SHORT = {
    DIRECTIONS: "directions",
    ROTATIONS: "rotations",
    CIRCUITS: "circuits",
    NODES: "nodes",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """The scores and the effect curves of one circuit in one dense model."""

    scores: list[Score]
    curves: tuple[Curve, ...]


def evaluate_transfer(
    dense_circuit: Any, task: Task | None = None, tokenizer: Any = None, **options: Any
) -> list[Score]:
    """Return the scores of a mapped circuit in its dense model.

    `options` are those of `measure_transfer`: draws (100 directions and as many rotations by
    default), circuit_draws, node_draws, curve_draws, strengths, max_pairs, seed, progress.

    >>> from bridges import load_run, map_circuit
    >>> from evals import evaluate_transfer
    >>> run = load_run("tiny")
    >>> mapped = map_circuit(run.circuits()["single_double_quote"], run.dense)
    >>> rows = evaluate_transfer(mapped, draws=3, max_pairs=4, strengths=(1,), circuit_draws=2)
    >>> rows[0].key, rows[0].n, rows[0].n_draws
    ('transfer.steering.one.directions', 4, 3)
    """
    return measure_transfer(dense_circuit, task, tokenizer, **options).scores


@torch.no_grad()
def measure_transfer(
    dense_circuit: Any,
    task: Task | None = None,
    tokenizer: Any = None,
    *,
    draws: int = 100,
    circuit_draws: int = 10,
    node_draws: int = 20,
    curve_draws: int = 25,
    strengths: Sequence[int | float] = (0.25, 0.5, 1, 2, 4, 8),
    max_pairs: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Transfer:
    """Return the scores of steering and ablation on the test split, and the effect curves.

    Steering has rows at strength 1 and at the strength that moved the validation split most, if
    that is another one. The controls of each row are `draws` random directions of equal norm at
    every token, `draws` rotations of the delta, and `circuit_draws` random circuits of equal size.
    The detail of a row has the effect of the full activation patch, which adds the true difference
    between the dense residuals of the two prompts. The controls of ablation are `node_draws` random
    sets of other nodes, directions and rotations. The curve shows P against `strengths`, with at
    most `curve_draws` draws of each control.

    At most `max_pairs` pairs of a split are used, the first ones. Task and tokenizer default to
    the circuit's own. The deltas are added by resuming the dense model at the site, which is fast;
    raises ValueError where that and `dense_circuit.steer` give different logits.
    """
    job: Task = dense_circuit.circuit.task if task is None else task
    tokenizer = tokenizer or dense_circuit.tokenizer
    if 1 not in strengths or min(strengths) <= 0:
        raise ValueError(
            f"measure_transfer: strengths {tuple(strengths)} must be above 0 and hold 1, the "
            "strength at which a circuit says what it says"
        )
    trial = Trial(dense_circuit, job, tokenizer, "test", max_pairs)
    chosen = _best_strength(dense_circuit, job, tokenizer, strengths, max_pairs)
    trial.check()
    at = {float(s): draws if s in (1, chosen) else min(curve_draws, draws) for s in strengths}
    total = 2 * sum(at.values()) + circuit_draws * len(at) + 2 * draws + node_draws
    bar = tqdm(total=total, desc=f"dense {job.name}", disable=not progress, leave=False)
    steering, curve = _steer_rows(trial, at, chosen, circuit_draws, seed, bar.update)
    shape = _shape_rows(trial, draws, circuit_draws, seed)
    ablation = _ablation_rows(trial, draws, node_draws, seed, bar.update)
    bar.close()
    return Transfer(scores=steering + shape + ablation, curves=(curve,))


def _best_strength(
    dense_circuit: Any, task: Task, tokenizer: Any, strengths: Sequence[int | float], max_pairs: int
) -> float:
    """Return the strength that moves the validation split most, or 1 without such a split."""
    if not task.validation:
        return 1.0
    trial = Trial(dense_circuit, task, tokenizer, "validation", max_pairs)
    effects = [
        float(trial.moved(y).mean()) for y in trial.many([s * trial.delta for s in strengths])
    ]
    return float(strengths[max(range(len(effects)), key=effects.__getitem__)])


class _Answers(NamedTuple):
    """What adding each draw of a control to the stream does, per pair."""

    moved: Float[Tensor, "draws pair"]
    """P(target of the other context), as `Trial.moved`."""
    margin: Float[Tensor, "draws pair"]
    """Logit of that target minus logit of the own one, as `Trial.margin`."""


def _steer_rows(
    trial: Trial,
    draws_at: dict[float, int],
    chosen: float,
    circuit_draws: int,
    seed: int,
    tick: Callable[[], object],
) -> tuple[list[Score], Curve]:
    """Return the scores of steering at strengths 1 and `chosen`, and the curve over all strengths.

    `draws_at` has the number of draws of directions and rotations for every strength.
    """
    untouched, patch = trial.logits(0 * trial.delta), trial.logits(trial.true)
    others = [trial.steered_by(circuit) for circuit in trial.circuits(circuit_draws, seed)]
    detail = {
        "site": trial.site,
        "levels": trial.batch.levels(),
        "untouched": float(trial.moved(untouched).mean()),
        "full activation patch": float(trial.moved(patch).mean()),
        "untouched logits": float(trial.margin(untouched).mean()),
        "full activation patch logits": float(trial.margin(patch).mean()),
        "best strength on validation": chosen,
    }
    rows: list[Score] = []
    lines: dict[str, list[Tensor]] = {"circuit": [], DIRECTIONS: [], ROTATIONS: [], CIRCUITS: []}
    on_curve = min(draws_at.values())
    for strength, draws in draws_at.items():
        own = trial.logits(strength * trial.delta)
        scaled, seeds = strength * trial.delta, range(seed, seed + draws)
        controls = {
            DIRECTIONS: _answers(trial, (random_like(scaled, i) for i in seeds), tick),
            ROTATIONS: _answers(trial, (rotated(scaled, i) for i in seeds), tick),
            CIRCUITS: _answers(trial, (strength * other for other in others), tick),
        }
        lines["circuit"].append(trial.moved(own).mean()[None])
        for name, drawn in controls.items():
            lines[name].append(drawn.moved.mean(-1)[:on_curve])
        if strength == 1:
            rows += _at_strength(trial, own, controls, "strength 1", "one", detail, seed)
        elif strength == chosen:
            word = f"strength {strength:g}, best on validation"
            rows += _at_strength(trial, own, controls, word, "best", detail, seed)
    return rows, _curve(trial, tuple(draws_at), lines, untouched, patch)


def _at_strength(
    trial: Trial,
    own: Tensor,
    controls: dict[str, _Answers],
    word: str,
    key: str,
    detail: dict[str, Any],
    seed: int,
) -> list[Score]:
    """Return the scores of steering at one strength beside every control, in probability.

    The control of random directions also gets a row in logits.
    """
    given: dict[str, Any] = {"better": "higher", "detail": detail, "seed": seed}
    rows = []
    for name, drawn in controls.items():
        against = {"control_name": name, **given}
        rows.append(
            paired(
                f"steering, {word}, v. {SHORT[name]}",
                trial.moved(own),
                drawn.moved,
                key=f"transfer.steering.{key}.{SHORT[name]}",
                unit="probability",
                **against,
            )
        )
        if name == DIRECTIONS:
            rows.append(
                paired(
                    f"steering, {word}, logits",
                    trial.margin(own),
                    drawn.margin,
                    key=f"transfer.steering.{key}.logits",
                    unit="logits",
                    **against,
                )
            )
    return rows


def _answers(trial: Trial, deltas: Iterator[Tensor], tick: Callable[[], object]) -> _Answers:
    """Return what adding each of `deltas` does."""
    moved, margin = [], []
    for y in trial.many(deltas):
        moved.append(trial.moved(y))
        margin.append(trial.margin(y))
        tick()
    return _Answers(torch.stack(moved), torch.stack(margin))


def _curve(
    trial: Trial,
    strengths: tuple[float, ...],
    lines: dict[str, list[Tensor]],
    untouched: Tensor,
    patch: Tensor,
) -> Curve:
    """Return the curve of P against strength; at strength 0 every line is the untouched model."""
    zero = float(trial.moved(untouched).mean())
    drawn = {name: torch.stack(parts, dim=-1).tolist() for name, parts in lines.items()}
    own = drawn.pop("circuit")[0]
    return Curve(
        name=f"{trial.batch.task}: steering the dense model",
        x_label="strength",
        y_label="P(target of the other context)",
        x=(0.0, *strengths),
        value=(zero, *own),
        controls={name: tuple((zero, *draw) for draw in draws) for name, draws in drawn.items()},
        references={
            "full activation patch": (float(trial.moved(patch).mean()),) * (len(strengths) + 1)
        },
    )


def _shape_rows(trial: Trial, draws: int, circuit_draws: int, seed: int) -> list[Score]:
    """Return the scores of the direction and the length of delta.

    The true dense difference is the dense residual on the other prompt minus that on the own one.
    One row is the cosine of delta with it, the other the ratio of their norms.
    """
    real = trial.batch.real[..., None]
    true = trial.true * real

    def cosine(delta: Tensor) -> Tensor:
        flat = ((delta * real).flatten(1), true.flatten(1))
        return per_pair(F.cosine_similarity(*flat, dim=-1))

    def length(delta: Tensor) -> Tensor:
        whole = true.flatten(1).norm(dim=-1).clamp(min=1e-12)
        return per_pair((delta * real).flatten(1).norm(dim=-1) / whole)

    randoms = torch.stack([cosine(random_like(trial.delta, seed + i)) for i in range(draws)])
    others = torch.stack(
        [length(trial.steered_by(circuit)) for circuit in trial.circuits(circuit_draws, seed)]
    )
    given = {"better": "higher", "seed": seed, "detail": {"site": trial.site}}
    return [
        paired(
            "cosine of delta with the true dense difference",
            cosine(trial.delta),
            randoms,
            key="transfer.cosine",
            unit="cosine",
            control_name=DIRECTIONS,
            **given,
        ),
        paired(
            "norm of delta over that of the true difference",
            length(trial.delta),
            others,
            key="transfer.norm",
            unit="ratio",
            control_name=CIRCUITS,
            **given,
        ),
    ]


def _ablation_rows(
    trial: Trial, draws: int, node_draws: int, seed: int, tick: Callable[[], object]
) -> list[Score]:
    """Return the scores of how much ablating the circuit's nodes hurts the dense model."""
    delta = trial.mapped.delta(Ablation(), trial.ids)
    own = trial.nats(trial.logits(delta))
    nodes = (
        trial.mapped.delta(Ablation(list(circuit)), trial.ids)
        for circuit in trial.circuits(node_draws, seed, outside=True)
    )
    seeds = range(seed, seed + draws)
    controls = {
        NODES: nodes,
        DIRECTIONS: (random_like(delta, i) for i in seeds),
        ROTATIONS: (rotated(delta, i) for i in seeds),
    }
    untouched = float(trial.nats(trial.logits(0 * delta)).mean())
    detail = {"site": trial.site, "untouched": untouched}
    rows = []
    for name, deltas in controls.items():
        found = []
        for y in trial.many(deltas):
            found.append(trial.nats(y))
            tick()
        rows.append(
            paired(
                f"ablation, v. {SHORT[name]}",
                own,
                torch.stack(found),
                key=f"transfer.ablation.{SHORT[name]}",
                unit="nats",
                control_name=name,
                better="higher",
                detail=detail,
                seed=seed,
            )
        )
    return rows
