"""Pictures of what a circuit does in the dense model, and rows of facts beside controls.

    scatter    share of the answer against collateral A: a point for the circuit, its rivals and
               namesakes at equal share, some draws of its empty controls, and two references
    curve      P(other target) against strength, at the claim's site, beside the empty controls
    examples   P of the right answer in the dense model, the twin and the circuit alone

References are shown and not beaten: the counterfactual prompt itself, and the mean difference of
the dense residuals over train pairs, which needs neither a twin nor a bridge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evals.scores.curve import Curve
from evals.scores.paired import paired
from evals.scores.pictures import Example, Point, Scatter
from evals.scores.score import Score, Unit
from evals.scores.verdict import Claim
from evals.trials.arms import Arm, Splits
from evals.trials.dense_trial import Trial
from sparse.circuits.circuit import Circuit
from sparse.circuits.score import circuit_logits, last_logits
from sparse.tasks.batch import logit_difference

from .carries import WORDS, Carrying, mean_difference, share

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors on the delta in the curve."""
CURVE_DRAWS = 5
"""Draws of every empty control in the curve."""
POINT_DRAWS = 2
"""Draws of every empty control in the scatter."""
N_EXAMPLES = 2
"""Pairs that are shown as examples."""


def scatter(arms: Carrying, claim: Claim, train: Trial | None, seed: int) -> Scatter:
    """Return effect against collateral of claim 3, from its conditions and some draws."""
    trial = arms.splits.test
    points = [_point("the circuit", "claim", trial, arms.logits, {"site": arms.own.site})]
    for condition in claim.conditions:
        kind = condition.key.partition(".")[0]
        if kind in ("rival", "namesake") and "share" in condition.detail:
            points.append(
                Point(
                    label=condition.name.removeprefix("less collateral than "),
                    kind="rival" if kind == "rival" else "namesake",
                    effect=condition.detail["share"],
                    collateral=condition.against,
                    detail=condition.detail,
                )
            )
    for family, draws in arms.empty(POINT_DRAWS, seed).items():
        for _, make in draws:
            arm = arms.splits.placed(family, make, share)
            logits = arms.splits.run(arm)
            points.append(_point(WORDS[family], "control", trial, logits, {"site": arm.site}))
    points.append(
        Point(label="the counterfactual prompt", kind="reference", effect=1.0, collateral=0.0)
    )
    if train is not None and (found := reference(arms, train)) is not None:
        logits = arms.splits.run(found)
        points.append(_point(found.name, "reference", trial, logits, {"site": found.site}))
    return Scatter(
        name=f"{claim.task}: effect and collateral in the dense model",
        effect_label="share of the answer moved",
        collateral_label="collateral, nats",
        points=tuple(points),
    )


def reference(arms: Carrying, train: Trial) -> Arm | None:
    """Return the mean dense difference over train pairs, at the circuit's share; None: never."""
    return arms.reached("the mean dense difference (no twin)", mean_difference(train))[1]


def _point(label: str, kind: str, trial: Trial, logits: Tensor, detail: dict[str, int]) -> Point:
    return Point(
        label=label,
        kind=kind,  # pyright: ignore[reportArgumentType]
        effect=share(trial, logits),
        collateral=float(trial.collateral_a(logits).mean()),
        detail=detail,
    )


def curve(arms: Carrying, seed: int) -> Curve:
    """Return P(other target) against the strength of the circuit's delta, beside its controls.

    All are added at the claim's site, and all controls have the length of the circuit's delta.
    """
    trial, site = arms.splits.test, arms.own.site

    def line(delta: Float[Tensor, "prompt pos d_dense"]) -> tuple[float, ...]:
        logits = trial.many(site, (s * delta for s in STRENGTHS))
        return (zero, *(float(trial.moved(y).mean()) for y in logits))

    zero = float(trial.p_0.mean())
    controls = {
        WORDS[family]: tuple(line(make(trial)(site)) for _, make in draws)
        for family, draws in arms.empty(CURVE_DRAWS, seed).items()
    }
    patch = trial.logits(site, trial.patched()(site))
    return Curve(
        name=f"{arms.circuit.task.name}: interchange from unrelated sources in the dense model",
        x_label="strength",
        y_label="P(target of the other context)",
        x=(0.0, *STRENGTHS),
        value=line(arms.make(trial)(site)),
        controls=controls,
        references={
            "the source's full patch": (float(trial.moved(patch).mean()),) * (len(STRENGTHS) + 1)
        },
    )


def rows(arms: Carrying, own: Splits, draws: int, seed: int) -> list[Score]:
    """Return facts about the circuit's delta: its effect beside that of all nodes, and its shape.

    `own` has the pairs' own counterfactuals as sources.
    """
    site, trial = arms.own.site, own.test
    delta = arms.make(trial)(site)
    moved = trial.moved(trial.logits(site, delta))
    everything = trial.moved(trial.logits(site, arms.rivals["all_nodes"](trial)(site)))
    turned = [make(trial)(site) for _, make in arms.empty(draws, seed)["rotations"]]
    apart = [arms.apart(seed + i)(trial)(site) for i in range(draws)]
    true = trial.true_difference()(site)
    of_turned = torch.stack([trial.moved(y) for y in trial.many(site, iter(turned))])
    cosines = torch.stack([_cosine(d, true, trial) for d in turned])
    lengths = torch.stack([_length(d, true, trial) for d in apart])
    turning = WORDS["rotations"]
    interchange = "P(other target), interchange with the pair's own counterfactual"
    given: dict[str, Any] = {"better": "higher", "seed": seed, "detail": {"site": site}}

    def row(key: str, name: str, unit: Unit, x: Tensor, draws: Tensor, control: str) -> Score:
        return paired(
            name, x, draws, key=f"transfer.{key}", unit=unit, control_name=control, **given
        )

    return [
        row("interchange", interchange, "probability", moved, of_turned, turning),
        row(
            "interchange.all_nodes",
            "... beside all nodes: how much of what the bridge can carry",
            "probability",
            moved,
            everything[None],
            "all nodes",
        ),
        row(
            "cosine",
            "cosine of its delta with the true dense difference",
            "cosine",
            _cosine(delta, true, trial),
            cosines,
            turning,
        ),
        row(
            "norm",
            "norm of its delta over that of the true difference",
            "ratio",
            _length(delta, true, trial),
            lengths,
            "random nodes",
        ),
    ]


def _cosine(a: Tensor, b: Tensor, trial: Trial) -> Float[Tensor, " pair"]:
    real = trial.batch.real[..., None]
    flat = [(x * real).flatten(1) for x in (a, b)]
    return torch.nn.functional.cosine_similarity(*flat, dim=-1).view(2, -1).mean(0)


def _length(a: Tensor, b: Tensor, trial: Trial) -> Float[Tensor, " pair"]:
    real = trial.batch.real[..., None]
    norms = [(x * real).flatten(1).norm(dim=-1) for x in (a, b)]
    return (norms[0] / norms[1].clamp(min=1e-12)).view(2, -1).mean(0)


@torch.no_grad()
def examples(trial: Trial, circuit: Circuit, tokenizer: object) -> tuple[Example, ...]:
    """Return what dense model, twin and circuit alone answer to a few prompts of the test split."""
    n = trial.batch.n_pairs
    batch = trial.batch.take(torch.arange(min(N_EXAMPLES, n), device=trial.ids.device))
    logits = (
        trial.dense.last_logits(batch.ids, batch.last),
        last_logits(trial.sparse, batch),
        circuit_logits(trial.sparse, batch, circuit.masks(), circuit.ablation),
    )
    p = [torch.sigmoid(logit_difference(y, batch)).tolist() for y in logits]
    text: Callable[..., str] = tokenizer.decode  # pyright: ignore[reportAttributeAccessIssue]

    def word(token: int) -> str:
        return text([token]) if token >= 0 else "anything else"

    return tuple(
        Example(
            task=circuit.task.name,
            prompt=text(ids[: last + 1]),
            answer=word(target),
            other=word(foil),
            dense=p[0][i],
            twin=p[1][i],
            circuit=p[2][i],
        )
        for i, (ids, last, target, foil) in enumerate(
            zip(
                *(getattr(batch, k).tolist() for k in ("ids", "last", "target", "foil")),
                strict=True,
            )
        )
    )
