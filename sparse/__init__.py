"""A weight-sparse GPT and the circuits inside it. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .activation import abs_topk
from .config import SparseGPTConfig
from .model import SparseGPT, SparseGPTModel

__version__ = "0.1.0"
__sparse_bridges__ = "sparse"
__all__ = ["SparseGPT", "SparseGPTConfig", "abs_topk"]


class SparseArray:
    """Keeps scipy working: it asks any loaded module called `sparse` for this name."""


AutoConfig.register("sparse_gpt", SparseGPTConfig)
AutoModel.register(SparseGPTConfig, SparseGPTModel)
AutoModelForCausalLM.register(SparseGPTConfig, SparseGPT)
