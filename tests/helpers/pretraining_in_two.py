"""Pretrain in one process and in two (gloo); write what came out of each.

    python -m tests.helpers.pretraining_in_two FOLDER

FOLDER/NAME.json and FOLDER/NAME.safetensors, with `-RANK` before the suffix for two processes.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from safetensors.torch import save_file

from sparse.training.heldout import heldout_nats
from sparse.training.loop import fit
from sparse.training.pretrain import Pretraining
from sparse.training.processes import Interrupted
from tests.helpers.small_run import HELD, batches, build, preset


def train(out: str, name: str, run: str, passes: int = 1, asks: int = -1) -> None:
    """Train in OUT/runs/`run`; the process of rank 1 asks itself to stop in step `asks`."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank, out = accelerator.process_index, Path(out)
    often = dict(log_every=4, checkpoint_every=100, accumulate=passes)
    config = preset(out / "runs" / run, train=dict(steps=12) | often)
    module = Pretraining(build(config), config.pretrain)
    facts, kept = {"losses": [], "stopped": ""}, {}

    class Watched(Pretraining):
        def forward(self, ids, step):
            losses = super().forward(ids, step)
            facts["losses"].append(losses["ce"].item())
            return losses

    def after_step(step: int) -> dict[str, float]:
        if step == 0:  # the gradients of the whole batch, normalised
            kept.update({f"grad/{n}": p.grad.clone() for n, p in module.model.named_parameters()})
        if step == asks and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return module.sparsifier.project(step)

    module.__class__ = Watched
    try:
        fit(module, batches(), config.pretrain.train, after_step, accelerator=accelerator)
    except Interrupted as stop:
        facts["stopped"] = str(stop)
    facts["heldout"] = heldout_nats(module.model, HELD, accelerator)
    kept |= {n: p.detach().clone() for n, p in module.model.named_parameters()}
    suffix = f"-{rank}" if accelerator.num_processes > 1 else ""
    save_file(kept, out / f"{name}{suffix}.safetensors")
    (out / f"{name}{suffix}.json").write_text(json.dumps(facts))
    accelerator.end_training()


if __name__ == "__main__":
    for args in (("whole", "whole"), ("stopped", "stopped", 2, 5), ("resumed", "stopped", 2)):
        debug_launcher(train, (sys.argv[1], *args), num_processes=2)
    train(sys.argv[1], "one", "one")
    train(sys.argv[1], "passes", "passes", 4)
