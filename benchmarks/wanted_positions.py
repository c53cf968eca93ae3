"""What logits at the scored positions alone cost beside logits at every token.

    python benchmarks/wanted_positions.py
    python benchmarks/wanted_positions.py --layers 6 --prompts 128

A dense model of the shape of SmolLM2-135M (Llama, 576 wide, 49,152 tokens; random weights) on
prompts of different lengths, each scored at its last token, as a task's are. One thread, float32,
no gradient. Every repetition runs both ways one after the other. A figure is the median of the
repetitions' ratios of CPU seconds, with quartiles, and after it the seconds at the scored positions
alone. Memory is by how much one more pass raises the resident size of the process at its peak.

    logits          (dense.logits(ids), scored)              / dense.last_logits(ids, last)
    resume s        (dense.resume(s, h, ids), scored)        / the same with positions=
    run_edited s    (run_edited(dense, ids, edits), scored)  / the same with positions=
    sparse resume s (sparse.resume(s, z, ids), scored)       / the same with positions=

The sparse model has 2 layers of that width. The answers of both ways are compared first, and the
largest difference is printed.
"""

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timing import quartiles, seconds
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dense import DenseModel, Edit, run_edited
from sparse import SparseGPT, SparseGPTConfig

Ways = dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]


def dense_model(layers: int, width: int, vocab: int) -> DenseModel:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    return DenseModel(LlamaForCausalLM(config))


def sparse_model(layers: int, width: int, vocab: int) -> SparseGPT:
    heads = {"num_attention_heads": width // 16, "head_dim": 16}
    shape = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": vocab} | heads
    return SparseGPT(SparseGPTConfig.from_dict(shape)).eval()


@torch.no_grad()
def ways_of(dense: DenseModel, sparse: SparseGPT, ids: Tensor, last: Tensor) -> Ways:
    """Return, by name, how logits at the scored positions come from all, and how from those."""
    rows, at = torch.arange(len(ids)), last[:, None]

    def both(run: Callable[..., Tensor]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        quietly = torch.no_grad()(run)
        return lambda: quietly()[rows, last], lambda: quietly(positions=at)[:, 0]

    end = dense.n_sites - 1
    h, z = dense.residuals(ids), sparse.residuals(ids)
    sites = {"early": 1, "middle": end // 2, "late": end - 1}
    ways: Ways = {"logits": both(lambda **how: dense.logits(ids, **how))}
    for name, s in sites.items():
        ways[f"resume {name}"] = both(lambda s=s, **how: dense.resume(s, h[s], ids, **how))
    for name in ("early", "late"):
        edits = [Edit(site=sites[name], direction=torch.ones(dense.d_resid))]
        ways[f"run_edited {name}"] = both(lambda e=edits, **how: run_edited(dense, ids, e, **how))
    for name, s in {"early": 1, "late": sparse.n_sites - 2}.items():
        run = both(lambda s=s, **how: sparse.resume(s, z[s], ids, **how))
        ways[f"sparse resume {name}"] = run
    return ways


def memory(run: Callable[[], object]) -> float:
    """Return by how many MiB `run` raises the resident size of this process at its peak."""

    def size(field: str) -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split(field)[1].split()[0]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, which would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten
    before = size("VmRSS:")
    run()
    return size("VmHWM:") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = {"layers": 30, "width": 576, "vocab": 49152, "prompts": 32, "pos": 24, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (args.layers, args.width, args.vocab)
    dense, sparse = dense_model(*shape), sparse_model(2, *shape[1:])
    ids = torch.randint(args.vocab, (args.prompts, args.pos))
    last = torch.randint(args.pos * 3 // 4, args.pos, (args.prompts,))
    ways = ways_of(dense, sparse, ids, last)
    print(f"{args.layers} x {args.width}, {args.vocab} tokens, {args.prompts} x {args.pos}")
    for name, (whole, some) in ways.items():
        gap = (whole() - some()).abs().max().item()  # this warms up both, too
        pairs = [(seconds(whole), seconds(some)) for _ in range(args.repeats)]
        ratios, time = quartiles([a / b for a, b in pairs]), statistics.median(b for _, b in pairs)
        held = f"{memory(whole):5.0f} against {memory(some):3.0f} MiB"
        print(f"{name:19s} {ratios:19s} {time:7.3f} s   {held}   apart {gap:.0e}")


if __name__ == "__main__":
    main()
