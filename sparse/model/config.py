"""`SparseGPTConfig`, the architecture of a weight-sparse GPT, and the names of its locations.

gpt.py has the equations that the fields belong to.
"""

from __future__ import annotations

from math import floor
from typing import Any, no_type_check

from transformers import PreTrainedConfig

LOCATIONS = (  # the node locations of a layer in forward order (docs/method.md#node-locations)
    "attn.act_in",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.resid_delta",
    "mlp.act_in",
    "mlp.post_act",
    "mlp.resid_delta",
)
FINAL = "final_resid"  # the last residual before its norm; some released circuits have nodes there
TOPK_LOCATIONS = (  # the authors' names for the places where AbsTopK acts by default
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
)
RESIDUAL_TOPK = ("resid_post_attn", "resid_post_mlp")  # where it can act too: the residual itself
CHOICES = {  # the values that a field may have
    "activation": ("gelu", "relu"),
    "residual_activation": ("identity", "relu"),
    "norm": ("rms", "layer"),
    "positions": ("none", "learned", "concatenated"),
    "position_init": ("normal", "zero"),
}
# Fields that must be true or false.
FLAGS = ("attention_sinks", "linear_bias", "norm_bias", "logits_bias", "position_sinusoids")
FLAGS += ("position_dropout", "bigram_table", "bigram_fixed", "bigram_freeze_last")
# Fields that do not change what given weights compute in evaluation: not part of `architecture`.
TRAINING_ONLY = ("use_cache", "initializer_range", "dropout", "position_dropout")
TRAINING_ONLY += ("position_init", "position_sinusoids", "bigram_fixed", "bigram_freeze_last")
# Fields that came later than the others: part of `architecture` only where not at their default.
LATER = ("norm", "norm_bias", "layer_norm_eps", "linear_bias", "residual_activation")
LATER += ("position_channels", "logits_bias", "embedding_width")


# no_type_check: Hugging Face's __init__ takes any keyword; a checker of its signature takes fewer
@no_type_check
class SparseGPTConfig(PreTrainedConfig):
    """The architecture of a SparseGPT.

    How sparse its weights are is not part of it: densities belong to the training
    (`sparse.training.sparsity.SparsityConfig`).
    """

    model_type = "sparse_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 2048
    hidden_size: int = 256
    """Width of the residual stream."""
    num_hidden_layers: int = 2
    num_attention_heads: int = 16
    head_dim: int = 16
    """Width of one head; num_attention_heads * head_dim need not be hidden_size."""
    intermediate_size: int = 1024
    """Neurons of one MLP."""
    max_position_embeddings: int = 1024
    """Rows of the position table. Without a table, a text may have any length."""
    activation: str = "gelu"
    """Activation function of the MLP: "gelu" (the exact erf form) or "relu"."""
    activation_fraction: float = 0.25
    """Share of entries that AbsTopK keeps at `activation_locations`, in (0, 1]; 1 keeps all."""
    activation_locations: list[str] | tuple[str, ...] = TOPK_LOCATIONS
    """Where AbsTopK acts: names from TOPK_LOCATIONS and RESIDUAL_TOPK. The latter mean the residual
    itself, after a sublayer's addition; they are not node locations."""
    attention_sinks: bool = True
    """Whether each head has a learned logit in its softmax denominator
    (docs/method.md#attention-with-sinks)."""
    bigram_table: bool = False
    """Whether there is a dense vocab x vocab table, of which the row of the current token is added
    to the logits."""
    bigram_fixed: bool = False
    """Whether the bigram table is a buffer that starts at zero, and not a learned parameter."""
    bigram_freeze_last: bool = False
    """Whether the bigram table's last row (end-of-text) gets no gradient, as in the authors'
    lookup."""
    positions: str = "none"
    """How positions enter. "none": by the causal mask alone. "learned": a table added to the
    embeddings. "concatenated": channels beside the residual that sublayers read and never write;
    they widen the input of W_qkv and W_fc (docs/method.md#positions)."""
    position_init: str = "normal"
    """How a "learned" table starts: "normal", N(0, initializer_range^2), or "zero", as in the
    authors' script. It is trained either way."""
    position_channels: int = 0
    """Width of concatenated positions; 0 otherwise."""
    position_sinusoids: bool = False
    """Whether the concatenated table is a buffer of sinusoids, and not a learned parameter. Their
    periods are log-spaced from 4 to the number of rows (`sparse.model.blocks.sinusoids`)."""
    position_dropout: bool = False
    """Whether dropout also acts on concatenated positions."""
    norm: str = "rms"
    """The norm before each sublayer and the unembedding: "rms" (a gain only) or "layer" (the mean
    is subtracted too)."""
    norm_bias: bool = False
    """Whether norms have a bias after the gain; for layer norms only."""
    rms_norm_eps: float = 2.0**-23
    layer_norm_eps: float = 1e-5
    linear_bias: bool = True
    """Whether W_qkv, W_o, W_fc and W_proj have biases. The unembedding never has one."""
    residual_activation: str = "identity"
    """Function applied to the residual after each sublayer's addition: "identity" or "relu"."""
    logits_bias: bool = False
    """Whether a fixed vector (a buffer that starts at zero) is added to the logits."""
    dropout: float = 0.0
    """Probability of dropout, in [0, 1). In training it acts after the embeddings, on attention
    weights, and on what each sublayer writes, before AbsTopK."""
    initializer_range: float = 0.02
    use_cache: bool = True
    embedding_width: int = 0
    """Width of embeddings that are borrowed from another model, frozen, each behind a learned map
    (`sparse.model.borrowed`, `SparseGPT.borrow_`). 0: the model has its own."""
    tie_word_embeddings: bool = False
    """Whether embedding and unembedding are one matrix; of borrowed ones, whether the tables are.
    """
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
        for name in ("rms_norm_eps", "layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SparseGPTConfig.{name}={getattr(self, name)} must be above 0")
        if not 0 < self.activation_fraction <= 1:
            fraction = self.activation_fraction
            raise ValueError(f"SparseGPTConfig.activation_fraction={fraction} must be in (0, 1]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"SparseGPTConfig.dropout={self.dropout} must be in [0, 1)")
        places = (*TOPK_LOCATIONS, *RESIDUAL_TOPK)
        if unknown := sorted(set(self.activation_locations) - set(places)):
            known = ", ".join(places)
            raise ValueError(f"SparseGPTConfig.activation_locations has {unknown}; known: {known}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"SparseGPTConfig.{name}={value!r} must be one of {choices}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                value = getattr(self, name)
                raise ValueError(f"SparseGPTConfig.{name}={value!r} must be true or false")
        if not isinstance(self.embedding_width, int) or self.embedding_width < 0:
            width = self.embedding_width
            raise ValueError(
                f"SparseGPTConfig.embedding_width={width!r} must be an integer, 0 or more"
            )
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Refuse fields that contradict each other."""
        beside, channels = self.positions == "concatenated", self.position_channels
        if not isinstance(channels, int) or beside != (channels >= 1) or channels < 0:
            raise ValueError(
                f"SparseGPTConfig.position_channels={channels!r} must be at least 1 with "
                f"positions='concatenated' and 0 without, but positions={self.positions!r}"
            )
        if self.position_init == "zero" and self.positions != "learned":
            raise ValueError(
                "SparseGPTConfig.position_init='zero' needs positions='learned', the one table "
                f"that it starts, but positions={self.positions!r}"
            )
        needs = {
            "position_sinusoids": (beside, "positions='concatenated'"),
            "position_dropout": (beside, "positions='concatenated'"),
            "norm_bias": (self.norm == "layer", "norm='layer'"),
            "bigram_fixed": (self.bigram_table, "bigram_table=True"),
            "bigram_freeze_last": (self.bigram_table, "bigram_table=True"),
        }
        for name, (met, need) in needs.items():
            if getattr(self, name) and not met:
                raise ValueError(f"SparseGPTConfig.{name}=True needs {need}")

    @property
    def read_width(self) -> int:
        """Width of what a sublayer reads: the residual and any concatenated positions."""
        return self.hidden_size + self.position_channels

    def width(self, location: str) -> int:
        """Return how many entries AbsTopK chooses from at one of its places."""
        if location in ("attn_in", "mlp_in"):
            return self.read_width
        if location in ("attn_q", "attn_k", "attn_v"):
            return self.num_attention_heads * self.head_dim
        return self.intermediate_size if location == "mlp_neuron" else self.hidden_size

    def k(self, location: str) -> int:
        """Return how many entries AbsTopK keeps at one of its places.

        k = max(1, floor(activation_fraction * width)) where it acts, else the width
        """
        width = self.width(location)
        if location not in self.activation_locations:
            return width
        return max(1, floor(self.activation_fraction * width))

    def architecture(self) -> dict[str, Any]:
        """Return the fields that decide what the weights compute.

        They are part of a model's fingerprint. Fields that this library got later (LATER) are left
        out where they have their default, which changes nothing, so that older models keep the
        fingerprint they had.
        """
        cls = SparseGPTConfig
        names = [n for n in cls.__annotations__ if not n.endswith("_token_id")]
        fields = {n: getattr(self, n) for n in names if n not in TRAINING_ONLY}
        defaults = {n: getattr(cls, n) for n in LATER}
        return {n: v for n, v in fields.items() if n not in LATER or v != defaults[n]}
