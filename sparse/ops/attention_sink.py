"""Causal attention with a learned sink per head: flash where nothing is padded, masked elsewhere.

    A_tu = exp(s_tu) / (exp(b_h) + sum_{w <= t} exp(s_tw)),    s_tu = q_t . k_u / sqrt(d_head)

The sink logit b_h, one learned number per head, enters the softmax denominator only and is not
divided by sqrt(d_head) (docs/method.md#attention-with-sinks). Three functions compute this, with
outputs equal within 1e-5: `flash_sink` (makes no T x T tensor), `masked_sink` (for padded batches,
cached generation and dropout) and `eager_sink` (returns the attention weights too). `sdpa_sink`
chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface


class Kernel(NamedTuple):
    """A causal flash attention of torch, forward and backward.

    forward(q, k, v, scale) returns the output o, lse (batch n_head pos_padded, the log-sum-exp of
    the scores) and whatever else the backward pass needs; backward(dy, q, k, v, o, lse, scale,
    *else) returns dq, dk, dv. The backward pass knows the softmax only by o and lse, so those of
    another softmax can be passed to it (`_FlashSink`).
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


def _cpu(q, k, v, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=scale
    )


def _cpu_backward(dy, q, k, v, o, lse, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, q, k, v, o, lse, 0.0, True, scale=scale
    )


def _flash(q, k, v, scale):
    o, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, True, scale=scale
    )
    return o, lse, seed, offset


def _flash_backward(dy, q, k, v, o, lse, scale, seed, offset):
    n = q.shape[2]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dy, q, k, v, o, lse, None, None, n, n, 0.0, True, seed, offset, scale=scale
    )


def _efficient(q, k, v, scale):
    """Run the memory-efficient kernel; it pads lse with infinities to 32 n positions."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, True, scale=scale
    )


def _efficient_backward(dy, q, k, v, o, lse, scale, seed, offset):
    wanted = [True, True, True, False]
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dy, q, k, v, None, o, lse, seed, offset, 0.0, wanted, True, scale=scale
    )[:3]


KERNELS = {
    "cpu": Kernel(_cpu, _cpu_backward),
    "flash": Kernel(_flash, _flash_backward),
    "efficient": Kernel(_efficient, _efficient_backward),
}
CUDA_HEAD = 8  # the kernels for CUDA want d_head to be a multiple of this
FLASH_MAX_HEAD = 256


def kernel_for(q: Float[Tensor, "batch n_head pos d_head"]) -> str | None:
    """Return the name in KERNELS of the kernel for queries like `q`; None where there is none.

    It depends on their device, dtype and d_head.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    match q.device.type:
        case "cpu" if half or q.dtype in (torch.float32, torch.float64):
            return "cpu"
        case "cuda" if half and q.shape[-1] <= FLASH_MAX_HEAD:
            return "flash"
        case "cuda" if half or q.dtype == torch.float32:
            return "efficient"
    return None


class _FlashSink(torch.autograd.Function):
    """Attention with a sink from attention without: y = o * share, share = sigmoid(lse - b).

    o is the flash output and lse the log-sum-exp of its scores. The exact backward pass is that of
    flash attention, given y in the place of o and logaddexp(lse, b) in the place of lse. The sink's
    gradient is -sum over tokens of (1 - share) * <dy, y>.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, scale, kernel):
        o, lse, *rest = KERNELS[kernel].forward(q, k, v, scale)
        b = sink.view(1, -1, 1).to(lse.dtype)
        share = torch.sigmoid(lse.narrow(-1, 0, q.shape[2]) - b)  # batch n_head pos
        y = o * share.unsqueeze(-1).to(o.dtype)
        ctx.save_for_backward(q, k, v, y, torch.logaddexp(lse, b), share, *rest)
        ctx.scale, ctx.kernel, ctx.sink_dtype = scale, kernel, sink.dtype
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, lse, share, *rest = ctx.saved_tensors
        # lay dy out as the layer above does, (batch pos n_head d_head) in memory
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
        backward = KERNELS[ctx.kernel].backward
        dq, dk, dv = backward(dy, q, k, v, y, lse.contiguous(), ctx.scale, *rest)
        dsink = -((1 - share) * (dy * y).sum(-1, dtype=share.dtype)).sum((0, 2))
        return dq, dk, dv, dsink.to(ctx.sink_dtype), None, None


def flash_sink(
    q: Float[Tensor, "batch n_head pos d_head"],
    k: Float[Tensor, "batch n_head pos d_head"],
    v: Float[Tensor, "batch n_head pos d_head"],
    sink: Float[Tensor, " n_head"],
    scale: float,
) -> Float[Tensor, "batch n_head pos d_head"]:
    """Return causal attention with sinks, by a flash kernel of torch; no text may be padded.

    On CUDA, float32 uses the memory-efficient kernel and 16-bit floats the flash kernel, which
    needs compute capability 8.0 (wider heads than FLASH_MAX_HEAD use the former too). There, heads
    are padded with zeros to a multiple of 8 channels. Raises ValueError where there is no kernel
    for the device and dtype.
    """
    kernel, d_head = kernel_for(q), q.shape[-1]
    if kernel is None:
        raise ValueError(
            f"flash_sink: no flash kernel for {q.dtype} on {q.device.type}; use masked_sink"
        )
    lacking = 0 if kernel == "cpu" else -d_head % CUDA_HEAD
    if lacking:
        q, k, v = (F.pad(x, (0, lacking)) for x in (q, k, v))
    y = _FlashSink.apply(q, k, v, sink, scale, kernel)
    return y[..., :d_head]  # pyright: ignore[reportOptionalSubscript]


def sdpa_sink(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling: float,
    dropout=0.0,
    s_aux=None,
    output_attentions=False,
    **kwargs,
):
    """Return (output, weights or None) of attention, by the fastest form that fits the call.

    The arguments are those of Hugging Face's attention functions; `s_aux` is the sink logits, or
    None. With `output_attentions`, `eager_sink` runs, which has the weights, and the output is the
    same. (transformers' own sdpa warns and leaves the weights out.)
    """
    if output_attentions:
        return eager_sink(module, query, key, value, attention_mask, scaling, dropout, s_aux)
    if s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    n_query = query.shape[2]
    if attention_mask is None and n_query > 1:  # cut the slots of a static cache not yet filled
        key, value = key[:, :, :n_query], value[:, :, :n_query]
    square = n_query == key.shape[2]
    if attention_mask is None and square and dropout == 0.0 and kernel_for(query):
        return flash_sink(query, key, value, s_aux, scaling).transpose(1, 2).contiguous(), None
    return masked_sink(query, key, value, attention_mask, s_aux, scaling, dropout), None


def masked_sink(query, key, value, attention_mask, sink, scaling, dropout=0.0):
    """Return attention with sinks, (batch pos n_head d_head), under any mask.

    The sink is one more key and value of zeros, and its entry in the additive mask is b_h.
    """
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
    """Return attention with sinks, (batch pos n_head d_head), and its weights.

    It computes the formula above as it stands. The weights leave out the column of the sink.
    """
    scores = query @ key.transpose(2, 3) * scaling + _additive(attention_mask, query, key)
    if s_aux is not None:
        column = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = weights.to(query.dtype)[..., : key.shape[2]]
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _additive(attention_mask, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as numbers to add to the scores.

    None means what it does in Hugging Face: a single query sees every key; of several queries,
    query i sees keys 0..i.
    """
    lowest = torch.finfo(query.dtype).min
    if attention_mask is None:
        n_query, n_key = query.shape[2], key.shape[2]
        first = n_key - 1 if n_query == 1 else 0
        rows = torch.arange(n_query, device=query.device)[:, None] + first
        attention_mask = (rows >= torch.arange(n_key, device=query.device))[None, None]
    if attention_mask.dtype == torch.bool:
        zeros = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        return zeros.masked_fill(~attention_mask, lowest)
    return attention_mask


# In this library "sdpa" means sdpa with sinks. transformers looks for a table of this very name.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_sink
