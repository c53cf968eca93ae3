"""What `bridges.planned` says of a run, beside the run itself: seconds and memory, on this device.

    python benchmarks/plan_against_run.py                  three designs, 15 minutes on two cores
    python benchmarks/plan_against_run.py --designs demo

Each design is planned in one process and trained in another, so that neither's memory is counted
with the other's. Memory is what both models and the bridges hold, and what the process has more at
its peak than before it trained, with an allocator that gives back what is freed: otherwise glibc
keeps up to as much again, and is twice as fast for it. Seconds are those of `cotrain`: calibration,
steps and evaluations.
"smollm2" needs the package of SmolLM2-135M (README, `make real`).
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from bridges import PRESETS, cotrain, planned, read_text
from bridges.cost.plan import stored
from dense import DenseModel, tiny


def gpt2_of_20m():
    """A GPT-2 of 20 M parameters, random, with the built-in tokenizer."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=2048, n_embd=512, n_layer=6, n_head=8, n_positions=256)
    return DenseModel(GPT2LMHeadModel(shape), tokenizer=tiny().tokenizer, name="gpt2-20m")


GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of glibc's allocator: larger blocks go back to the system when they are freed."""
DESIGNS = {  # the dense model, and the preset
    "demo": (tiny, replace(PRESETS["demo"], steps=60)),
    "gpt2-20m": (gpt2_of_20m, replace(PRESETS["cpu"], steps=40)),
    "smollm2": (
        lambda: DenseModel.from_pretrained("smollm2"),
        replace(PRESETS["cpu"], steps=20),
    ),
}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--what", choices=["plan", "run", "memory"], help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.what:
        print(json.dumps(measured(args.designs[0], args.what)))
        return
    print(
        f"{'design':10}{'seconds':>9}{'planned':>9}{'ratio':>7}{'GB':>8}{'planned':>9}{'ratio':>7}"
    )
    for name in args.designs:
        plan, run = (in_a_process(name, what, args.threads) for what in ("plan", "run"))
        run["GB"] = in_a_process(name, "memory", args.threads)["GB"]
        line = f"{name:10}"
        for key in ("seconds", "GB"):
            ratio = plan[key] / run[key]
            line += f"{run[key]:{9 if key == 'seconds' else 8}.3g}{plan[key]:9.3g}{ratio:7.2f}"
        print(line, flush=True)


def in_a_process(name: str, what: str, threads: int) -> dict:
    command = [sys.executable, __file__, "--designs", name, "--what", what]
    command += ["--threads", str(threads)]
    env = os.environ | (GIVEN_BACK if what == "memory" else {})
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def measured(name: str, what: str) -> dict:
    """Return seconds and GB, as the plan says or as the run takes; for GB six steps are enough."""
    open_, preset = DESIGNS[name]
    preset = replace(preset, steps=6) if what == "memory" else preset
    dense = open_()
    with TemporaryDirectory() as folder:
        if what == "plan":
            found = planned(preset, dense, Accelerator(), folder=folder)[1]
            return {"seconds": 3600 * (found.hours() or 0), "GB": found.memory / 1e9}
        text = read_text(replace(preset, stream=True), dense.tokenizer)
        design = preset.build(dense, folder)
        validation = design.validation(text.heldout, preset.batch)
        held = sum(map(stored, (dense.model, *design[:2])))
        before = resident("VmRSS") - held
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        begun = perf_counter()
        cotrain(dense, *design[:2], text.batches, design.config, validation)
        seconds = perf_counter() - begun
    return {"seconds": seconds, "GB": (resident("VmHWM") - before) / 1e9}


def resident(field: str) -> int:
    """Return a resident size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
