"""Train, cut and resume the same runs in one process, in two and sharded; write what came of each.

    python -m tests.helpers.devices FOLDER

FOLDER/NAME-RANK.safetensors and .json, for runs in float64, so that equal means nearly every digit.
The last run fails in process 1 alone.
"""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import bridges.training.cotrain
from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.training.config import CotrainConfig
from bridges.training.cotrain import cotrain
from bridges.training.validate import validate
from dense import DenseModel
from sparse.text.batches import Batches
from sparse.training.config import TrainConfig
from sparse.training.pretrain import pretrain
from sparse.training.sparsity import SparsityConfig
from tests.helpers.pair import VOCAB, build_dense, build_sparse
from tests.helpers.small_run import HELD, batches, build, preset

STEPS, CUT = 6, 3
OFTEN = dict(steps=STEPS, log_every=1, evaluate_every=CUT, checkpoint_every=CUT, keep_checkpoints=9)
BLOCKS = torch.randint(0, VOCAB, (56, 6), generator=torch.Generator().manual_seed(0))
CHECK = [BLOCKS[50:52], BLOCKS[52:53], BLOCKS[53:56]]  # no multiple of two


def run(out: Path, name: str, cut_of: str = "", **train) -> None:
    """Train run `name`, from the checkpoint in the middle of run `cut_of` where one is given."""
    accelerator = Accelerator(cpu=True)
    rank, main, part = accelerator.process_index, accelerator.is_main_process, {}
    if cut_of and main:
        middle = Path("checkpoints", f"step-{CUT:08d}")
        shutil.copytree(out / cut_of / middle, out / name / middle)
    accelerator.wait_for_everyone()
    watch = register_optimizer_step_post_hook(lambda optimizer, *_: part.update(held(optimizer)))
    train = OFTEN | dict(folder=str(out / name)) | train
    models = (pretrained if name.startswith("pretrain") else cotrained)(train, accelerator)
    watch.remove()
    named = {f"{i}.{n}": p for i, model in enumerate(models) for n, p in model.named_parameters()}
    hooks = [len(m._state_dict_pre_hooks) for model in models for m in model.modules()]
    plain = all(type(p) is torch.nn.Parameter for p in named.values())
    facts = {"plain": plain, "hooks": sum(hooks), "part": part}
    facts |= {"numel": sum(p.numel() for p in named.values()), "compressed": COMPRESSED[-1]}
    facts |= {"fewer": FEWER[-1] if FEWER else 0.0}
    save_file({n: p.detach().clone() for n, p in named.items()}, out / f"{name}-{rank}.safetensors")
    (out / f"{name}-{rank}.json").write_text(json.dumps(facts))
    accelerator.wait_for_everyone()


def held(optimizer) -> dict[str, int]:
    """How many entries of parameters, gradients and moments this process holds."""

    def count(tensors):
        return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)

    params = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = {"params": count(params), "grads": count(p.grad for p in params)}
    return sizes | {
        k: count(optimizer.state[p][k] for p in params) for k in ("exp_avg", "exp_avg_sq")
    }


COMPRESSED, FEWER = [], []


def counted(products):
    @contextmanager
    def wrapper(*args):
        with products(*args) as names:
            COMPRESSED.append(len(names))
            yield names

    return wrapper


def cotrained(train, accelerator):
    rank = accelerator.process_index
    dense, twin = DenseModel(build_dense().model.double()), build_sparse(seed=rank).double()
    config = CotrainConfig(
        train=TrainConfig(**train),
        sparsity=SparsityConfig(density=0.1, embedding_density=0.3, floor=1, anneal_start=0.0),
        calibration_tokens=60,
        hybrid_tokens=0.5,
        warmup=0.0,
    )
    maps = BridgeSet(BridgeConfig.between(dense, twin, k=7), seed=rank).double()
    cotrain(dense, twin, maps, Batches(BLOCKS[:48], 8), config, CHECK, accelerator)
    maps.check(dense, twin)  # and the fingerprints are of what stands there now
    FEWER.append(validate(dense, twin, maps, CHECK[:1], accelerator=accelerator)["down"])
    return twin, maps


def pretrained(train, accelerator):
    config = preset(Path(train["folder"]), train=train)
    model = build(config, seed=accelerator.process_index).double()
    pretrain(model, batches(), config.pretrain, HELD, accelerator)
    return (model,)


def in_two(out: Path) -> None:
    torch.set_num_threads(1)
    run(out, "two")
    run(out, "two-of-one", "one")
    run(out, "shard", shard=True)
    run(out, "shard-of-one", "one", shard=True)
    run(out, "shard-parts", shard=True, accumulate=2)
    run(out, "pretrain-two-of-one", "pretrain-one")
    run(out, "pretrain-shard", shard=True)
    accelerator, real = Accelerator(cpu=True), bridges.training.cotrain.losses

    def losses(*args, **how):
        if accelerator.process_index == 1:
            (out / "failed").write_text(str(monotonic()))
            raise ArithmeticError("met by process 1 alone")
        return real(*args, **how)

    bridges.training.cotrain.losses = losses
    run(out, "fails")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for module in (bridges.training.cotrain, sys.modules["sparse.training.pretrain"]):
        module.WORTH_REBUILDING = 0  # products in compressed rows, though the matrices are small
        module.csr_products = counted(module.csr_products)
    run(folder, "one")
    run(folder, "pretrain-one")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        debug_launcher(in_two, (folder,), num_processes=2)
    except torch.multiprocessing.ProcessRaisedException as error:
        (folder / "ended").write_text(f"{monotonic()} {error}")
    run(folder, "one-of-two", "two")
    run(folder, "one-of-shard", "shard")
    run(folder, "pretrain-one-of-shard", "pretrain-shard")
