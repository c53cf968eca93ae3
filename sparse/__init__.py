"""A weight-sparse GPT and the circuits inside it.

    model       the architecture, its residual stream and its node locations
    training    training with an annealed sparsity; bridges are trained by the same loop
    text        documents, and batches of tokens
    tasks       pairs of prompts, and the loss that scores them
    circuits    pruning to the nodes that a task needs, and what can be done with them
    ops         the operations that need code of their own: AbsTopK, projection, sinks, CSR
    storage     files: models, cards, checkpoints
    release     the authors' released models, circuits and tokenizer

Importing this package registers the Auto classes of transformers for SparseGPT.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import release
from .circuits.circuit import Circuit
from .circuits.extract.circuit_module import extract
from .circuits.mask import masked
from .circuits.means import node_means
from .circuits.planted import Planted, plant
from .circuits.pruning.config import PruneConfig
from .circuits.pruning.prune import prune
from .circuits.score import last_logits
from .circuits.view.graph import to_networkx
from .model.config import SparseGPTConfig
from .model.gpt import SparseGPT
from .model.trunk import SparseGPTModel
from .ops.abs_topk import abs_topk
from .ops.prefix import count_tokens, prefix_ids
from .ops.project import project_
from .storage.card import Card, Metric
from .tasks.batch import task_nats
from .tasks.nonsense import easier_nonsense
from .tasks.pair import Pair
from .tasks.score import TaskScore
from .tasks.suite import get_task, task_names
from .tasks.suite.table import TaskTable, task_table
from .tasks.task import Task
from .text.batches import Batches, StreamingBatches, first_blocks
from .text.corpus import load_corpus, stream_corpus
from .text.pack import estimated_tokens, pack
from .training.config import TrainConfig
from .training.heldout import heldout_nats, unigram_nats
from .training.pretrain import PretrainConfig, Pretraining, pretrain
from .training.processes import check_processes, launched
from .training.recipes import gao2025
from .training.run_state import with_products
from .training.sparsity import Anneal, SparsityConfig

__version__ = "0.1.0"
__sparse_bridges__ = "sparse"
__all__ = [
    "Anneal",
    "Batches",
    "Card",
    "Circuit",
    "Metric",
    "Pair",
    "Planted",
    "PretrainConfig",
    "Pretraining",
    "PruneConfig",
    "SparseGPT",
    "SparseGPTConfig",
    "SparsityConfig",
    "StreamingBatches",
    "Task",
    "TaskScore",
    "TaskTable",
    "TrainConfig",
    "abs_topk",
    "check_processes",
    "launched",
    "easier_nonsense",
    "estimated_tokens",
    "extract",
    "first_blocks",
    "gao2025",
    "get_task",
    "heldout_nats",
    "last_logits",
    "load_corpus",
    "masked",
    "node_means",
    "pack",
    "plant",
    "count_tokens",
    "prefix_ids",
    "pretrain",
    "project_",
    "prune",
    "release",
    "stream_corpus",
    "task_names",
    "task_nats",
    "task_table",
    "to_networkx",
    "unigram_nats",
    "with_products",
]


class SparseArray:
    """A stand-in for a class of the package that PyPI calls `sparse`.

    scipy asks any loaded module called `sparse` for this name, and would fail without it.
    """


AutoConfig.register("sparse_gpt", SparseGPTConfig)
AutoModel.register(SparseGPTConfig, SparseGPTModel)
AutoModelForCausalLM.register(SparseGPTConfig, SparseGPT)
