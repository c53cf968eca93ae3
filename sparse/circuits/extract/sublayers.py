"""The sublayers of a circuit: only the rows and columns of the weights that it needs.

circuit_module.py puts them together. A node that is not kept is held at a constant mu, so what it
adds to the output of the next matrix is a constant too, and moves into the bias. Only the kept
columns K of a matrix are left:

    W (m x + (1 - m) mu) + b = W[:, K] x_K + b',        b' = b + W ((1 - m) mu)

Where AbsTopK acts (k > 0 here) every row of a matrix is computed, since a value that is not kept
still competes for the k places; elsewhere only the kept rows are. Rows and columns whose results
nothing reads are left out.

The score q . k of a head is a sum over its channels. A channel that is kept in both q and k is
multiplied as usual. A channel that is kept in k alone adds mu_q k to the score, one number per key;
all of them together make one channel of the new k, against a 1 in q. A channel that is kept in q
alone adds the same number to the scores of all keys, which changes the softmax only beside a sink.
The held values of v share one channel per head, because with a sink the attention weights of a head
do not add up to 1, so that what they write is not constant.

Shapes: N = batch * pos tokens, one row each; n_in and n_out are the columns and rows of a matrix
that are left. All constants are folded in float64 and then rounded once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse.model.blocks import MLP, Attention
from sparse.ops.abs_topk import abs_topk
from sparse.ops.attention_sink import flash_sink, kernel_for, masked_sink

ROWS_AT_ONCE = 256
"""Rows of x per sparse product, so that x and y stay in the cache."""


class Place(NamedTuple):
    """What a circuit says of one node location: which nodes are kept, and the others' values."""

    kept: Tensor
    """Which nodes are kept, bool."""
    rest: Tensor
    """The value at which every other node is held, and 0 at the kept ones; float64."""
    k: int
    """How many entries AbsTopK keeps; 0 where it does not act."""

    def rows(self) -> Tensor:
        """Mark the rows to compute: all of them where AbsTopK acts, else those of kept nodes."""
        return torch.ones_like(self.kept) if self.k else self.kept

    def among(self) -> Tensor | None:
        """Return the places of the kept nodes among those rows; None where all rows are kept."""
        return self.kept.nonzero().flatten() if self.k else None


Places = Mapping[str, Place]


class Map(nn.Module):
    """A matrix and what follows it: y = AbsTopK(act(W x + b), k)[index].

    `act`, AbsTopK and the choice by `index` are left out where they are not given (k = 0). W is
    stored in compressed rows where that is faster.
    """

    weight: Tensor
    bias: Tensor | None
    index: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "n_out n_in"],
        bias: Float[Tensor, " n_out"] | None,
        like: Tensor,
        k: int = 0,
        index: Int[Tensor, " kept"] | None = None,
        act: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.k, self.act, self.sparse = k, act, _sparse_pays(weight, like)
        weight = weight.to(like, copy=True)
        if self.sparse:
            with warnings.catch_warnings():  # torch calls the whole layout a beta
                warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)
                weight = weight.to_sparse_csr()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.to(like, copy=True))
        self.register_buffer("index", index)

    def forward(self, x: Float[Tensor, "N n_in"]) -> Float[Tensor, "N n"]:
        """Return y; AbsTopK sees all rows of W before `index` chooses among them."""
        y = self._sparse(x) if self.sparse else F.linear(x, self.weight, self.bias)
        y = y if self.act is None else self.act(y)
        y = abs_topk(y, self.k) if self.k else y
        return y if self.index is None else y.index_select(-1, self.index)

    def _sparse(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.weight.shape[0])
        for i in range(0, len(x), ROWS_AT_ONCE):
            part = x[i : i + ROWS_AT_ONCE].t().contiguous()
            y[i : i + ROWS_AT_ONCE] = (self.weight @ part).t()
        return y if self.bias is None else y.add_(self.bias)


def _sparse_pays(weight: Tensor, like: Tensor) -> bool:
    """Return whether W x is faster with W in compressed rows than dense.

    A nonzero weight in compressed rows costs as much as 8 dense multiply-adds, and the transposes
    of x and y cost 40 per channel. Compressed rows are only used on a CPU.
    """
    n_out, n_in = weight.shape
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return False
    return 8 * int(weight.count_nonzero()) + 40 * (n_out + n_in) < n_out * n_in


class Read(nn.Module):
    """What a sublayer reads: u = AbsTopK(gain z / rms(z), k)[used].

    It is computed from the live channels of z and the sum of squares of the others. `used` and
    `live` mark channels of the residual. With AbsTopK every channel is live.
    """

    gain: Tensor
    index: Tensor

    def __init__(self, norm: nn.RMSNorm, k: int, used: Tensor, live: Tensor) -> None:
        super().__init__()
        self.d, self.eps, self.k = len(norm.weight), norm.eps or 0.0, k
        gain = norm.weight.detach()
        self.register_buffer("gain", gain.clone() if k else gain[used])
        self.register_buffer("index", used[live].nonzero().flatten())

    def forward(
        self, z: Float[Tensor, "N live"], squares: Float[Tensor, "N 1"]
    ) -> Float[Tensor, "N n_in"]:
        """Return u; `squares` is the sum of squares over the channels that are not live."""
        total = torch.linalg.vecdot(z, z).unsqueeze(-1) + squares
        scale = (total / self.d + self.eps).rsqrt()
        if not self.k:
            return z.index_select(-1, self.index) * scale * self.gain
        return abs_topk(z * scale * self.gain, self.k).index_select(-1, self.index)


class Think(nn.Module):
    """The MLP of a circuit. `used` marks the read channels that it needs.

    `constant` says that all it writes is constant.
    """

    def __init__(self, mlp: MLP, p: Places, like: Tensor) -> None:
        super().__init__()
        middle, write = p["mlp.post_act"], p["mlp.resid_delta"]
        w_fc, b_fc = _affine(mlp.fc, p["mlp.act_in"])
        w_proj, b_proj = _affine(mlp.proj, middle)
        rows = write.rows()
        live = middle.kept & w_proj[rows].any(0)
        middle = middle._replace(kept=live, k=middle.k if live.any() else 0)
        self.used = p["mlp.act_in"].kept & w_fc[middle.rows()].any(0)
        weight, bias = w_fc[middle.rows()][:, self.used], b_fc[middle.rows()]
        self.fc = Map(weight, bias, like, middle.k, middle.among(), mlp.activation)
        self.proj = Map(w_proj[rows][:, live], b_proj[rows], like, write.k, write.among())
        self.constant = not live.any()

    def forward(
        self, u: Float[Tensor, "N n_in"], n_batch: int = 1, at: None = None
    ) -> Float[Tensor, "N n_out"]:
        """Return what is written to the kept channels.

        Each token is computed by itself, so `n_batch` and `at` are not used.
        """
        return self.proj(self.fc(u))


class Attend(nn.Module):
    """The attention of a circuit, with only the heads whose output anything reads.

    Each of these heads has `width` channels, padded with zeros. `used` marks the read channels that
    it needs; `constant` says that all it writes is constant.
    """

    sink: Tensor | None

    def __init__(self, attn: Attention, p: Places, like: Tensor) -> None:
        super().__init__()
        write, value = p["attn.resid_delta"], p["attn.v"]
        heads, rows = (attn.n_head, attn.d_head), write.rows()
        w_out, b_out = _affine(attn.out, value if attn.sinks is None else None)
        # d_resid n_head*d_head: what held values write per unit of attention
        fixed = w_out * value.rest
        if attn.sinks is None:  # a head's weights add up to 1, so `_affine` put it into the bias
            fixed = torch.zeros_like(fixed)
        fixed = fixed.unflatten(1, heads).sum(2)
        live = value.kept & w_out[rows].any(0)
        left = (live.view(heads).any(1) | fixed[rows].any(0)).nonzero().flatten()
        mixes, out = _channels(attn, p, live, fixed, left.tolist())
        self.n_head, self.width = len(left), len(mixes[0]) // max(len(left), 1)
        self.constant = not self.n_head

        w, b = _affine(attn.qkv, p["attn.act_in"])
        thirds = [
            _Third(w_x, b_x, p[f"attn.{x}"].k, mix)
            for x, w_x, b_x, mix in zip("qkv", w.chunk(3), b.chunk(3), mixes, strict=True)
        ]
        self.used = p["attn.act_in"].kept & torch.cat([t.rows() for t in thirds]).any(0)
        self.q, self.k, self.v = (t.module(self.used, like) for t in thirds)
        self.out = Map(out[rows], b_out[rows], like, write.k, write.among())
        sink = None if attn.sinks is None else attn.sinks.detach()[left]
        self.register_buffer("sink", sink)

    def forward(
        self, u: Float[Tensor, "N n_in"], n_batch: int, at: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "n n_out"]:
        """Return what is written to the kept channels, at all positions or at `at` of each text."""
        if self.constant:
            return self.out(u.new_empty(len(u) if at is None else n_batch, 0))
        k, v, seen = self._split(self.k(u), n_batch), self._split(self.v(u), n_batch), None
        if at is not None:
            n_pos = len(u) // n_batch
            u = u[torch.arange(n_batch, device=u.device) * n_pos + at]
            seen = (torch.arange(n_pos, device=u.device) <= at[:, None])[:, None, None]
        q = self._split(self.q(u), n_batch)
        return self.out(_attend(q, k, v, self.sink, seen).reshape(len(u), -1))

    def _split(self, x: Tensor, n_batch: int) -> Tensor:
        x = x.view(n_batch, -1, self.n_head, self.width)
        return x.transpose(1, 2)  # batch n_head pos width


def _attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, seen: Tensor | None) -> Tensor:
    """Return what every head mixes, (batch pos n_head width).

    Attention is causal. With `seen`, (batch 1 1 pos), one query per text sees the keys that it
    marks. The scores are not scaled, since `_channels` has scaled q.
    """
    if sink is None:
        causal = seen is None
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=1.0)
    elif seen is None and kernel_for(q):
        y = flash_sink(q, k, v, sink, 1.0)
    else:
        return masked_sink(q, k, v, seen, sink, 1.0)
    return y.transpose(1, 2)


def _affine(linear: nn.Linear, read: Place | None) -> tuple[Tensor, Tensor]:
    """Return W and b' = b + W mu in float64, mu being the held values of `read`.

    b is 0 where the linear has no bias; b' = b where `read` is None.
    """
    w = linear.weight.detach().double()
    b = w.new_zeros(len(w)) if linear.bias is None else linear.bias.detach().double()
    return w, b if read is None else b + w @ read.rest


class _Third(NamedTuple):
    """One of q, k and v: x = AbsTopK(W u + b, k), then the product of `mix` with [x, 1].

    `mix` is (n_head width) x (n_head d_head + 1); `_channels` makes it.
    """

    weight: Tensor
    bias: Tensor
    k: int
    mix: Tensor

    def rows(self) -> Tensor:
        """Return the weight to compute: all of W where AbsTopK acts, else `mix` W."""
        return self.weight if self._competes() else self.mix[:, :-1] @ self.weight

    def module(self, used: Tensor, like: Tensor) -> nn.Module:
        rows, live = self.rows()[:, used], self.mix[:, :-1].any(0)
        if not self._competes():
            return Map(rows, self.mix[:, :-1] @ self.bias + self.mix[:, -1], like)
        first = Map(rows, self.bias, like, self.k, live.nonzero().flatten())
        return nn.Sequential(first, Map(self.mix[:, :-1][:, live], self.mix[:, -1], like))

    def _competes(self) -> bool:
        return bool(self.k) and bool(self.mix[:, :-1].any())


def _channels(
    attn: Attention, p: Places, live: Tensor, fixed: Tensor, left: list[int]
) -> tuple[list[Tensor], Tensor]:
    """Return the matrices that make new channels of q, k and v, and the one that reads v's.

        q . k = sum over c kept in both + mu_q . k + (q . mu_k + mu_q . mu_k)

    `left` are the heads that remain. The first three matrices are `_Third.mix`: each row makes one
    channel of one head, and the last column holds constants. The fourth is d_resid x (n_head width)
    and takes the place of W_o. Without a sink the last bracket, which is equal at all keys, cancels
    in the softmax and is left out. `live` marks the channels of v that are kept and read, `fixed`
    (d_resid n_head) is what the held channels of v write per unit of attention.
    """
    q, k = p["attn.q"], p["attn.k"]
    w_out = attn.out.weight.detach().double()
    n = len(live)
    unit = torch.eye(n + 1, dtype=torch.float64, device=live.device)
    one, zero = unit[-1], torch.zeros_like(unit[-1])
    made: list[list[list[Tensor]]] = []  # head, then q, k, v and what reads v, then channel
    for h in left:
        span = torch.zeros_like(live)
        span[h * attn.d_head : (h + 1) * attn.d_head] = True
        mu_q, mu_k = (torch.where(span, x.rest, 0.0) for x in (q, k))
        of_k, of_q = zero.clone(), zero.clone()
        of_k[:n] = mu_q * k.kept
        if attn.sinks is not None:
            of_q[:n], of_q[n] = mu_k * q.kept, mu_q @ mu_k
        both = list(unit[:n][q.kept & k.kept & span])
        left_q, left_k = [*both], [*both]
        if of_k.any():
            left_q, left_k = [*left_q, one], [*left_k, of_k]
        if of_q.any():
            left_q, left_k = [*left_q, of_q], [*left_k, one]
        values, reads = list(unit[:n][live & span]), list(w_out.T[live & span])
        if fixed[:, h].any():
            values, reads = [*values, one], [*reads, fixed[:, h]]
        made.append([[x * attn.scaling for x in left_q], left_k, values, reads])
    width = max((len(rows) for head in made for rows in head), default=0)
    found = []
    for i, length in enumerate((n + 1, n + 1, n + 1, len(w_out))):
        padded = unit.new_zeros(len(left), width, length)
        for h, head in enumerate(made):
            if head[i]:
                padded[h, : len(head[i])] = torch.stack(head[i])
        found.append(padded.flatten(0, 1))
    return found[:3], found[3].T
