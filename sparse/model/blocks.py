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
        if x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return super().forward(x)  # one kernel on CUDA; on a CPU many, which keep x / rms too
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean x^2 + eps)^-1/2; keeps x and r alone.

    dw = sum_t r dy x,    dx = r w dy - x r^3 mean(w dy x)
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
        with torch.autocast("cpu", enabled=False):  # its products would be rounded to bf16
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
    """A position table that is not trained: the sinusoids it starts as, or what was loaded."""

    weight: Tensor

    def __init__(self, n_pos: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", sinusoids(n_pos, width))

    def forward(self, positions: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        return F.embedding(positions, self.weight)


def sinusoids(n_pos: int, width: int) -> Float[Tensor, "pos width"]:
    """Return sines, then cosines, of h = width // 2 log-spaced periods.

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
    """The matrix with which a sublayer writes to the residual stream; it starts smaller."""


class Attention(nn.Module):
    """Causal attention that reads, mixes and writes few channels."""

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
        """Return what attention writes (batch pos d_resid), and its weights where eager.

        With `at`, one position of every row, only that query is run: (batch 1 d_resid). The
        attention mask must then be that query's, (batch 1 1 pos).
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
    """A feed-forward layer that reads, uses and writes few channels."""

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
        u = _beside(self.norm_1(z), self.norm_p1, positions)
        return self._settle(picked(z, at) + self.attn(u, at=at, **call)[0], self.k_attn)

    def think(self, z: Tensor, positions: Tensor | None = None) -> Tensor:
        u = _beside(self.norm_2(z), self.norm_p2, positions)
        return self._settle(z + self.mlp(u), self.k_mlp)

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None, **call) -> Tensor:
        return self.think(self.attend(hidden_states, positions, **call), positions)

    def _settle(self, z: Tensor, k: int) -> Tensor:
        """What becomes of the residual after an addition: nothing, in every model we train."""
        return abs_topk(torch.relu(z) if self.relu else z, k)


def picked(
    x: Float[Tensor, "batch pos d"], at: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch _ d"]:
    """Return x at position `at` of every row, (batch 1 d); all of x where `at` is None."""
    return x if at is None else x[torch.arange(len(x), device=x.device), at].unsqueeze(1)


def _beside(u: Tensor, norm: nn.Module | None, positions: Tensor | None) -> Tensor:
    """The read channels: `u`, and the normed position channels beside it."""
    if norm is None:
        return u
    return torch.cat([u, norm(positions).expand(*u.shape[:-1], -1)], dim=-1)
