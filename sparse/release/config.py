"""Reading and writing `beeg_config.json`, the released form of a SparseGPTConfig.

The format is described in docs/method.md#released-files.
"""

from __future__ import annotations

from typing import Any

from sparse.model.config import RESIDUAL_TOPK, TOPK_LOCATIONS, SparseGPTConfig

WHOLE, NUMBER, FLAG, WORD = (int,), (int, float), (bool,), (str,)
NONE = type(None)
FIELDS: dict[str, tuple[tuple[type, ...], Any]] = {  # key: its types, and its value if it is absent
    "block_size": (WHOLE, 1024),
    "vocab_size": (WHOLE, 50304),
    "n_layer": (WHOLE, ...),  # an ellipsis means that the key must be there
    "n_head": (WHOLE, ...),
    "d_head": ((int, NONE), None),  # None means d_model // n_head
    "d_model": (WHOLE, ...),
    "d_mlp": ((int, NONE), None),  # None means 4 d_model
    "dropout": (NUMBER, 0.0),
    "bias": (FLAG, True),
    "ln_bias": (FLAG, True),
    "rms_norm": (FLAG, False),
    "residual_activation_type": (WORD, "identity"),
    "activation_type": (WORD, "gelu"),
    "afrac": ((int, float, NONE), None),
    "afrac_loctypes": (WORD, "attn_in,attn_out,mlp_in,mlp_out"),
    "tied_unembed": (FLAG, True),
    "enable_bigram_table": (FLAG, False),
    "learnable_bigram_table": (FLAG, False),
    "d_pos_emb": ((int, NONE), None),
    "dropout_cat_pos_emb": (FLAG, False),
    "sinusoidal_cat_pos_emb": (FLAG, False),
    "sink": (FLAG, False),
    "tokenizer_name": (WORD, "tinypython_2k"),
}
# Keys that are accepted and not used. The first four say how the authors' code runs.
HOW_IT_RUNS = ("debug_nans", "grad_checkpointing", "enable_sparse_kernels", "flash")
IGNORED = ("afrac_approx", "ignore_dw_grad", "bigram_table_rank", "pfrac", "expansion_factor")
IGNORED += ("expansion_factor_mlp", "debug_exact_topk", "sparse_matmul_impl", "rtopk", "n_embd")
END_OF_TEXT = {"tinypython_2k": 2047}  # tokenizer_name: its end-of-text token
RMS_EPS, LAYER_EPS = 2.0**-23, 1e-5  # the format has no field for them


def read_config(values: dict[str, Any], positions: bool, logits_bias: bool) -> SparseGPTConfig:
    """Return the config that the keys of a `beeg_config.json` mean.

    The keys do not say whether a model has learned positions, or a bias of the logits; the weights
    do. So the caller says it: `positions` is whether the additive position table holds anything but
    zeros (it is stored in every file), and `logits_bias` the same of the bias. Raises ValueError
    for keys that are unknown, missing or of another type.
    """
    v = _checked(values)
    fraction = v["afrac"]
    places = [place for place in v["afrac_loctypes"].split(",") if place]
    beside = v["d_pos_emb"] is not None
    config = SparseGPTConfig(
        vocab_size=v["vocab_size"],
        hidden_size=v["d_model"],
        num_hidden_layers=v["n_layer"],
        num_attention_heads=v["n_head"],
        head_dim=v["d_model"] // v["n_head"] if v["d_head"] is None else v["d_head"],
        intermediate_size=4 * v["d_model"] if v["d_mlp"] is None else v["d_mlp"],
        max_position_embeddings=v["block_size"],
        activation=v["activation_type"],
        residual_activation=v["residual_activation_type"],
        activation_fraction=1.0 if fraction is None else fraction,
        activation_locations=places,
        attention_sinks=v["sink"],
        bigram_table=v["enable_bigram_table"],
        bigram_fixed=v["enable_bigram_table"] and not v["learnable_bigram_table"],
        bigram_freeze_last=v["enable_bigram_table"] and v["learnable_bigram_table"],
        positions="concatenated" if beside else "learned" if positions else "none",
        position_channels=v["d_pos_emb"] or 0,
        position_sinusoids=beside and v["sinusoidal_cat_pos_emb"],
        position_dropout=beside and v["dropout_cat_pos_emb"],
        norm="rms" if v["rms_norm"] else "layer",
        norm_bias=not v["rms_norm"] and v["ln_bias"],
        rms_norm_eps=RMS_EPS,
        layer_norm_eps=LAYER_EPS,
        linear_bias=v["bias"],
        logits_bias=logits_bias,
        dropout=float(v["dropout"]),
        tie_word_embeddings=v["tied_unembed"],
        eos_token_id=_end_of_text(v),
    )
    _check_kept(config)
    return config


def write_config(config: SparseGPTConfig, tokenizer_name: str = "tinypython_2k") -> dict[str, Any]:
    """Return the content of the `beeg_config.json` of a config.

    Every key is in FIELDS, because the authors' loader takes no others. Raises ValueError for a
    config that the format cannot express.
    """
    eps = "rms_norm_eps" if config.norm == "rms" else "layer_norm_eps"
    fixed = RMS_EPS if config.norm == "rms" else LAYER_EPS
    if getattr(config, eps) != fixed:
        raise ValueError(f"{eps}={getattr(config, eps)}: the released format has {fixed} only")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} does not divide hidden_size="
            f"{config.hidden_size}, as the released format asks for"
        )
    if config.embedding_width:
        raise ValueError(
            f"embedding_width={config.embedding_width}: the released format has no place for "
            "borrowed embeddings; train the model with its own"
        )
    _check_kept(config)
    return {
        "block_size": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "d_head": config.head_dim,
        "d_model": config.hidden_size,
        "d_mlp": config.intermediate_size,
        "dropout": config.dropout,
        "bias": config.linear_bias,
        "ln_bias": config.norm_bias,
        "rms_norm": config.norm == "rms",
        "residual_activation_type": config.residual_activation,
        "activation_type": config.activation,
        "afrac": None if config.activation_fraction == 1 else config.activation_fraction,
        "afrac_loctypes": ",".join(config.activation_locations),
        "tied_unembed": config.tie_word_embeddings,
        "tokenizer_name": tokenizer_name,
        "enable_bigram_table": config.bigram_table,
        "learnable_bigram_table": config.bigram_table and not config.bigram_fixed,
        "d_pos_emb": config.position_channels or None,
        "dropout_cat_pos_emb": config.position_dropout,
        "sinusoidal_cat_pos_emb": config.position_sinusoids,
        "sink": config.attention_sinks,
    }


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Return a value for every key of FIELDS, with defaults for those that are absent.

    Raises ValueError for a key that is unknown, missing or of another type.
    """
    values = {k: x for k, x in values.items() if k not in (*IGNORED, *HOW_IT_RUNS)}
    if values.pop("use_tied_aux_matrix", False):
        raise ValueError(
            "beeg_config.json: use_tied_aux_matrix is true, a variant whose weights the released "
            "format does not describe; only false can be loaded"
        )
    if (alias := values.pop("n_mlp", None)) is not None:
        if values.setdefault("d_mlp", alias) != alias:
            raise ValueError(
                f"beeg_config.json: n_mlp={alias} is another name of d_mlp={values['d_mlp']}, but "
                "they differ; remove the wrong one"
            )
    if unknown := sorted(values.keys() - FIELDS.keys()):
        known = ", ".join([*FIELDS, *HOW_IT_RUNS, *IGNORED])
        raise ValueError(f"beeg_config.json: unknown keys {unknown}; known: {known}")
    if missing := [k for k, (_, absent) in FIELDS.items() if absent is ... and k not in values]:
        raise ValueError(f"beeg_config.json: {missing} missing; a model has no default for them")
    found = {key: values.get(key, absent) for key, (_, absent) in FIELDS.items()}
    for key, (types, _) in FIELDS.items():
        if type(found[key]) not in types:
            names = " or ".join("null" if t is NONE else t.__name__ for t in types)
            raise ValueError(f"beeg_config.json: {key}={found[key]!r} must be {names}")
    for key in ("d_model", "n_head", "d_pos_emb"):
        if found[key] is not None and found[key] < 1:
            raise ValueError(f"beeg_config.json: {key}={found[key]} must be at least 1")
    return found


def _check_kept(config: SparseGPTConfig) -> None:
    """Raise ValueError where AbsTopK would keep no entry.

    In the format it keeps floor(fraction * width), which may be 0; here it keeps at least 1, so
    such a model cannot be expressed.
    """
    for place in (*TOPK_LOCATIONS, *RESIDUAL_TOPK):
        if place in config.activation_locations:
            width = config.width(place)
            if int(config.activation_fraction * width) == 0:
                raise ValueError(
                    f"activation_fraction (afrac) {config.activation_fraction} keeps 0 of {width} "
                    f"entries at {place}, so nothing passes; it must keep at least 1"
                )


def _end_of_text(v: dict[str, Any]) -> int | None:
    """Return the end-of-text token of the tokenizer that the config names, None if not known."""
    token = END_OF_TEXT.get(v["tokenizer_name"])
    return token if token is not None and token < v["vocab_size"] else None
