"""The shape of a weight-sparse GPT."""

from __future__ import annotations

from math import floor
from typing import Any, no_type_check

from transformers import PreTrainedConfig

LOCATIONS = (  # the node locations of a layer in forward order (method.md 1.4)
    "attn.act_in",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.resid_delta",
    "mlp.act_in",
    "mlp.post_act",
    "mlp.resid_delta",
)
TOPK_LOCATIONS = (  # the authors' names for the places AbsTopK can act
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
)


@no_type_check  # Hugging Face's __init__ takes any keyword; a checker of its signature takes fewer
class SparseGPTConfig(PreTrainedConfig):
    """A SparseGPT's architecture. Densities belong to the training, not to the model.

    hidden_size: width of the residual stream. head_dim: width of one head; heads times head_dim
    need not be hidden_size. activation_fraction: share of entries that AbsTopK keeps, in (0, 1], at
    `activation_locations`. positions: "none" or "learned". bigram_table: a dense vocab x vocab
    table whose row of the current token is added to the logits.
    """

    model_type = "sparse_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 16
    head_dim: int = 16
    intermediate_size: int = 1024
    max_position_embeddings: int = 1024
    activation: str = "gelu"
    activation_fraction: float = 0.25
    activation_locations: list[str] | tuple[str, ...] = TOPK_LOCATIONS
    attention_sinks: bool = True
    bigram_table: bool = False
    positions: str = "none"
    rms_norm_eps: float = 2.0**-23
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.activation_locations = list(self.activation_locations)
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        sizes += ("head_dim", "intermediate_size", "max_position_embeddings")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"SparseGPTConfig.{name}={value!r} must be an integer, at least 1")
        for name in ("rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SparseGPTConfig.{name}={getattr(self, name)} must be above 0")
        if not 0 < self.activation_fraction <= 1:
            fraction = self.activation_fraction
            raise ValueError(f"SparseGPTConfig.activation_fraction={fraction} must be in (0, 1]")
        if unknown := sorted(set(self.activation_locations) - set(TOPK_LOCATIONS)):
            known = ", ".join(TOPK_LOCATIONS)
            raise ValueError(f"SparseGPTConfig.activation_locations has {unknown}; known: {known}")
        for name, choices in (("activation", ("gelu", "relu")), ("positions", ("none", "learned"))):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"SparseGPTConfig.{name}={value!r} must be one of {choices}")
        if self.tie_word_embeddings:
            raise ValueError("SparseGPTConfig.tie_word_embeddings: the embeddings are untied")

    def k(self, location: str) -> int:
        """Return how many entries AbsTopK keeps, floor(fraction * width) where it acts."""
        width = self.hidden_size
        if location in ("attn_q", "attn_k", "attn_v"):
            width = self.num_attention_heads * self.head_dim
        elif location == "mlp_neuron":
            width = self.intermediate_size
        if location not in self.activation_locations:
            return width
        return max(1, floor(self.activation_fraction * width))

    def architecture(self) -> dict[str, Any]:
        """Return the fields that decide what the weights mean."""
        names = [n for n in SparseGPTConfig.__annotations__ if not n.endswith("_token_id")]
        return {n: getattr(self, n) for n in names if n not in ("use_cache", "initializer_range")}
