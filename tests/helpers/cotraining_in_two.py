"""Co-train a few steps in one process and in two (gloo); write what came out of each.

python -m tests.helpers.cotraining_in_two FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, debug_launcher
from safetensors.torch import save_file

from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.training.config import CotrainConfig
from bridges.training.cotrain import Cotraining, cotrain
from dense import DenseModel
from sparse.text.batches import Batches
from sparse.training.config import TrainConfig
from sparse.training.sparsity import SparsityConfig
from tests.helpers.pair import VOCAB, build_dense, build_sparse


def train(out: str, name: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    dense, sparse = build_dense(), build_sparse()
    blocks = torch.randint(0, VOCAB, (20, 6), generator=torch.Generator().manual_seed(0))
    folder = Path(out) / name
    config = CotrainConfig(
        train=TrainConfig(steps=3, folder=str(folder), log_every=1),
        sparsity=SparsityConfig(density=0.4, embedding_density=0.6, floor=1),
        calibration_tokens=60,
        warmup=0.0,
    )
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7))
    save_gradients(Path(out), name, config, blocks[:4], accelerator.process_index)
    ours, losses = {}, {}
    for module in (sparse, bridges):
        ours |= {f"{type(module).__name__}.{n}": p for n, p in module.named_parameters()}
    keep_losses(losses)
    cotrain(dense, sparse, bridges, Batches(blocks, 4), config, accelerator=accelerator)
    accelerator.wait_for_everyone()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rank = accelerator.process_index
    result = {
        "losses": losses,
        "rms": {f"{n}@{x['step']}": x[n] for x in lines for n in x if n.startswith("grad_rms")},
        "norms": {n: p.norm().item() for n, p in ours.items()},
        "params": [p.double().sum().item() for p in ours.values()],
    }
    path = Path(out) / (f"{name}.json" if accelerator.num_processes == 1 else f"{name}-{rank}.json")
    path.write_text(json.dumps(result))
    accelerator.end_training()


def save_gradients(out: Path, name: str, config, ids, rank: int) -> None:
    """Write the gradient of every term of this process's rows, averaged over the processes."""
    dense, sparse = DenseModel(build_dense().model.double()), build_sparse().double()
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7)).double()
    world = dist.get_world_size() if dist.is_initialized() else 1
    terms = Cotraining(dense, sparse, bridges, config)(ids[rank::world], step=1)
    params = [*sparse.parameters(), *bridges.parameters()]
    grads = {}
    for term, value in terms.items():
        parts = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        zeros = map(torch.zeros_like, params)
        parts = [(z if g is None else g).flatten() for g, z in zip(parts, zeros, strict=True)]
        grads[term] = torch.cat(parts) / world
        if world > 1:
            dist.all_reduce(grads[term])
    save_file(grads, out / f"{name}-{rank}.safetensors")


def keep_losses(into: dict[str, float]) -> None:
    """Keep the first step's losses of this process: the log has the main one's only."""
    import bridges.training.cotrain as module

    real = module.losses

    def losses(*args, **kwargs):
        terms = real(*args, **kwargs)
        for name, value in terms.items():
            into.setdefault(name, value.item())
        return terms

    module.losses = losses


if __name__ == "__main__":
    debug_launcher(train, (sys.argv[1], "two"), num_processes=2)
    train(sys.argv[1], "one")
