"""Predict what a co-training run takes: parameters, memory by part, time and disk.

In bytes, for n trained parameters in float32:

    weights     4 n of the twin and the bridges; the dense model as it was loaded
    gradients   4 n,     moments  8 n + 4 a tensor
    saved       sum over sublayers k of rows_k * (bytes that sublayer k keeps of one row)
    rows_k      rows + sum_{s <= k} e_s in the twin,     sum_{s <= k} e_s in the dense model
    e_s         rows, or on average rows * m / n_bridges where each sequence draws m sites

Rows are the sequences of one pass. Sublayer k leads from site k to site k+1, and what it keeps of a
row is kept for the backward pass; saved_bytes.py counts it on the models' own code. rows_k is the
number of rows that run through it and e_s the number of rows of the hybrid passes that enter at
site s. In the dense model only these entered rows need a backward pass.

With `TrainConfig.shard`, P processes split the parameters: each holds 1/P of weights, gradients and
moments all the time, and the whole of weights and gradients in addition during a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bridges.losses.chunked import CHUNK, MIN_ROWS
from bridges.maps.bridge import BridgeSet
from bridges.training.config import CotrainConfig
from bridges.training.validate import validation_cost, validation_sequences
from sparse.model.gpt import SparseGPT
from sparse.training.sparsity import budgets

from .saved_bytes import dense_saved, site_saved, twin_saved
from .step_time import StepTime, rows_per_pass

HELD_OUT = 64
"""Blocks of held-out text that a run keeps."""
BORROWED = ("model.wte.table", "lm_head.own")
"""Buffers of a twin that are another model's embeddings (`sparse.model.borrowed`)."""
COPIES = 6
"""How many tensors as large as a chunk of logits exist at once: the logits of both models, log p,
p, q and the gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The prediction of what a run takes. `str(plan)` is a table. A GB is 10^9 bytes."""

    dense_parameters: int
    twin_parameters: int
    twin_nonzero: int
    """Parameters of the twin that may be nonzero at the end: the budget of every projected tensor,
    and all entries of the others."""
    bridge_parameters: int
    borrowed: int
    """Entries of the embeddings that the twin has of the dense model, frozen."""
    steps: int
    """Optimizer steps."""
    batch: int
    """Sequences per optimizer step, over all processes and passes."""
    length: int
    """Tokens per sequence."""
    accumulate: int
    """Passes per optimizer step in each process."""
    processes: int
    mixed_precision: str
    state: dict[str, int]
    """Bytes on each device throughout the run, by part."""
    step: dict[str, int]
    """Further bytes on each device during a training step, by part. Their sum is an upper bound:
    in the backward pass gradients are added while what the forward pass kept is freed."""
    evaluation: int
    """Further bytes on each device during an evaluation. It never coincides with a step."""
    disk: dict[str, int]
    """Bytes on disk, by part."""
    validated: float = 0.0
    """Training tokens that would take as long as calibration and all evaluations
    (`validation_sequences`)."""
    unknown: tuple[str, ...] = ()
    """What could not be counted, and why."""
    step_time: StepTime | None = None
    """A measurement on the device at hand, if one was made."""
    pruning: float | None = None
    """Seconds that pruning takes at most for a task: its circuit, and its nonsense twin's."""

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.steps * self.batch * self.length

    @property
    def memory(self) -> int:
        """Bytes on each device at the peak, as predicted."""
        return sum(self.state.values()) + max(sum(self.step.values()), self.evaluation)

    def hours(self, tokens: int | float | None = None) -> float | None:
        """Return the hours for `tokens` tokens, by default all of the run's, with its evaluations.

        None where no speed was measured (`step_time`).
        """
        of_step = self.batch * self.length
        passed = of_step * (1 + self.validated / self.tokens)  # tokens of a step, and evaluated
        seconds = self.step_time.of(passed) if self.step_time else None
        return None if seconds is None else seconds * (tokens or self.tokens) / of_step / 3600

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens per second in steps of the run's size, as predicted."""
        seconds = self.step_time.of(self.batch * self.length) if self.step_time else None
        return None if seconds is None else self.batch * self.length / seconds

    def steps_within(self, hours: float) -> int | None:
        """Return how many steps, with their evaluations, fit into so many hours."""
        whole = self.hours()
        return None if whole is None else int(self.steps * hours / whole)

    def line(self) -> str:
        """Return one line: steps, tokens, memory and, where the speed was measured, hours."""
        said = (
            f"{self.steps:,} steps, {self.tokens / 1e6:,.1f} M tokens, "
            f"{gb(self.memory)} GB of memory predicted"
        )
        if self.step_time is None:
            return said
        if (hours := self.hours()) is None:
            where, why = self.step_time.device, self.step_time.failed
            return f"{said}; the probe did not hold on {where}: {why}"
        rate = f"{self.tokens_per_second:,.3g} tokens/s on {self.step_time.device}"
        return f"{said}; at {rate} it takes about {hours:,.3g} hours"

    def __str__(self) -> str:
        rows = [
            ("parameters", ""),
            ("  dense", f"{self.dense_parameters:,}"),
            ("  twin", f"{self.twin_parameters:,}"),
            ("  twin, kept at the end", f"{self.twin_nonzero:,}"),
            *self._borrowed(),
            ("  bridges", f"{self.bridge_parameters:,}"),
            ("run", ""),
            ("  optimizer steps", f"{self.steps:,}"),
            ("  tokens", f"{self.tokens:,}"),
            ("  sequences per step", f"{self.batch} x {self.length} tokens"),
            ("  passes per step", f"{self.accumulate}"),
            ("  processes", f"{self.processes}"),
            ("  precision", f"{self.mixed_precision}"),
            ("memory of a device, GB, predicted", gb(self.memory)),
            *((f"  {name}", gb(n)) for name, n in (self.state | self.step).items()),
            ("  evaluation, instead of a step", gb(self.evaluation)),
            ("disk, GB", gb(sum(self.disk.values()))),
            *((f"  {name}", gb(n)) for name, n in self.disk.items()),
            *(("not counted", why) for why in self.unknown),
            *self._probed(),
        ]
        return "\n".join(f"{name:38}{value:>16}".rstrip() for name, value in rows)

    def _borrowed(self) -> list[tuple[str, str]]:
        rows = [("  embeddings borrowed by the twin", f"{self.borrowed:,}")]
        return rows if self.borrowed else []

    def _probed(self) -> list[tuple[str, str]]:
        p = self.step_time
        if p is None:
            return []
        rows = [("probed", "")]
        if p.tokens_per_second is not None:
            whole, billion = self.hours(), self.hours(1e9)
            rows += [
                ("  device", p.device),
                ("  sequences at a time", f"{p.sequences} x {p.length} tokens"),
                ("  seconds per such step", f"{p.seconds:.3g}"),
                ("  of these, whatever its size", f"{p.fixed:.3g}"),
                ("  tokens/s, in steps of the run's", f"{self.tokens_per_second:,.3g}"),
                ("  hours for training and validation", f"{whole:,.3g}"),
                ("  hours for 1 B tokens", f"{billion:,.3g}"),
                (f"  GB, {p.peak_of}", gb(p.peak or 0)),
            ]
        if self.pruning is not None:
            rows += [("  minutes of pruning a task, at most", f"{self.pruning / 60:,.3g}")]
        return rows + ([("  it did not hold", p.failed)] if p.failed else [])


def gb(n: int | float) -> str:
    """Return bytes as GB, 10^9."""
    return f"{n / 1e9:,.3f}"


def plan(
    dense: Any,
    sparse: SparseGPT,
    bridges: BridgeSet,
    config: CotrainConfig,
    batch: int,
    length: int,
    *,
    processes: int = 1,
    text_tokens: int = 0,
    evaluated: int = 16,
    step_time: StepTime | None = None,
    pruning: float | None = None,
) -> Plan:
    """Return what `cotrain` with these arguments would take, with batches of (batch, length).

    Nothing is run and nothing is changed; the parameters may be on the meta device or fake. Of
    `dense` only `model`, `n_sites`, `d_resid` and `vocab_size` are used. `text_tokens` is the
    number of tokens of text that the run keeps on disk as blocks, 0 if it streams its text.
    `evaluated` is the number of sequences in a validation batch, or those of a training pass where
    these are fewer. `step_time` and `pruning` are measurements to be shown with it. Raises
    ValueError for a batch that processes and passes cannot share evenly.

    >>> from bridges import BridgeConfig, BridgeSet, CotrainConfig, plan
    >>> from dense import tiny
    >>> from sparse import SparseGPT, SparseGPTConfig, TrainConfig
    >>> dense = tiny()
    >>> twin = SparseGPT(SparseGPTConfig(vocab_size=dense.vocab_size, hidden_size=64))
    >>> bridges = BridgeSet(BridgeConfig.between(dense, twin, k=16))
    >>> config = CotrainConfig(train=TrainConfig(steps=1000, folder="runs/a"))
    >>> plan(dense, twin, bridges, config, batch=16, length=128).tokens
    2048000
    """
    train = config.train
    rows = rows_per_pass(batch, processes, train.accumulate)
    weights, moments, parameters = _trained(sparse, bridges)
    shards = processes if train.shard else 1
    step, unknown = _step(dense, sparse, bridges, config, rows, length)
    return Plan(
        dense_parameters=count(dense.model),
        twin_parameters=count(sparse),
        twin_nonzero=nonzero_at_the_end(sparse, config),
        bridge_parameters=count(bridges),
        borrowed=sum(b.numel() for n, b in sparse.named_buffers() if n in BORROWED),
        steps=train.steps,
        batch=batch,
        length=length,
        accumulate=train.accumulate,
        processes=processes,
        mixed_precision=train.mixed_precision,
        state={
            "dense model": stored(dense.model),
            "weights of twin and bridges": weights - parameters + parameters // shards,
            "Adam's moments": moments // shards,
        },
        step=_gradients(parameters, shards) | step,
        evaluation=_evaluation(dense, sparse, bridges, min(evaluated, rows) * length),
        disk=_disk(config, weights, moments, length, text_tokens),
        validated=_validated(bridges, config, batch, length),
        unknown=unknown,
        step_time=step_time,
        pruning=pruning,
    )


def _disk(
    config: CotrainConfig, weights: int, moments: int, length: int, text_tokens: int
) -> dict[str, int]:
    n = config.train.keep_checkpoints
    return {
        f"{n} checkpoints, one being written": (n + 1) * (weights + moments),
        "twin, bridges, held-out text": weights + HELD_OUT * 8 * length,
        "tokens of the text": 4 * text_tokens,
    }


def _validated(bridges: BridgeSet, config: CotrainConfig, batch: int, length: int) -> float:
    """Return how many training tokens would take as long as calibration and all evaluations.

    Calibration is a pass of the dense model alone, of the 2 + S that an evaluation takes.
    """
    n, train = len(bridges.config.sites), config.train
    cost, of_batch = validation_cost(config, n), batch * length
    calibrated = -(-config.calibration_tokens // of_batch) * of_batch * cost / (2 + n)
    every = train.evaluate_every or train.steps
    sequences = min(HELD_OUT, validation_sequences(config, n, batch))
    return -(-train.steps // every) * sequences * length * cost + calibrated


def _gradients(parameters: int, shards: int) -> dict[str, int]:
    """Return the bytes of gradients in a step, and of the gathered weights if they are sharded."""
    if shards == 1:
        return {"gradients": parameters}
    return {"weights, gathered": parameters, "gradients": parameters + parameters // shards}


def nonzero_at_the_end(sparse: SparseGPT, config: CotrainConfig) -> int:
    """Return how many parameters of the twin may be nonzero at the end (`Plan.twin_nonzero`)."""
    final = config.sparsity.densities(config.train.steps, config.train.steps)
    cut = sum(b.weight.numel() - b.keep(final) for b in budgets(sparse, config.sparsity))
    return count(sparse) - cut


def _trained(sparse: SparseGPT, bridges: BridgeSet) -> tuple[int, int, int]:
    """Return the bytes of weights with their buffers, of Adam's moments, of parameters alone."""
    parameters = [*sparse.parameters(), *bridges.parameters()]
    moments = sum(2 * p.nbytes + 4 for p in parameters)
    return stored(sparse) + stored(bridges), moments, sum(p.nbytes for p in parameters)


def count(module: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def stored(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers, shared ones once, without offloaded ones."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()) if not t.is_meta)


def _step(
    dense: Any, sparse: SparseGPT, bridges: BridgeSet, config: CotrainConfig, rows: int, length: int
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the bytes of a pass over `rows` sequences, by part, and what could not be counted.

    The gradients of the parameters are not among them; `_gradients` has those.
    """
    c, precision = bridges.config, config.train.mixed_precision
    n, d, d_dense = len(c.sites), sparse.d_resid, dense.d_resid
    each = 1.0 if config.hybrid_sites == "all" else config.sites_per_sequence / n
    entered = each if config.weights.hybrid else 0.0  # at every site, as a share of the rows
    attend, think = twin_saved(sparse, length, precision)
    joined = _joined(c.sparse_sites, sparse.n_sites, entered)
    twin = sum((1 + x) * (think if k % 2 else attend).of_row for k, x in enumerate(joined))
    copies = (attend.once + think.once) * sparse.config.num_hidden_layers
    site = site_saved(bridges, length, precision)
    unknown: list[str] = []
    tail = 0.0
    try:
        of_dense = dense_saved(dense.model, length, precision)
    except (RuntimeError, ValueError, TypeError) as error:
        unknown.append(f"the dense model's tail: {type(error).__name__} {error}".split("\n")[0])
    else:
        per_step = of_dense.of_row / (dense.n_sites - 1)
        tail = per_step * sum(_joined(c.sites, dense.n_sites, entered))
        copies += of_dense.once
    streams = n * entered  # how often every sequence ends in one direction
    ends = 3 * 4 * length * (d + streams * (d + d_dense))  # rows, put in order, their gradient
    at_once = min(max(MIN_ROWS, CHUNK // dense.vocab_size), int(rows * length * max(1, streams)))
    head = sum(p.nbytes for p in sparse.lm_head.parameters()) + sum(
        p.nbytes for name, p in sparse.named_parameters() if name == "bigram"
    )
    bytes_of = {
        "kept of the twin's layers": rows * twin,
        "kept of the dense model's layers": rows * tail,
        "residuals at all sites": rows * site.of_row * n,
        "ends of the passes": rows * ends,
        "16-bit copies of weights": copies + site.once * n,
        "gradient of the unembedding": head,
        "a chunk of logits": COPIES * 4 * at_once * dense.vocab_size + head,
    }
    return {name: int(x) for name, x in bytes_of.items()}, tuple(unknown)


def _joined(sites: tuple[int, ...], n_sites: int, entered: float) -> list[float]:
    """Return the rows that have entered by sublayer k = 0 .. n_sites - 2, as shares of the batch.

    `entered` is the share that enters at each of `sites`.
    """
    return [entered * sum(s <= k for s in sites) for k in range(n_sites - 1)]


def _evaluation(dense: Any, sparse: SparseGPT, bridges: BridgeSet, tokens: int) -> int:
    """Return the bytes of an evaluation of `tokens` tokens, in float32 and without gradient.

    An evaluation crosses at all bridged sites at once.
    """
    n, config = len(bridges.config.sites), sparse.config
    width = max(config.intermediate_size, 3 * config.num_attention_heads * config.head_dim)
    residuals = 2 * n * (dense.d_resid + sparse.d_resid)
    widest = (n + 1) * (3 * width + 2 * sparse.d_resid)
    return 4 * tokens * (residuals + widest)
