"""Reading and writing a released model: its config (config.py) and its weights.

Names, shapes and options are described in docs/method.md#released-files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse.model.gpt import SparseGPT
from sparse.storage.atomic import replace_files
from sparse.storage.hub import Source

from .config import read_config, write_config
from .files import read_json, read_torch, torch_bytes

CONFIG, WEIGHTS = "beeg_config.json", "final_model.pt"
NAMES = (  # patterns in our names of tensors, and what they are in theirs; all apply, in this order
    (r"^model\.blocks\.", "transformer.h."),
    (r"^model\.norm\.", "transformer.ln_f."),
    (r"^model\.", "transformer."),
    (r"\.norm_(p?[12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.c_attn."),
    (r"\.attn\.out\.", ".attn.c_proj."),
    (r"\.attn\.sinks$", ".attn.attn_imp.sink_logit"),
    (r"\.mlp\.fc\.", ".mlp.c_fc."),
    (r"\.mlp\.proj\.", ".mlp.c_proj."),
    (r"^bigram$", "bigram_table"),
    (r"^logits_bias$", "final_logits_bias"),
)
POSITIONS, BIAS = "transformer.wpe.weight", "final_logits_bias"
CAUSAL = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # a causal mask that some files hold
EXACT = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that become fp32 without loss


def load_model(folder: str | Path) -> SparseGPT:
    """Return the model of a released folder, in fp32 and eval mode, with the folder as `source`.

    The authors' files hold a position table and logit biases for every model, as zeros where the
    model does not have them. So a table of zeros is read as a model without positions, which then
    has no limit of length, and biases of zero (or absent ones) as a model without biases. Raises
    ValueError where a file is damaged or the two are not of one model.

    >>> import tempfile
    >>> from sparse import SparseGPT, SparseGPTConfig, release
    >>> model = SparseGPT(SparseGPTConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     release.save_model(model, folder)
    ...     again = release.load_model(folder)
    >>> again.config.hidden_size
    32
    """
    folder = Path(folder)
    values, state = read_json(folder / CONFIG), read_torch(folder / WEIGHTS)
    path = folder / WEIGHTS
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} holds no state dict: names and their tensors; fetch it again")
    if wrong := {n: t.dtype for n, t in state.items() if t.dtype not in EXACT}:
        raise ValueError(f"{path}: {wrong} are not of a floating dtype of at most 32 bits")
    table, bias = state.get(POSITIONS), state.get(BIAS)
    config = read_config(
        values,
        positions=table is not None and bool(table.count_nonzero()),
        logits_bias=bias is not None and bool(bias.count_nonzero()),
    )
    with torch.device("meta"):
        model = SparseGPT(config)
    _check_state(path, state, model)
    ours = {name: state[_theirs(name)].float().clone() for name in model.state_dict()}
    model.load_state_dict(ours, assign=True)
    model.tie_weights()
    model.source = Source(str(folder), model.fingerprint())
    return model.eval()


def save_model(model: SparseGPT, folder: str | Path, tokenizer_name: str = "tinypython_2k") -> None:
    """Write a model as `beeg_config.json` and `final_model.pt`, in fp32.

    Raises ValueError naming a field that the format cannot express. One field is lost: in the
    format, the last row of a learned bigram table is never trained, so `load_model` returns such a
    model with `bigram_freeze_last` true.

    >>> import os
    >>> import tempfile
    >>> from sparse import SparseGPT, SparseGPTConfig, release
    >>> model = SparseGPT(SparseGPTConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     release.save_model(model, folder)
    ...     sorted(os.listdir(folder))
    ['beeg_config.json', 'final_model.pt']
    """
    values = write_config(model.config, tokenizer_name)
    ours = {_theirs(n): t.detach().cpu().float() for n, t in model.state_dict().items()}
    config = model.config
    absent = {
        POSITIONS: (config.max_position_embeddings, config.hidden_size),
        BIAS: (config.vocab_size,),
    }
    state = {name: torch.zeros(shape) for name, shape in absent.items()} | ours
    files = {CONFIG: json.dumps(values, indent=1), WEIGHTS: torch_bytes(state)}
    replace_files(folder, files)


def _theirs(name: str) -> str:
    """Return the authors' name of a tensor of ours."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def _check_state(path: Path, state: dict[str, Tensor], model: SparseGPT) -> None:
    """Raise ValueError unless `state` holds exactly the tensors that the config asks for.

    The logit biases and causal masks may be there or not.
    """
    config = model.config
    want = {_theirs(name): tuple(t.shape) for name, t in model.state_dict().items()}
    want.setdefault(POSITIONS, (config.max_position_embeddings, config.hidden_size))
    optional: dict[str, Any] = {BIAS: (config.vocab_size,)}
    n = config.max_position_embeddings
    optional |= {name: (1, 1, n, n) for name in state if CAUSAL.fullmatch(name)}
    missing = sorted(want.keys() - state.keys())
    unknown = sorted(state.keys() - want.keys() - optional.keys())
    if missing or unknown:
        hint = ""
        if any("sink_logit" in name for name in [*missing, *unknown]):
            hint = f" (beeg_config.json says sink is {str(config.attention_sinks).lower()})"
        raise ValueError(
            f"{path}: missing {missing}, unknown {unknown}{hint}; the file and {CONFIG} must be of "
            "one model"
        )
    for name, tensor in state.items():
        shape = want.get(name) or optional[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, but {CONFIG} asks for {shape}; the two "
                "files must be of one model"
            )
    if config.tie_word_embeddings:
        pair = ("transformer.wte.weight", "lm_head.weight")
        if not torch.equal(*(state[name] for name in pair)):
            raise ValueError(
                f"{path}: {' and '.join(pair)} differ, but {CONFIG} says tied_unembed is true; set "
                "it to false if the model was trained so"
            )
