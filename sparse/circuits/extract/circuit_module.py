"""A circuit as a module of its own, which runs in a small part of the model's time.

It has two modes:

    exact    the masked model (mask.py), AbsTopK included; where AbsTopK drops entries, every row of
             a weight is computed, because entries that are not kept compete too
    sliced   AbsTopK is left out and only the kept rows are computed; this is the masked model
             wherever k = width, and another function elsewhere

Of the residual stream z only the *live* channels are computed: those that a kept node reads or
writes, or all of them where AbsTopK chooses among what a sublayer reads. The *dead* channels hold
the embedding and the constants that held nodes write, and nothing else. Before the last norm, only
norms need them, and only the sum of their squares. At a given sublayer that sum depends on nothing
but the token, so it is stored in a table over tokens (`Positions` adds what learned positions do):

    |z|^2 = |z_live|^2 + |e_dead + c_dead|^2        e the embedding, c all constants written so far

sublayers.py holds the sublayers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from sparse.circuits.circuit import Circuit
from sparse.model.config import LOCATIONS, RESIDUAL_TOPK, SparseGPTConfig
from sparse.model.gpt import SparseGPT

from .sublayers import Attend, Map, Place, Read, Think

Mode = Literal["exact", "sliced"]
Values = Mapping[str, Shaped[Tensor, " _"]]
KNOWN = frozenset(  # fields of the config whose every value is computed here (`refuse_unknown`)
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim intermediate_size "
    "max_position_embeddings activation activation_fraction activation_locations attention_sinks "
    "bigram_table rms_norm_eps layer_norm_eps linear_bias logits_bias tie_word_embeddings "
    "embedding_width".split()
)


def extract(circuit: Circuit, model: SparseGPT, mode: Mode = "exact") -> CircuitModule:
    """Return a module that holds only what the circuit needs of its model, and is much faster.

    Mode "exact" gives the logits of the masked model, up to rounding. Mode "sliced" leaves AbsTopK
    out, so its logits are the same only where k is the width. Raises ValueError for another model
    than the circuit's, and for a model with a field of the config that is not supported here.

    >>> from bridges import load_run
    >>> from sparse import extract
    >>> run = load_run("tiny")
    >>> small = extract(run.circuits()["single_double_quote"], run.sparse)
    >>> small.n_nodes, small(run.heldout()[:1]).shape[-1]
    (71, 2048)
    """
    circuit.check(model)
    return CircuitModule(model, circuit.masks(), circuit.ablation, mode)


class CircuitModule(nn.Module):
    """A copy of those weights of a model that matter while some nodes are held at `ablation`.

    `keep` holds bools; all nodes of a location that it does not name are kept, as in `masked`. In
    mode "exact" the outputs are those of the masked model, up to rounding. Mode "sliced" leaves
    AbsTopK out, so it is exact only where k is the width. It is for inference: forward computes no
    gradients. Raises ValueError for a model with a field of the config that is not supported here.
    """

    live: Tensor
    dead: Tensor
    shift: Tensor
    squares: Tensor
    gain: Tensor
    bigram: Tensor | None

    def __init__(
        self, model: SparseGPT, keep: Values, ablation: Values, mode: Mode = "exact"
    ) -> None:
        super().__init__()
        refuse_unknown(model.config, mode)
        if other := sorted(keep.keys() - model.node_widths().keys()):
            raise ValueError(f"CircuitModule: nodes of {other} are not supported; leave them out")
        places = {at: _place(model, at, keep, ablation, mode) for at in model.node_widths()}
        self.mode: Mode = mode
        self.eps = model.config.rms_norm_eps
        self.n_nodes = sum(int(p.kept.sum()) for p in places.values())
        self.n_total = sum(len(p.kept) for p in places.values())
        self.n_model = sum(int(p.count_nonzero()) for p in model.parameters())
        like = model.lm_head.weight.detach()
        steps, constants = [], []
        live = torch.zeros(model.d_resid, dtype=torch.bool, device=like.device)
        for layer, block in enumerate(model.model.blocks):
            p = {at: places[f"{layer}.{at}"] for at in LOCATIONS}
            attn = Attend(block.attn, p, like)  # pyright: ignore[reportArgumentType]
            mlp = Think(block.mlp, p, like)  # pyright: ignore[reportArgumentType]
            for name, body, norm in (("attn", attn, block.norm_1), ("mlp", mlp, block.norm_2)):
                write, k = p[f"{name}.resid_delta"], p[f"{name}.act_in"].k
                constant = write.rest.clone()
                if body.constant:
                    constant[write.kept] = body(like.new_zeros(1, 0), 1).double()[0]
                else:
                    k = k if body.used.any() else 0
                    live |= torch.ones_like(live) if k else body.used | write.kept
                steps.append((None if body.constant else body, norm, k, write.kept))
                constants.append(constant)
        self.steps = nn.ModuleList(
            Step(body, norm, k, writes, constant.to(like), live)
            for (body, norm, k, writes), constant in zip(steps, constants, strict=True)
        )
        self._keep_embeddings(model, live, torch.stack(constants).cumsum(0))

    def _keep_embeddings(self, model: SparseGPT, live: Tensor, written: Tensor) -> None:
        """Store what comes before and after the sublayers, split by live and dead channels.

        `written` is (2L, d_resid): the constants written up to and with each sublayer. `squares`
        holds, for every token, |e_dead + c_dead|^2 before each sublayer and after the last.
        """
        like = model.lm_head.weight.detach()
        c = torch.cat([torch.zeros_like(written[:1]), written])[:, ~live]  # 2L+1 dead
        e = model.model.wte.weight.detach()
        self.register_buffer("live", e[:, live])
        self.register_buffer("dead", e[:, ~live])
        self.register_buffer("shift", c[-1].to(like))
        self.register_buffer("squares", _squares(e[:, ~live].double(), c).to(like))
        self.positions: Positions | None = None
        if model.model.wpe is not None:
            table = model.model.get_parameter("wpe.weight")
            self.positions = Positions(table.detach(), live, c)
        norm = model.model.norm.get_parameter("weight").detach()
        order = torch.cat([live.nonzero(), (~live).nonzero()]).flatten()
        self.register_buffer("gain", norm[order])
        self.unembed = Map(like[:, order], model.logits_bias, like)
        bigram = model.bigram
        self.register_buffer("bigram", None if bigram is None else bigram.detach().clone())

    @torch.no_grad()
    def forward(
        self, ids: Int[Tensor, "batch pos"], at: Int[Tensor, " batch"] | int | None = None
    ) -> Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch vocab"]:
        """Return the logits, or with `at` only those at one position of each text.

        `at` costs less: the unembedding, and in the last layer the query and all that follows it,
        are computed there alone. It is one position for all texts or one for each, and a negative
        one counts from the end. Texts may be padded on the right, because no earlier position sees
        the padding.
        """
        n_batch, n_pos = ids.shape
        if at is not None:
            at = torch.as_tensor(at, device=ids.device).expand(n_batch)
            if not bool(((-n_pos <= at) & (at < n_pos)).all()):
                raise ValueError(
                    f"CircuitModule: at={at.tolist()} must be positions within 0..{n_pos - 1}"
                )
            at = at % n_pos
        tokens, pos = ids.flatten(), torch.arange(n_pos, device=ids.device).repeat(n_batch)
        z, squares = F.embedding(tokens, self.live), F.embedding(tokens, self.squares)
        if self.positions is not None:
            z, squares = self.positions(z, squares, self.dead, tokens, pos)
        for s, step in enumerate(self.steps):
            # from the last layer's attention on, only the positions `at` are needed
            if at is not None and s == len(self.steps) - 2:
                one = torch.arange(n_batch, device=ids.device) * n_pos + at
                z = step(z, squares[:, s, None], n_batch, at, one)
                tokens, pos, squares = tokens[one], pos[one], squares[one]
            else:
                z = step(z, squares[:, s, None], n_batch)
        dead = F.embedding(tokens, self.dead) + self.shift
        dead = dead if self.positions is None else dead + F.embedding(pos, self.positions.dead)
        z = torch.cat([z, dead], dim=-1)
        logits = self.unembed(F.rms_norm(z, z.shape[-1:], self.gain, self.eps))
        if self.bigram is not None:
            logits = logits + F.embedding(tokens, self.bigram)
        return logits if at is not None else logits.unflatten(0, ids.shape)

    @property
    def n_weights(self) -> int:
        """Number of nonzero numbers that the module holds, in embeddings and tables too."""
        held = (b.values() if b.layout == torch.sparse_csr else b for b in self.buffers())
        return sum(int(b.count_nonzero()) for b in held if b.is_floating_point())

    def __repr__(self) -> str:
        return (
            f"CircuitModule(mode={self.mode!r}, {self.n_nodes} of {self.n_total} nodes, "
            f"{self.n_weights} weights of the model's {self.n_model})"
        )


class Step(nn.Module):
    """One sublayer: z <- z + what its kept nodes write + the constants that its held nodes write.

    `body` is None where all that the sublayer writes is constant.
    """

    writes: Tensor
    constant: Tensor | None

    def __init__(
        self,
        body: Attend | Think | None,
        norm: nn.RMSNorm,
        k: int,
        writes: Tensor,
        constant: Tensor,
        live: Tensor,
    ) -> None:
        super().__init__()
        self.body = body
        self.read = None if body is None else Read(norm, k, body.used, live)
        self.register_buffer("writes", writes[live].nonzero().flatten())
        self.register_buffer("constant", constant[live] if constant[live].any() else None)

    def forward(
        self,
        z: Float[Tensor, "N live"],
        squares: Float[Tensor, "N 1"],
        n_batch: int,
        at: Int[Tensor, " batch"] | None = None,
        one: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "n live"]:
        """Return the live channels after the sublayer, for all N = batch * pos rows of `z`.

        With `at`, one position per text, return only those rows; `one` are their numbers in `z`.
        `z` itself is changed unless `one` is given.
        """
        after = z if one is None else z[one]
        if self.body is not None and self.read is not None:
            wrote = self.body(self.read(z, squares), n_batch, at)
            after.index_add_(-1, self.writes, wrote)
        return after if self.constant is None else after.add_(self.constant)


class Positions(nn.Module):
    """Learned positions p, which are added to the embedding e.

        |e + c + p|^2 = |e + c|^2 + |p|^2 + 2 p . c + 2 e . p    over the dead channels

    The first term is a table over tokens, the next two are one over positions (`squares`), and the
    product e . p is computed for every token.
    """

    live: Tensor
    dead: Tensor
    squares: Tensor

    def __init__(self, p: Float[Tensor, "n d"], live: Tensor, c: Tensor) -> None:
        super().__init__()
        self.register_buffer("live", p[:, live])
        self.register_buffer("dead", p[:, ~live])
        q = p[:, ~live].double()
        squares = q.square().sum(1, keepdim=True) + 2 * q @ c.T
        self.register_buffer("squares", squares.to(p))

    def forward(
        self, z: Tensor, squares: Tensor, dead: Tensor, tokens: Tensor, pos: Tensor
    ) -> tuple[Float[Tensor, "N live"], Float[Tensor, "N norm"]]:
        """Return the live channels, and the squares of the dead ones, with the positions added."""
        limit = len(self.live)
        if len(pos) and int(pos[-1]) >= limit:
            raise ValueError(
                f"CircuitModule: {int(pos[-1]) + 1} positions, but the model has {limit} learned "
                "ones; cut the input"
            )
        cross = torch.linalg.vecdot(F.embedding(tokens, dead), F.embedding(pos, self.dead))
        squares = squares + F.embedding(pos, self.squares) + 2 * cross.unsqueeze(-1)
        return z + F.embedding(pos, self.live), squares


def _squares(e: Tensor, c: Tensor) -> Tensor:
    """Return |e + c|^2 for every token (row of e) and sublayer (row of c)."""
    return torch.stack([(e + row).square().sum(1) for row in c], dim=1)


def _place(model: SparseGPT, at: str, keep: Values, ablation: Values, mode: Mode) -> Place:
    """Return the Place of a node location: which nodes are kept, the others' values, and k."""
    node, device = model.node(at), next(model.parameters()).device
    kept = torch.ones(node.width, dtype=torch.bool, device=device)
    rest = torch.zeros(node.width, dtype=torch.float64, device=device)
    if at in keep:
        kept = keep[at].to(device).bool()
    if not kept.all():
        rest = ablation[at].to(rest).masked_fill(kept, 0.0)
    acts = mode == "exact" and node.k < node.width and bool(kept.any())
    return Place(kept, rest, node.k if acts else 0)


def refuse_unknown(config: SparseGPTConfig, mode: str) -> None:
    """Raise ValueError for an unknown mode, or a field of the config that is not supported here.

    Fields outside KNOWN are refused unless they have their default, where they change nothing.
    """
    if mode not in ("exact", "sliced"):
        raise ValueError(f"CircuitModule: mode={mode!r} must be 'exact' or 'sliced'")
    fields = config.architecture()
    odd = {n: v for n, v in fields.items() if n not in KNOWN and v != getattr(SparseGPTConfig, n)}
    if odd.get("positions") == "learned":
        del odd["positions"]
    if set(config.activation_locations) & set(RESIDUAL_TOPK):
        odd["activation_locations"] = config.activation_locations
    for name, value in odd.items():
        raise ValueError(
            f"CircuitModule: SparseGPTConfig.{name}={value!r} is not supported; run the model "
            "itself under sparse.masked"
        )
