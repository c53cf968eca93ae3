"""Causal attention with a learned sink per head: flash where nothing is padded, masked elsewhere.

    A_tu = exp(s_tu) / (exp(b_h) + sum_{w <= t} exp(s_tw)),    s_tu = q_t . k_u / sqrt(d_head)

The sink logit b_h enters the softmax denominator only, unscaled (method.md 1.2). Three forms, equal
within 1e-5: `flash_sink` (no T x T tensor), `masked_sink` (padded batches, cached generation) and
`eager_sink` (returns the attention weights).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _FlashSink(torch.autograd.Function):
    """softmax with a sink = flash output scaled by sigmoid(lse - b).

    Its exact backward is the flash backward itself, given lse' = logaddexp(lse, b) and the scaled
    output y; the sink's gradient is -sum over tokens of (1 - scale) * <dy, y>.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, scale):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=scale
        )
        b = sink.view(1, -1, 1).to(lse.dtype)
        share = torch.sigmoid(lse - b)  # batch n_head pos
        y = o * share.unsqueeze(-1).to(o.dtype)
        ctx.save_for_backward(q, k, v, y, torch.logaddexp(lse, b), share)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, lse, share = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy.contiguous(), q, k, v, y, lse.contiguous(), 0.0, True, scale=ctx.scale
        )
        dsink = -((1 - share) * (dy * y).sum(-1)).sum((0, 2))
        return dq, dk, dv, dsink, None


def flash_sink(
    q: Float[Tensor, "batch n_head pos d_head"],
    k: Float[Tensor, "batch n_head pos d_head"],
    v: Float[Tensor, "batch n_head pos d_head"],
    sink: Float[Tensor, " n_head"],
    scale: float,
) -> Float[Tensor, "batch n_head pos d_head"]:
    """Attend causally with sinks on the CPU's flash kernel; nothing may be padded."""
    return _FlashSink.apply(q, k, v, sink, scale)  # pyright: ignore[reportReturnType]


def sdpa_sink(
    module, query, key, value, attention_mask, scaling: float, dropout=0.0, s_aux=None, **kwargs
):
    """Attend in Hugging Face's calling convention; `s_aux` is the sink logits or None."""
    if s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    square = query.shape[2] == key.shape[2]
    if attention_mask is None and square and _flash_fits(query, dropout):
        return flash_sink(query, key, value, s_aux, scaling).transpose(1, 2).contiguous(), None
    return masked_sink(query, key, value, attention_mask, s_aux, scaling, dropout), None


def _flash_fits(query: Tensor, dropout: float) -> bool:
    return query.device.type == "cpu" and dropout == 0.0 and query.dtype in FLASH_DTYPES


def masked_sink(query, key, value, attention_mask, sink, scaling, dropout=0.0):
    """Attend with the sink as one more key and value of zeros whose additive mask is b_h."""
    n_batch, n_head, n_query, _ = query.shape
    bias = _additive(attention_mask, query, key)
    column = sink.view(1, n_head, 1, 1).expand(n_batch, n_head, n_query, 1).to(bias.dtype)
    bias = torch.cat([bias.expand(n_batch, n_head, -1, -1), column], dim=-1)
    key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2).contiguous()


def eager_sink(
    module, query, key, value, attention_mask, scaling, dropout=0.0, s_aux=None, **kwargs
):
    """Attend by the formula itself and return the weights beside the output."""
    scores = query @ key.transpose(2, 3) * scaling + _additive(attention_mask, query, key)
    if s_aux is not None:
        column = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = weights.to(query.dtype)[..., : key.shape[2]]
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _additive(attention_mask, query: Tensor, key: Tensor) -> Tensor:
    """The mask as numbers to add to the scores; None means causal, as in Hugging Face."""
    lowest = torch.finfo(query.dtype).min
    if attention_mask is None:
        n_query, n_key = query.shape[2], key.shape[2]
        rows = torch.arange(n_query, device=query.device)[:, None] + (n_key - n_query)
        attention_mask = (rows >= torch.arange(n_key, device=query.device))[None, None]
    if attention_mask.dtype == torch.bool:
        zeros = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        return zeros.masked_fill(~attention_mask, lowest)
    return attention_mask


# Local to this library: "sdpa" here means sdpa with sinks. transformers looks for this very name.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_sink
