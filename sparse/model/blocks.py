"""One layer of a weight-sparse GPT: every node location is a module of its own."""

from __future__ import annotations

from math import log10

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse.ops.abs_topk import AbsTopK, abs_topk
from sparse.ops.attention_sink import ALL_ATTENTION_FUNCTIONS, eager_sink

from .config import SparseGPTConfig

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


class SparseGPTRMSNorm(nn.RMSNorm):
    """RMSNorm with a gain and no bias (the name tells transformers to initialise the gain to 1)."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's own norm is one kernel on CUDA; on a CPU it is many, which also keep x / rms
        if x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """RMSNorm for the CPU, with a backward pass of its own.

        y  = x r w,    r = (mean x^2 + eps)^-1/2
        dw = sum_t r dy x,    dx = r w dy - x r^3 mean(w dy x)

    Besides the gain w, only x and r are kept for the backward pass. t runs over all vectors.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, w)
        return (x * r).mul_(w)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, r, w = ctx.saved_tensors
        dy_x, dw = dy * x, None
        with torch.autocast("cpu", enabled=False):  # autocast would round the products to bf16
            if ctx.needs_input_grad[1]:
                dw = dy_x.flatten(0, -2).t() @ r.flatten()
            if not ctx.needs_input_grad[0]:
                return None, dw, None
            c = (dy_x @ w).unsqueeze(-1) * r**3 / len(w)
        return torch.mul(dy, w, out=dy_x).mul_(r).addcmul_(x, c, value=-1), dw, None


class SparseGPTLayerNorm(nn.LayerNorm):
    """LayerNorm with a gain and, where the config says so, a bias."""


def make_norm(config: SparseGPTConfig, width: int) -> nn.Module:
    """Return the config's kind of norm over `width` channels."""
    if config.norm == "rms":
        return SparseGPTRMSNorm(width, config.rms_norm_eps)
    return SparseGPTLayerNorm(width, config.layer_norm_eps, bias=config.norm_bias)


class FixedPositions(nn.Module):
    """A position table that is not trained: it holds sinusoids, or what a loaded file has there."""

    weight: Tensor

    def __init__(self, n_pos: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", sinusoids(n_pos, width))

    def forward(self, positions: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        return F.embedding(positions, self.weight)


def sinusoids(n_pos: int, width: int) -> Float[Tensor, "pos width"]:
    """Return a position table: the sines, then the cosines, of h = width // 2 log-spaced periods.

        p_j = 4 (max(n_pos, 4) / 4)^(j / (h - 1)),    e_t = [sin(2 pi t / p), cos(2 pi t / p)]

    (docs/method.md#positions.) An odd width ends in a channel of zeros; a width of 1 is the sine
    alone.
    """
    half = max(1, width // 2)
    periods = torch.logspace(log10(4), log10(max(n_pos, 4)), steps=half)
    angles = torch.arange(n_pos, dtype=torch.float32)[:, None] * (2 * torch.pi / periods)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(waves, (0, max(0, width - 2 * half)))[:, :width].contiguous()


class SparseGPTWrite(nn.Linear):
    """The matrix with which a sublayer writes to the residual stream (W_o or W_proj).

    It is a class of its own because its entries start smaller than those of other matrices
    (docs/method.md#initialisation).
    """


class Attention(nn.Module):
    """Causal attention, with AbsTopK on what it reads, on q, k and v, and on what it writes.

    These are its node locations: `act_in`, `q`, `k`, `v` and `resid_delta`.
    """

    def __init__(self, config: SparseGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.n_head, self.d_head = config.num_attention_heads, config.head_dim
        self.scaling, self.is_causal = self.d_head**-0.5, True
        width = self.n_head * self.d_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.read_width, 3 * width, config.linear_bias)
        self.out = SparseGPTWrite(width, config.hidden_size, config.linear_bias)
        self.sinks = nn.Parameter(torch.zeros(self.n_head)) if config.attention_sinks else None
        self.act_in = AbsTopK(config.read_width, config.k("attn_in"))
        self.q = AbsTopK(width, config.k("attn_q"))
        self.k = AbsTopK(width, config.k("attn_k"))
        self.v = AbsTopK(width, config.k("attn_v"))
        self.resid_delta = AbsTopK(config.hidden_size, config.k("attn_out"))

    def forward(self, x: Tensor, attention_mask=None, past_key_values=None, at=None, **kwargs):
        """Return what attention writes, (batch pos d_resid), and the attention weights.

        The weights are None unless the form of attention that computes them runs
        (`sparse.ops.attention_sink.eager_sink`). With `at`, some positions of every row, (batch
        wanted), only the queries there are run and (batch wanted d_resid) is returned; the
        attention mask must then be that of these queries, (batch 1 wanted pos).
        """
        x = self.act_in(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = picked(q, at)
        q, k, v = self._heads(self.q(q)), self._heads(self.k(k)), self._heads(self.v(v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_sink
        )
        drop = self.dropout if self.training else 0.0
        kwargs |= {"scaling": self.scaling, "dropout": drop, "s_aux": self.sinks}
        y, weights = attend(self, q, k, v, attention_mask, **kwargs)
        out = F.dropout(self.out(y.flatten(-2)), self.dropout, self.training)
        return self.resid_delta(out), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.d_head)).transpose(
            1, 2
        )  # batch n_head pos d_head


class MLP(nn.Module):
    """A feed-forward layer, with AbsTopK on what it reads, on its neurons, and on what it writes.

    These are its node locations: `act_in`, `post_act` and `resid_delta`.
    """

    def __init__(self, config: SparseGPTConfig) -> None:
        super().__init__()
        d, d_mlp = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.dropout
        self.act_in = AbsTopK(config.read_width, config.k("mlp_in"))
        self.fc = nn.Linear(config.read_width, d_mlp, config.linear_bias)
        self.post_act = AbsTopK(d_mlp, config.k("mlp_neuron"))
        self.proj = SparseGPTWrite(d_mlp, d, config.linear_bias)
        self.resid_delta = AbsTopK(d, config.k("mlp_out"))

    def forward(self, x: Float[Tensor, "*batch d_read"]) -> Float[Tensor, "*batch d_resid"]:
        """Return what the MLP writes."""
        a = self.post_act(self.activation(self.fc(self.act_in(x))))
        return self.resid_delta(F.dropout(self.proj(a), self.dropout, self.training))


class Block(GradientCheckpointingLayer):
    """One layer: two sublayers, each adding to the residual stream."""

    sublayers_compiled: bool = False
    """Whether `attend` and `think` run through torch.compile (modes.py)."""

    def __init__(self, config: SparseGPTConfig, layer_idx: int) -> None:
        super().__init__()
        d, beside = config.hidden_size, config.position_channels
        self.relu = config.residual_activation == "relu"
        self.k_attn, self.k_mlp = config.k("resid_post_attn"), config.k("resid_post_mlp")
        self.norm_1 = make_norm(config, d)
        self.norm_p1 = make_norm(config, beside) if beside else None
        self.attn = Attention(config, layer_idx)
        self.norm_2 = make_norm(config, d)
        self.norm_p2 = make_norm(config, beside) if beside else None
        self.mlp = MLP(config)

    def attend(self, z: Tensor, positions: Tensor | None = None, at=None, **call) -> Tensor:
        """Return the residual after the attention sublayer, from `z` before it.

        `positions` are concatenated position channels. With `at`, some positions of every row,
        (batch wanted), only the residual there is returned, (batch wanted d_resid).
        """
        u = _beside(self.norm_1(z), self.norm_p1, positions)
        return self._settle(picked(z, at) + self.attn(u, at=at, **call)[0], self.k_attn)

    def think(self, z: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the residual after the MLP sublayer, from `z` before it."""
        u = _beside(self.norm_2(z), self.norm_p2, positions)
        return self._settle(z + self.mlp(u), self.k_mlp)

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None, **call) -> Tensor:
        return self.think(self.attend(hidden_states, positions, **call), positions)

    def _settle(self, z: Tensor, k: int) -> Tensor:
        """Return the residual after the ReLU and AbsTopK that a config may ask for.

        By default both are off and `z` is returned. Some released models have them.
        """
        return abs_topk(torch.relu(z) if self.relu else z, k)


def picked(
    x: Float[Tensor, "batch pos d"], at: Int[Tensor, "batch wanted"] | None
) -> Float[Tensor, "batch _ d"]:
    """Return x at positions `at` of every row, (batch wanted d); all of x where `at` is None."""
    return x if at is None else x[torch.arange(len(x), device=x.device)[:, None], at]


def _beside(u: Tensor, norm: nn.Module | None, positions: Tensor | None) -> Tensor:
    """Return what a sublayer reads: `u`, and concatenated positions, if any, after their norm."""
    if norm is None:
        return u
    return torch.cat([u, norm(positions).expand(*u.shape[:-1], -1)], dim=-1)
