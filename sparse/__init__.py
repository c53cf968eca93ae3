"""A weight-sparse GPT and the circuits inside it. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import release
from .activation import abs_topk
from .card import Card, Metric
from .circuit import Circuit
from .config import SparseGPTConfig
from .corpus import load_corpus, stream_corpus
from .data import Batches, StreamingBatches, estimated_tokens, first_blocks, pack
from .mask import last_logits, masked, node_means
from .model import SparseGPT, SparseGPTModel
from .pretrain import (
    PretrainConfig,
    Pretraining,
    gao2025,
    heldout_nats,
    pretrain,
    unigram_nats,
)
from .project import Anneal, SparsityConfig, project_
from .prune import PruneConfig, prune
from .tasks import Task, get_task, task_names, task_nats
from .train import TrainConfig, check_processes

__version__ = "0.1.0"
__sparse_bridges__ = "sparse"
__all__ = [
    "Anneal",
    "Batches",
    "Card",
    "Circuit",
    "Metric",
    "PretrainConfig",
    "Pretraining",
    "PruneConfig",
    "SparseGPT",
    "SparseGPTConfig",
    "SparsityConfig",
    "StreamingBatches",
    "Task",
    "TrainConfig",
    "abs_topk",
    "check_processes",
    "estimated_tokens",
    "first_blocks",
    "gao2025",
    "get_task",
    "heldout_nats",
    "last_logits",
    "load_corpus",
    "masked",
    "node_means",
    "pack",
    "pretrain",
    "project_",
    "prune",
    "release",
    "stream_corpus",
    "task_names",
    "task_nats",
    "unigram_nats",
]


class SparseArray:
    """Keeps scipy working: it asks any loaded module called `sparse` for this name."""


AutoConfig.register("sparse_gpt", SparseGPTConfig)
AutoModel.register(SparseGPTConfig, SparseGPTModel)
AutoModelForCausalLM.register(SparseGPTConfig, SparseGPT)
