"""One layer of a weight-sparse GPT: every node location is a module of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .activation import AbsTopK
from .attention import ALL_ATTENTION_FUNCTIONS, eager_sink
from .config import SparseGPTConfig

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


class SparseGPTRMSNorm(nn.RMSNorm):
    """RMSNorm with a gain and no bias (the name tells transformers to initialise the gain to 1)."""


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
        self.qkv = nn.Linear(config.hidden_size, 3 * width)
        self.out = SparseGPTWrite(width, config.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(self.n_head)) if config.attention_sinks else None
        self.act_in = AbsTopK(config.hidden_size, config.k("attn_in"))
        self.q = AbsTopK(width, config.k("attn_q"))
        self.k = AbsTopK(width, config.k("attn_k"))
        self.v = AbsTopK(width, config.k("attn_v"))
        self.resid_delta = AbsTopK(config.hidden_size, config.k("attn_out"))

    def forward(self, x: Tensor, attention_mask=None, past_key_values=None, **kwargs):
        """Return what attention writes (batch pos d_resid), and its weights where eager."""
        x = self.act_in(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = self._heads(self.q(q)), self._heads(self.k(k)), self._heads(self.v(v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_sink
        )
        y, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, s_aux=self.sinks
        )
        return self.resid_delta(self.out(y.flatten(-2))), weights

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
        self.act_in = AbsTopK(d, config.k("mlp_in"))
        self.fc = nn.Linear(d, d_mlp)
        self.post_act = AbsTopK(d_mlp, config.k("mlp_neuron"))
        self.proj = SparseGPTWrite(d_mlp, d)
        self.resid_delta = AbsTopK(d, config.k("mlp_out"))

    def forward(self, x: Float[Tensor, "*batch d_resid"]) -> Float[Tensor, "*batch d_resid"]:
        """Return what the MLP writes."""
        a = self.post_act(self.activation(self.fc(self.act_in(x))))
        return self.resid_delta(self.proj(a))


class Block(GradientCheckpointingLayer):
    """One layer: two sublayers, each adding to the residual stream."""

    def __init__(self, config: SparseGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm_1 = SparseGPTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, layer_idx)
        self.norm_2 = SparseGPTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def attend(self, z: Tensor, **call) -> Tensor:
        return z + self.attn(self.norm_1(z), **call)[0]

    def think(self, z: Tensor) -> Tensor:
        return z + self.mlp(self.norm_2(z))

    def forward(self, hidden_states: Tensor, **call) -> Tensor:
        return self.think(self.attend(hidden_states, **call))
