"""Open a model by name or folder, preferring what is on this machine; refuse unsuitable ones.

Opening a folder never uses the network. Nor does a name whose config and weights are in the Hugging
Face cache: its folder in the cache is opened. For any other name the hub is asked once, for a few
seconds at most, whether it answers, before anything is fetched.
"""

import ssl
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from ..sites import SiteError
from .gguf import converted, gguf_file, load_gguf

TINY = Path(__file__).parents[1] / "tiny_data"

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
_INSTEAD = "use `--dense tiny`, the built-in model, or `--dense /a/folder` that holds a saved model"


def load(name_or_folder: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer or None); `kwargs` go to transformers, `dtype` defaults to fp32.

    A GGUF file, or "smollm2", is dequantised (gguf.py). Raises FileNotFoundError naming the missing
    file when a folder is incomplete or a name is neither cached nor reachable, ValueError when a
    file is damaged or lacks weights.
    """
    kwargs = checked_options(kwargs)
    if (path := gguf_file(name_or_folder, kwargs)) is not None:
        return load_gguf(path, kwargs)
    source = _source(name_or_folder, kwargs)
    return _model(source, kwargs), _tokenizer(source, kwargs)


def load_config(name_or_folder: str | Path) -> Any:
    """Return the config of the model that `load` would return, without its weights.

    Raises what `load` raises for names and folders.
    """
    from transformers import AutoConfig

    if (path := gguf_file(name_or_folder, {})) is not None:
        return AutoConfig.from_pretrained(converted(path))
    return AutoConfig.from_pretrained(_source(name_or_folder, {}))


def _source(name_or_folder: str | Path, kwargs: dict[str, Any]) -> str:
    """Return the folder that holds a model on this machine, or the name that the hub knows."""
    source = str(TINY if str(name_or_folder) == "tiny" else name_or_folder)
    folder, missing = _on_this_machine(source, kwargs)
    if missing:
        _need_hub(source, missing)
    return source if folder is None else str(folder)


def checked_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the options for transformers, with a dtype that is named by its usual short name.

    Raises ValueError for a dtype that nobody knows, and for CUDA where there is none.
    """
    dtype, device = kwargs.get("dtype"), kwargs.get("device_map")
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is none of {sorted(_DTYPES)}; torch's own work too")
        kwargs = kwargs | {"dtype": _DTYPES[dtype]}
    if "cuda" in str(device) and not torch.cuda.is_available():
        raise ValueError(
            f"device_map={device!r} needs CUDA, and torch {torch.__version__} finds no GPU here; "
            "leave device_map out to load on the CPU"
        )
    return kwargs


def _model(source: str, kwargs: dict[str, Any]) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **{"dtype": torch.float32, **kwargs}
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {source} are damaged ({error}); copy them again"
        ) from error
    model, seen = opened
    if seen["missing_keys"] or seen["mismatched_keys"]:
        raise ValueError(
            f"{source} lacks weights that its config asks for: "
            f"{sorted(seen['missing_keys'])[:5] or seen['mismatched_keys']}; transformers would "
            "make them up at random. Save the whole model with save_pretrained"
        )
    return model


def _tokenizer(source: str, kwargs: dict[str, Any]) -> Any:
    """Return the tokenizer saved beside the model, None if there is none."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    keys = ("revision", "cache_dir", "token")
    where = {k: kwargs[k] for k in keys if k in kwargs}
    for file in _TOKENIZER:
        if cached_file(source, file, _raise_exceptions_for_missing_entries=False, **where):
            trusted = bool(kwargs.get("trust_remote_code"))
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, **where)
    return None


def _on_this_machine(source: str, kwargs: dict[str, Any]) -> tuple[Path | None, str | None]:
    """Return the folder that holds `source` here, or None and the first file that is missing.

    For a name in the cache this is its snapshot folder, so that opening it does not ask the hub.
    Raises FileNotFoundError for a folder that is incomplete or not there.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if missing := _first_missing({p.name for p in folder.iterdir()}):
            hint = (
                "reinstall the package, or build it with examples/train_dense.py"
                if folder == TINY
                else "point to the folder that save_pretrained wrote"
            )
            raise FileNotFoundError(f"{missing} is missing in the folder {source}; {hint}")
        return folder, None
    if folder == TINY or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {source}; {_INSTEAD}")

    from huggingface_hub import try_to_load_from_cache

    where = {k: kwargs[k] for k in ("revision", "cache_dir") if k in kwargs}
    found = {f: try_to_load_from_cache(source, f, **where) for f in ("config.json", *_WEIGHTS)}
    cached = {f: Path(path) for f, path in found.items() if isinstance(path, str)}
    missing = _first_missing(set(cached))
    return (None, missing) if missing else (cached["config.json"].parent, None)


def _first_missing(names: set[str]) -> str | None:
    if "config.json" not in names:
        return "config.json"
    return None if names & set(_WEIGHTS) else _WEIGHTS[0]


def _need_hub(source: str, missing: str) -> None:
    """Raise FileNotFoundError unless the hub may be asked and answers."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        why = "HF_HUB_OFFLINE is set, so the hub was not asked"
    elif (failure := _unreachable(constants.ENDPOINT)) is not None:
        why = f"{constants.ENDPOINT} does not answer ({failure})"
    else:
        return
    raise FileNotFoundError(
        f"{missing} of {source} is not on this machine: it is no folder, it is not in the cache "
        f"{constants.HF_HUB_CACHE}, and {why}. Without a network, {_INSTEAD}"
    )


def _unreachable(url: str) -> str | None:
    """Return why `url` cannot be reached within 5 seconds, None if anything answers there."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=5).close()
    except HTTPError:
        return None
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None


def refuse_unsuitable(model: Any) -> None:
    """Raise SiteError for models that cannot be bridged, as their config already shows."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise SiteError(
            f"{type(model).__name__} is not a transformers model: it has no config; pass a "
            "PreTrainedModel such as AutoModelForCausalLM.from_pretrained gives"
        )
    if config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise SiteError(
            f"{config.model_type} ({type(model).__name__}) is not a causal language model with "
            "logits; open it with AutoModelForCausalLM"
        )
