"""Facts about a circuit in the sparse model, each beside random circuits: no verdict rests on them.

    zero, resample   task loss with everything outside the circuit at 0, or at what it is in another
                     run: of another pair's prompt, or of unrelated text
    kl               KL(full || circuit) at the scored position, whole vocabulary
    nodes            sum (x_c - x)^2 / sum (x - mean x)^2 over kept nodes and tokens: x in the full
                     run, x_c in the pruned one
    attention        1/2 sum_u |A_c - A| at the scored position, the sink being one of the places u
    frozen norms     task loss with 1 / rms of every norm taken from the full model's run
    adversary        the largest task loss found by choosing which nodes outside it to ablate

The controls are random circuits of as many nodes at each location, none of them the circuit's own
where the others suffice. Every mean is over pairs; the value of a pair is the mean over its two
contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from bridges.losses.quantities import kl_nats
from evals.scores.paired import paired, per_pair
from evals.scores.score import Score
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import THIRDS
from sparse.circuits.mask import masked
from sparse.circuits.score import circuit_logits, last_logits
from sparse.circuits.taps import edited, recorded
from sparse.model.blocks import Attention
from sparse.model.config import FINAL
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still
from sparse.ops.attention_sink import eager_sink
from sparse.ops.csr_linear import csr_products
from sparse.tasks.batch import TaskBatch, task_nats
from sparse.tasks.score import positions_of

from .adversary import ADVERSARY_DRAWS, adversary_rows

RANDOM = "random circuits of equal size"
Values = Mapping[str, Tensor]
Measure = Callable[[Circuit], Tensor | None]


def twin_facts(
    model: SparseGPT,
    circuit: Circuit,
    tokenizer: Any,
    *,
    blocks: Int[Tensor, "block pos"] | None = None,
    split: str = "test",
    draws: int = 5,
    max_pairs: int = 64,
    adversary: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> list[Score]:
    """Return what is true of a circuit in the sparse model besides its claims, beside controls.

    The keys are "circuit.fact.zero", ".resample.pair", ".resample.text", ".kl", ".nodes",
    ".attention", ".frozen_norms", ".adversary" and ".adversary.ranking"; losses are in nats. The
    first `max_pairs` pairs of `split` are used. The control of a row is `draws` random circuits;
    for the adversary, which is slow, at most ADVERSARY_DRAWS of them. `blocks` is text of the run
    (`Run.heldout`), at least as long as the prompts, whose values the rest takes in one row;
    without it there is no ".resample.text". A row is left out where it has nothing to measure:

    - ".resample.pair" where fewer than 2 pairs have prompts as long as those of another pair;
    - ".nodes" where no kept node ever changes;
    - ".attention" where no kept node is a query, key or value;
    - ".adversary.ranking" where the circuit has no ranking.

    The adversary learns on the validation split, or on train where there is no other. `seed` fixes
    every draw. Raises ValueError for a circuit of another model.

    >>> from bridges import load_run
    >>> from evals.claims.facts import twin_facts
    >>> run = load_run("tiny")
    >>> circuit = run.circuits()["while_return_true"]
    >>> rows = twin_facts(run.sparse, circuit, run.tokenizer, draws=2, max_pairs=8, adversary=False)
    >>> rows[0].key, rows[0].unit, len(rows)
    ('circuit.fact.zero', 'nats', 6)
    """
    if draws < 1:
        raise ValueError(f"twin_facts: draws={draws}, but a fact stands beside a control; draw 1")
    circuit.check(model)
    device = next(model.parameters()).device
    batches = circuit.task.batches(tokenizer, positions_of(model))
    if split not in batches:
        raise ValueError(f"twin_facts: {circuit.task.name} has no {split} pairs; give it some")
    batch = _first(batches[split], max_pairs).to(device)
    drawn = [circuit.random(model, seed + i, outside=True) for i in range(draws)]
    with still(model), csr_products(model):
        with torch.no_grad():
            facts = _Facts(model, circuit, batch, blocks, seed)
            rows = _rows(facts, drawn, seed, progress)
        if adversary:
            apart = "validation" in batches and split != "validation"
            learn = batches["validation" if apart else "train"].to(device)
            few, given = drawn[:ADVERSARY_DRAWS], {"seed": seed, "progress": progress}
            rows += adversary_rows(model, circuit, few, learn, batch, **given)
    return rows


class _Facts:
    """One split of the circuit's task in the sparse model; every method measures any circuit.

    `values`, `scales` and `full` are those of the full model on the split's prompts.
    """

    def __init__(
        self,
        model: SparseGPT,
        circuit: Circuit,
        batch: TaskBatch,
        blocks: Tensor | None,
        seed: int,
    ) -> None:
        self.model, self.circuit, self.batch = model, circuit, batch
        self.ablation = circuit.ablation
        self.zeros = {at: torch.zeros_like(x) for at, x in circuit.ablation.items()}
        with recorded(model, list(circuit.ablation)) as values, scales(model) as norms:
            self.full = last_logits(model, batch)
        self.values, self.norms = values, norms
        self.real = torch.arange(batch.ids.shape[1], device=batch.ids.device) <= batch.last[:, None]
        self.other = other_prompts(batch, seed)
        self.text = None if blocks is None else _text(batch, blocks, seed)

    def ablated(self, c: Circuit, ablation: Values) -> Float[Tensor, " pair"]:
        """Return the task loss, in nats, with everything outside `c` at its value in `ablation`."""
        logits = circuit_logits(self.model, self.batch, c.masks(), ablation)
        return per_pair(task_nats(logits, self.batch))

    def resampled(
        self, c: Circuit, source: Values, pairs: Int[Tensor, " matched"] | slice = slice(None)
    ) -> Float[Tensor, " _"]:
        """Return the task loss, in nats, with everything outside `c` as it is in another run."""
        with held(self.model, c.masks(), source):
            return per_pair(task_nats(last_logits(self.model, self.batch), self.batch))[pairs]

    def frozen(self, c: Circuit) -> Float[Tensor, " pair"]:
        """Return the task loss, in nats, with every norm's scale that of the full run."""
        with frozen_scales(self.model, self.norms):
            return self.ablated(c, self.ablation)

    def fidelity(self, c: Circuit) -> Float[Tensor, " pair"]:
        """Return KL(full || c) in nats at the scored position, over the whole vocabulary."""
        return per_pair(
            kl_nats(self.full, circuit_logits(self.model, self.batch, c.masks(), self.ablation))
        )

    def unlike(self, c: Circuit) -> Float[Tensor, " pair"] | None:
        """Return the share of the variance of kept nodes by which the pruned run differs.

            sum over t, i of (x_c - x)^2 / sum over t, i of (x - mean over t of x)^2

        t are the tokens that the scored logits depend on, i the kept nodes. The value of a pair is
        its own numerator over the mean denominator of a pair, so that the mean over pairs is this
        ratio. None where no kept node changes over the tokens.
        """
        pruned = self._pruned(c)
        top = torch.zeros(len(self.batch.ids), device=self.full.device)
        below = 0.0
        for at, indices in c.nodes.items():
            x, x_c = (v[at][..., list(indices)] for v in (self.values, pruned))
            if at == FINAL:  # one row of all prompts
                x, x_c = x.transpose(0, 1), x_c.transpose(0, 1)
            real = self.real if x.shape[1] > 1 else torch.ones_like(self.real[:, :1])
            tokens = x[real].double()
            below += float((tokens - tokens.mean(0)).square().sum())
            top += ((x_c - x).square().sum(-1) * real).sum(1)
        return per_pair(top) * (len(top) / below) if below > 0 else None

    def attends_elsewhere(self, c: Circuit) -> Float[Tensor, " pair"] | None:
        """Return the total variation between attention in the pruned and in the full run.

            1/2 sum over u of |A_c(u) - A(u)|      u: the tokens seen, and the sink

        At the scored position, mean over the heads of which `c` keeps a query, key or value node;
        None where there is no such head.
        """
        pruned, found = self._pruned(c), []
        for layer in range(self.model.config.num_hidden_layers):
            places = [f"{layer}.{third}" for third in THIRDS]
            heads = sorted({i // c.d_head for at in places for i in c.nodes.get(at, ())})
            if heads:
                a, b = (self._pattern(layer, v)[:, heads] for v in (self.values, pruned))
                sinks = (a.sum(-1) - b.sum(-1)).abs()
                found.append(((a - b).abs().sum(-1) + sinks) / 2)
        return per_pair(torch.cat(found, 1).mean(1)) if found else None

    def _pattern(self, layer: int, values: Values) -> Float[Tensor, "prompt head pos"]:
        """Return the attention of the scored position to all tokens, by the model's formula."""
        attn = self.model.model.blocks.get_submodule(f"{layer}.attn")
        assert isinstance(attn, Attention)
        q, k = values[f"{layer}.attn.q"], values[f"{layer}.attn.k"]
        if q.shape[1] > 1:
            q = q[torch.arange(len(q), device=q.device), self.batch.last][:, None]
        q, k = (x.unflatten(-1, (attn.n_head, attn.d_head)).transpose(1, 2) for x in (q, k))
        seen = self.real[:, None, None]
        return eager_sink(attn, q, k, k, seen, attn.scaling, 0.0, attn.sinks)[1].squeeze(2)

    def _pruned(self, c: Circuit) -> Values:
        places = list(self.ablation)
        with masked(self.model, c.masks(), self.ablation), recorded(self.model, places) as values:
            last_logits(self.model, self.batch)
        return values

    def source(self, ids: Int[Tensor, "prompt pos"]) -> Values:
        """Return the values of all nodes of the full model on `ids`, at the batch's positions."""
        with recorded(self.model, list(self.ablation)) as values:
            last_logits(self.model, self.batch, ids)
        return values


def _rows(facts: _Facts, drawn: Sequence[Circuit], seed: int, progress: bool) -> list[Score]:
    """Return the rows of all facts but the adversary."""
    batch, rows = facts.batch, []
    common = {"split": batch.split, "pairs": batch.n_pairs}
    common["full model"] = float(task_nats(facts.full, batch).mean())
    bar = tqdm(total=7, desc="facts", disable=not progress, leave=False)

    def row(key: str, name: str, unit: Any, measure: Measure, **detail: Any) -> None:
        bar.update()
        own = measure(facts.circuit)
        controls = [x for c in drawn if (x := measure(c)) is not None]
        if own is None or not controls:
            return
        given = {"control_name": RANDOM, "better": "lower", "seed": seed, "unit": unit}
        given |= {"key": f"circuit.fact.{key}", "detail": common | detail}
        rows.append(paired(name, own, torch.stack(controls), **given))

    with bar:
        zero = partial(facts.ablated, ablation=facts.zeros)
        row("zero", "task loss, zero ablation outside", "nats", zero)
        matched = facts.other.matched
        if len(matched) > 1:
            there = facts.source(facts.other.ids)
            resampled = partial(facts.resampled, source=there, pairs=matched)
            name, alone = "task loss, the rest as on another prompt", batch.n_pairs - len(matched)
            row("resample.pair", name, "nats", resampled, unmatched=alone)
        if facts.text is not None:
            text = facts.source(facts.text)
            name = "task loss, the rest as on other text"
            row("resample.text", name, "nats", partial(facts.resampled, source=text))
        row("kl", "KL(full || circuit)", "nats", facts.fidelity)
        row("nodes", "share of its nodes' variance changed by pruning", "fraction", facts.unlike)
        name = "total variation of its heads' attention, changed by pruning"
        row("attention", name, "probability", facts.attends_elsewhere)
        row("frozen_norms", "task loss, norms as in the full model", "nats", facts.frozen)
    return rows


class Others:
    """For every prompt one of another pair and of the same length, and the pairs that have one."""

    def __init__(self, ids: Int[Tensor, "prompt pos"], matched: Int[Tensor, " matched"]) -> None:
        self.ids, self.matched = ids, matched


def other_prompts(batch: TaskBatch, seed: int) -> Others:
    """Return for every prompt of the batch another pair's prompt of as many tokens, by the seed.

    It is of either kind. The pairs of which both prompts have such a one are `matched`; the other
    prompts stand for themselves in `ids`.
    """
    rng = torch.Generator().manual_seed(seed)
    n, lengths = batch.n_pairs, batch.last.tolist()
    rows = list(range(2 * n))
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j % n != i % n and lengths[j] == lengths[i]]
        if others:
            rows[i] = others[int(torch.randint(len(others), (), generator=rng))]
    matched = [i for i in range(n) if rows[i] != i and rows[i + n] != i + n]
    return Others(batch.ids[rows], torch.tensor(matched, device=batch.ids.device, dtype=torch.long))


def _text(batch: TaskBatch, blocks: Int[Tensor, "block length"], seed: int) -> Int[Tensor, "_ pos"]:
    """Return a random block of text for every prompt, cut to the prompts' positions."""
    width = batch.ids.shape[1]
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < width:
        raise ValueError(
            f"twin_facts: blocks are {tuple(blocks.shape)}, but the prompts have {width} tokens; "
            "give blocks at least as long, such as run.heldout(), or fewer pairs"
        )
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(blocks), (len(batch.ids),), generator=rng)
    return blocks[rows.to(blocks.device), :width].to(batch.ids)


@contextmanager
def held(
    model: SparseGPT, keep: Mapping[str, Bool[Tensor, " _"]], source: Values
) -> Iterator[None]:
    """Hold the nodes that are not kept at their values in `source`, those of another run.

    x <- m x + (1 - m) x',      x' = source[location]  (batch pos width), as recorded
    """

    def hold(at: str, m: Tensor):
        m = m.to(source[at].device)
        return lambda x: torch.where(m, x, source[at])

    with edited(model, {at: hold(at, m) for at, m in keep.items()}):
        yield


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: m for name, m in model.named_modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm)
    }


def _scale(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector that a norm scales, and its scale (mean x^2 + eps)^-1/2.

    The vector is x itself, or x without its mean for a LayerNorm.
    """
    x = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    return x, (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()


@contextmanager
def scales(model: SparseGPT) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that a forward pass fills with every norm's scale, {norm: (batch pos 1)}."""
    found: dict[str, Tensor] = {}
    handles = []
    try:
        for name, norm in _norms(model).items():

            def see(module, args, _y, name=name) -> None:
                found[name] = _scale(module, args[0])[1]

            handles.append(norm.register_forward_hook(see))
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_scales(model: SparseGPT, frozen: Values) -> Iterator[None]:
    """Scale every norm's input by `frozen[norm]`, and not by its own rms; gain and bias stay.

    y = x r w (+ b),    r = frozen[norm], as `scales` recorded it on prompts of this shape
    """
    handles = []
    try:
        for name, norm in _norms(model).items():

            def rescale(module, args, _y, name=name) -> Tensor:
                y = _scale(module, args[0])[0] * frozen[name] * module.weight
                bias = getattr(module, "bias", None)
                return y if bias is None else y + bias

            handles.append(norm.register_forward_hook(rescale))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(batch: TaskBatch, n: int) -> TaskBatch:
    """Return the first n pairs of a batch, or all of them where there are fewer."""
    return batch.take(torch.arange(min(n, batch.n_pairs)))
