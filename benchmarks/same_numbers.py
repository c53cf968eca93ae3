"""Do two checkouts compute the same numbers, bit for bit?

    python benchmarks/same_numbers.py OLD NEW

Each checkout runs the same small job in a process of its own, at fixed seeds, on this machine: 20
co-training steps and 20 pretraining steps (every logged loss and gradient size, and a hash of the
weights), one pruning (losses, calibration and nodes) and one quick report (every value, control and
draw). All numbers are written exactly, as hexadecimal floats, and compared as text. There are no
recorded numbers to compare with, because the last digits differ from machine to machine.

Use it to show that a refactoring changes nothing: either the two sides agree, or the first lines
that differ are shown and the exit status is 1. As a control, `--change` moves one weight in NEW by
one unit in the last place before anything runs; with it the sides must differ.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from difflib import unified_diff
from pathlib import Path

STEPS = 20
BATCH, LENGTH = 4, 64
CLOCK = "time/"  # how the keys of the log begin that hold times, which are not compared


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("old", type=Path, metavar="OLD", help="a checkout of this repository")
    p.add_argument("new", type=Path, metavar="NEW", help="another one")
    p.add_argument("--change", action="store_true", help="the control: spoil one weight in NEW")
    p.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.inside:
        report_numbers(args.change)
        return 0
    old, new = run(args.old, False), run(args.new, args.change)
    differ = list(unified_diff(old, new, str(args.old), str(args.new), lineterm="", n=0))
    if not differ:
        print(f"the same: {len(old)} lines of numbers, bit for bit")
        return 0
    print("\n".join(differ[:60]))
    print(f"\nNOT the same: {len(differ)} lines of difference in {len(old)} lines of numbers")
    return 1


def run(checkout: Path, change: bool) -> list[str]:
    """Return the lines that `checkout` computes, in a fresh process and an empty folder."""
    if not (checkout / "sparse" / "__init__.py").is_file():
        raise SystemExit(f"error: {checkout} is no checkout: sparse/__init__.py is missing")
    words = [sys.executable, str(Path(__file__).resolve()), ".", ".", "--inside"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            words + ["--change"] * change,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nerror: {checkout} failed, status {done.returncode}")
    return done.stdout.splitlines()


def report_numbers(change: bool) -> None:
    """Print every number of the job. It uses public names only, which both sides must have."""
    import sparse

    here = Path(os.environ["PYTHONPATH"])
    assert Path(str(sparse.__file__)).parents[1] == here, "another package named sparse came first"
    for part in (cotraining, pretraining, pruning, quick_report):
        for line in part(change):
            print(f"{part.__name__}: {line}")


def cotraining(change: bool) -> list[str]:
    from bridges import BridgeConfig, BridgeSet, CotrainConfig, cotrain
    from dense import DenseModel
    from sparse import SparsityConfig, TrainConfig

    dense = DenseModel.from_pretrained("tiny")
    twin = small_model(dense.vocab_size, dense.n_layers, change)
    bridges = BridgeSet(BridgeConfig.between(dense, twin, k=16), seed=0)
    config = CotrainConfig(
        train=TrainConfig(steps=STEPS, folder="cotraining", log_every=1, accumulate=2),
        sparsity=SparsityConfig(density=1 / 8, embedding_density=1 / 4),
        sites_per_sequence=2,
        hybrid_tokens=0.5,
        calibration_tokens=512,
    )
    batches, heldout = text(dense.tokenizer)
    cotrain(dense, twin, bridges, batches, config, [heldout])
    return logged("cotraining") + [f"twin {weights(twin)}", f"bridges {weights(bridges)}"]


def pretraining(change: bool) -> list[str]:
    from dense import DenseModel
    from sparse import PretrainConfig, SparsityConfig, TrainConfig, pretrain

    dense = DenseModel.from_pretrained("tiny")
    model = small_model(dense.vocab_size, 2, change)
    config = PretrainConfig(
        train=TrainConfig(steps=STEPS, folder="pretraining", log_every=1),
        sparsity=SparsityConfig(density=1 / 8, embedding_density=1 / 4),
    )
    batches, heldout = text(dense.tokenizer)
    pretrain(model, batches, config, [heldout])
    return logged("pretraining") + [f"model {weights(model)}"]


def pruning(change: bool) -> list[str]:
    from bridges import load_run
    from sparse import PruneConfig, get_task, prune

    run = load_run("tiny")
    if change:
        spoil(run.sparse)
    circuit = prune(
        run.sparse,
        get_task("single_double_quote"),
        PruneConfig(n_steps=10),
        tokenizer=run.tokenizer,
        means=run.circuits()["single_double_quote"].ablation,
    )
    nodes = [f"{location} {list(indices)}" for location, indices in circuit.nodes.items()]
    numbers = [f"{name} {nats.hex()}" for name, nats in circuit.loss.items()]
    assert circuit.calibration
    return [*nodes, *numbers, " ".join(x.hex() for x in circuit.calibration)]


def quick_report(change: bool) -> list[str]:
    from bridges import load_run
    from evals import evaluate_run

    run = load_run("tiny")
    if change:
        spoil_map(run.bridges)
    report = evaluate_run(run, tasks=["single_double_quote"], draws=20, quick=True)
    lines = []
    for heading, row in report:
        numbers = (row.value, row.control, row.stderr, *row.interval, *row.draws)
        lines.append(
            f"{heading} / {row.name} n={row.n} {' '.join(float(x).hex() for x in numbers)}"
        )
    return lines


def small_model(vocab_size: int, n_layers: int, change: bool):
    import torch

    from sparse import SparseGPT, SparseGPTConfig

    torch.manual_seed(0)
    model = SparseGPT(
        SparseGPTConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            head_dim=16,
            positions="concatenated",  # a table whose start no version has changed
            position_channels=16,
            dropout=0.1,
        )
    )
    if change:
        spoil(model)
    return model


def spoil(model) -> None:
    """Move one weight that every prompt uses by one unit in the last place."""
    import torch

    weight = model.lm_head.weight.data
    at = weight.abs().argmax()
    flat = weight.view(-1)
    flat[at] = torch.nextafter(flat[at], flat[at] * 2)


def spoil_map(bridges) -> None:
    """Move one weight of every encoder and decoder by one unit in the last place."""
    import torch

    for layer in (*bridges.encoders, *bridges.decoders):
        flat = layer.weight.data.view(-1)
        flat[0] = torch.nextafter(flat[0], flat[0] * 2)


def text(tokenizer):
    """Return batches and held-out blocks, of the source files of the Python that runs this."""
    from sparse import Batches, load_corpus, pack

    documents = list(load_corpus(None).train)[:40]
    blocks = pack(documents, tokenizer, LENGTH)
    return Batches(blocks[: 40 * BATCH], BATCH, 0), blocks[-2 * BATCH :]


def logged(folder: str) -> list[str]:
    """Return every number of the log except times, written exactly."""
    import json

    lines = []
    for text in (Path(folder) / "log.jsonl").read_text().splitlines():
        values = json.loads(text)
        kept = [f"{k} {float(v).hex()}" for k, v in values.items() if not k.startswith(CLOCK)]
        lines.append(", ".join(kept))
    return lines


def weights(module) -> str:
    """Return a hash of every tensor's bytes, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


if __name__ == "__main__":
    sys.exit(main())
