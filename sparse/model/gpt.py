"""A GPT whose weights are meant to be almost all zero, as a first-class Hugging Face model.

Shapes: batch pos vocab; d_resid = hidden_size; d_mlp = intermediate_size; q, k, v: n_head * d_head.
Sites:  0 after the embeddings, 2i+1 after attention i, 2i+2 after MLP i; 2L+1 in all.
Nodes:  the entries of the vectors at the eight locations of a layer, all taken after AbsTopK
        (Gao et al. 2025, Figure 12; docs/method.md#the-sparse-model):

    u = AbsTopK(norm_1(z))                  {l}.attn.act_in
    q, k, v = AbsTopK of each third of W_qkv u + b_qkv        {l}.attn.q  {l}.attn.k  {l}.attn.v
    z <- z + AbsTopK(W_o attend(q, k, v) + b_o)               {l}.attn.resid_delta
    u = AbsTopK(norm_2(z))                  {l}.mlp.act_in
    a = AbsTopK(act(W_fc u + b_fc))         {l}.mlp.post_act
    z <- z + AbsTopK(W_proj a + b_proj)     {l}.mlp.resid_delta

`final_resid`, the last residual before its norm, can be held too, as some released circuits do; it
is not among the nodes of `node_widths`. With concatenated positions p, u is AbsTopK([norm(z),
norm_p(p)]) and an act_in has position_channels more nodes. The remaining variants of the released
models (layer norms, relu or AbsTopK on z, dropout, tied or biased logits) are fields of the config.

One forward serves training, hybrid passes (those that begin in another model), masks, means and
interventions: all of them call `Block.attend` and `Block.think`, and reach a node location by its
module (`SparseGPT.node`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sparse.ops.abs_topk import AbsTopK

from .borrowed import BorrowedEmbedding, BorrowedUnembedding, normed_table
from .config import FINAL, LOCATIONS, SparseGPTConfig
from .modes import compiled_sublayers
from .residual import ResidualAccess
from .trunk import SparseGPTModel


class SparseGPT(ResidualAccess, GenerationMixin):
    """A weight-sparse GPT with a language-modelling head.

    logits = W_U norm(z_2L) + bias + bigram[ids]     (the bias and the bigram table are optional)
    """

    bigram: Tensor | None
    logits_bias: Tensor | None
    _tied_weights_keys = {"lm_head.weight": "model.wte.weight"}  # where the config ties them

    def __init__(self, config: SparseGPTConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = SparseGPTModel(config)
        if isinstance(wte := self.model.wte, BorrowedEmbedding):
            self._tied_weights_keys = {}  # where it ties, it ties the tables
            tied = config.tie_word_embeddings
            self.lm_head = BorrowedUnembedding(config, wte if tied else None)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        square = torch.zeros(config.vocab_size, config.vocab_size) if config.bigram_table else None
        if config.bigram_fixed:
            self.register_buffer("bigram", square)
        else:
            self.register_parameter("bigram", None if square is None else nn.Parameter(square))
        bias = torch.zeros(config.vocab_size) if config.logits_bias else None
        self.register_buffer("logits_bias", bias)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.bigram is not None:
            init.uniform_(self.bigram, 0.0, 0.0 if self.config.bigram_fixed else 0.02)
        if module is self and self.logits_bias is not None:
            init.zeros_(self.logits_bias)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, **kwargs):  # pyright: ignore
        """Resize the vocabulary as in Hugging Face and return the new embedding.

        New rows are dense until the next projection. Raises ValueError for a model with a bigram
        table, logit biases or borrowed embeddings, which have entries per token that would not be
        resized.
        """
        asked = new_num_tokens is not None or pad_to_multiple_of is not None
        has = self.bigram is not None or self.logits_bias is not None
        if asked and (has or self.config.embedding_width):
            raise ValueError(
                f"SparseGPT: the vocabulary of {self.vocab_size} cannot be resized, because the "
                "bigram table, the logit biases or the borrowed embeddings belong to it; train a "
                "model without them"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits and the rest of Hugging Face's output; the arguments are those there.

        With `labels`, `loss` is the mean cross entropy in nats per predicted token.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = logits_to_keep
        if isinstance(keep, int):
            keep = slice(-keep or None, None)
        logits = self._head(out.last_hidden_state[:, keep], input_ids, keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _head(self, normed: Tensor, ids: Tensor | None, keep: slice | Tensor = slice(None)):
        logits = self.lm_head(normed)
        if self.logits_bias is not None:
            logits = logits + self.logits_bias
        if self.bigram is None:
            return logits
        if ids is None:
            raise ValueError("SparseGPT with a bigram table needs input_ids, got inputs_embeds")
        padding = -1 if self.config.bigram_freeze_last else None
        return logits + F.embedding(ids[:, keep], self.bigram, padding_idx=padding)

    @torch.no_grad()
    def borrow_(
        self,
        embedding: Float[Tensor, "vocab embedding"],
        unembedding: Float[Tensor, "vocab embedding"] | None = None,
    ) -> None:
        """Take over the rows of another model's embedding, and of its unembedding unless tied.

        They are centred and scaled (`sparse.model.borrowed`) and are never trained. Raises
        ValueError where the config asks for other shapes, or for no borrowed embeddings.

        >>> config = SparseGPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
        ...     embedding_width=24, tie_word_embeddings=True)
        >>> model = SparseGPT(config)
        >>> model.borrow_(torch.randn(50, 24))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 50])
        """
        c, tied = self.config, unembedding is None
        want = (c.vocab_size, c.embedding_width)
        given = {tuple(rows.shape) for rows in (embedding, unembedding) if rows is not None}
        if not c.embedding_width or tied != c.tie_word_embeddings or given != {want}:
            raise ValueError(
                f"SparseGPT.borrow_: got {'one table' if tied else 'two tables'} of shape "
                f"{sorted(given)}, but the config asks for "
                f"{'one' if c.tie_word_embeddings else 'two'} of {want} (vocab_size, "
                "embedding_width; 0: none; tie_word_embeddings: one); make the model with the "
                "config of these tables"
            )
        self.model.get_buffer("wte.table").copy_(normed_table(embedding))
        if unembedding is not None:
            self.get_buffer("lm_head.own").copy_(normed_table(unembedding))

    @contextmanager
    def compile_sublayers(self, **options: Any) -> Iterator[None]:
        """Run every sublayer through `torch.compile(**options)` while the context is open.

        Parameters keep their names, and `state_dict` returns what it did. Results are the same bit
        for bit with `backend="aot_eager"`, and up to rounding with inductor.

        >>> model = SparseGPT(SparseGPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
        >>> with model.compile_sublayers(backend="eager"):
        ...     y = model(torch.tensor([[1, 2, 3]])).logits
        >>> y.shape
        torch.Size([1, 3, 50])
        """
        with compiled_sublayers([self._block(i) for i in range(len(self.model.blocks))], **options):
            yield

    def node_widths(self) -> dict[str, int]:
        """Return {location: number of nodes} for every node location, in forward order."""
        layers = range(self.config.num_hidden_layers)
        names = (f"{i}.{location}" for i in layers for location in LOCATIONS)
        return {name: self.node(name).width for name in names}

    def node(self, location: str) -> AbsTopK:
        """Return the module whose output is the value at `location`, such as `0.attn.q`.

        Besides the locations of `node_widths` there is `final_resid`.
        """
        if location == FINAL:
            return self.model.final_resid
        layer, _, rest = location.partition(".")
        n = self.config.num_hidden_layers
        if rest not in LOCATIONS or not layer.isdigit() or not int(layer) < n:
            raise ValueError(
                f"no node location {location!r}; there are {{layer}}.{{name}} with layer "
                f"0..{n - 1} and name one of {', '.join(LOCATIONS)}"
            )
        return self.model.blocks.get_submodule(location)  # pyright: ignore[reportReturnType]
