"""The trunk of a weight-sparse GPT: embeddings, blocks and the final norm (gpt.py adds the head).

gpt.py explains shapes, sites and nodes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sparse.ops.abs_topk import AbsTopK
from sparse.storage.hub import SavedModel

from .blocks import Attention, Block, FixedPositions, SparseGPTWrite, make_norm, sinusoids
from .borrowed import BorrowedEmbedding, MapIn
from .config import SparseGPTConfig


class SparseGPTPreTrainedModel(SavedModel):
    """What transformers must know about every class of this model."""

    config_class = SparseGPTConfig
    config: SparseGPTConfig
    base_model_prefix = "model"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True  # safe: "sdpa" is sink-aware here (ops/attention_sink.py)
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Raise ValueError for a form of attention that would ignore the sinks.

        Only "sdpa" and "eager" are known to have them (`sparse.ops.attention_sink`).
        """
        name = attn_implementation or ""
        if "/" in name or name.startswith(("flash_attention", "flex_attention", "paged|")):
            raise ValueError(
                f"{type(self).__name__}: attn_implementation={name!r} knows nothing of the "
                'attention sinks; use "sdpa" (which takes the flash form by itself where nothing '
                'is padded) or "eager"'
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the weights of one module in place.

            W_o, W_proj             N(0, (initializer_range / sqrt(2L))^2)
            M_in of borrowed ones   N(0, 0.3^2)
            other weights           N(0, initializer_range^2), 0.02 by default
            biases, sink logits     0

        (docs/method.md#initialisation.) transformers calls this for modules that have parameters or
        buffers of their own, and for no others.
        """
        super()._init_weights(module)
        if isinstance(module, SparseGPTWrite):
            shrunk = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, 0.0, shrunk)
        elif isinstance(module, MapIn):
            init.normal_(module.weight, 0.0, module.START)
        elif isinstance(module, Attention) and module.sinks is not None:
            init.zeros_(module.sinks)
        elif isinstance(module, FixedPositions):
            init.copy_(module.weight, sinusoids(*module.weight.shape))


class SparseGPTModel(SparseGPTPreTrainedModel):
    """The trunk: embeddings, blocks and the final norm."""

    def __init__(self, config: SparseGPTConfig) -> None:
        super().__init__(config)
        if config.embedding_width:
            self.wte = BorrowedEmbedding(config)
        else:
            self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        n_pos, width = config.max_position_embeddings, config.hidden_size
        self.beside = config.positions == "concatenated"
        make = FixedPositions if config.position_sinusoids else nn.Embedding
        width = config.position_channels if self.beside else width
        self.wpe = make(n_pos, width) if config.positions != "none" else None
        blocks = [Block(config, i) for i in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.final_resid = AbsTopK(config.hidden_size, config.hidden_size)
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        learned = module if isinstance(module, nn.Embedding) and module is self.wpe else None
        if learned is not None and self.config.position_init == "zero":
            # `super` has drawn it all the same, so that the draws of all other weights do not shift
            init.zeros_(learned.weight)

    def prepare(self, inputs_embeds: Tensor, attention_mask=None, position_ids=None, past=None):
        """Return the residual at site 0, and the other arguments of every block (`context`)."""
        z = inputs_embeds
        if self.wpe is not None and not self.beside:
            mine = _positions(z, attention_mask, past) if position_ids is None else position_ids
            z = z + self._rows(mine, z, past)
        return self._drop(z), self.context(inputs_embeds, attention_mask, position_ids, past)

    def context(self, z: Tensor, attention_mask=None, position_ids=None, past=None):
        """Return the arguments that every block gets besides its residual.

        They are the concatenated positions, the attention mask and the cache (`past`). Of `z` only
        shape, dtype and device matter.
        """
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=z,
            attention_mask=attention_mask,
            past_key_values=past,
            # only ids that the caller gave: transformers searches them on the host for packed texts
            position_ids=position_ids,
        )
        positions = None
        if self.beside:
            mine = _positions(z, attention_mask, past) if position_ids is None else position_ids
            positions = self._rows(mine, z, past)
            positions = self._drop(positions) if self.config.position_dropout else positions
        return {"positions": positions, "attention_mask": mask, "past_key_values": past}

    def finish(self, z: Tensor) -> Tensor:
        """Return the norm of the last residual, which the unembedding reads."""
        return self.norm(self.final_resid(z))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _rows(self, position_ids: Tensor, z: Tensor, past) -> Tensor:
        """Return the rows of the position table; raise ValueError where it has too few."""
        assert self.wpe is not None
        limit = len(self.wpe.weight)  # pyright: ignore[reportArgumentType]
        if not torch.compiler.is_compiling() and _n_seen(past) + z.shape[1] > limit:
            if (last := int(position_ids.max())) >= limit:
                raise ValueError(
                    f"SparseGPT: {last + 1} positions, but the model has {limit} learned or fixed "
                    "ones; cut the input or train with a larger max_position_embeddings"
                )
        return self.wpe(position_ids)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        z, call = self.prepare(inputs_embeds, attention_mask, position_ids, past_key_values)
        positions = call.pop("positions")
        call["output_attentions"] = kwargs.get("output_attentions", False)
        for block in self.blocks:
            z = block(z, positions, **call)
        return BaseModelOutputWithPast(
            last_hidden_state=self.finish(z), past_key_values=past_key_values
        )


def _n_seen(past) -> int:
    # int: a static cache gives its length as a tensor
    return int(past.get_seq_length()) if past is not None else 0


def _positions(embeds: Tensor, attention_mask, past) -> Tensor:
    """Return the position of every token, counted from 0 without padding on the left."""
    n = embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
    seen = _n_seen(past)
    return torch.arange(seen, seen + n, device=embeds.device).unsqueeze(0)
