"""The authors' released models, circuits and tokenizer: open, run, and save in the same format.

    model = load_model("models/csp_yolo2")           beeg_config.json and final_model.pt
    tokenizer = load_tokenizer("tinypython")         encoder.json and vocab.bpe
    replay = load_circuit("viz/.../viz_data.pt", model, tokenizer, ("]\\n", "]]\\n"))
    replay.loss(model)                               nats per prompt, to compare with replay.stored

The format is described in docs/method.md#released-files. A SparseGPT can be every variant that the
format can express. Files are read without running code in them, and strictly: a key that is unknown
or missing is an error. final_bridges.pt is not read: it was served empty, and would be code.
"""

from .circuit import Replay, load_circuit
from .circuit_write import save_circuit
from .model import load_model, save_model
from .tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "Replay",
    "load_circuit",
    "load_model",
    "load_tokenizer",
    "save_circuit",
    "save_model",
    "save_tokenizer",
]
