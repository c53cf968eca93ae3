"""A small study: what sparsity and width do to the loss and to the size of circuits.

    python examples/sparsity_study.py --output_dir runs/study

Two findings of Gao et al. 2025 (Figures 2 and 3), tried at a size that a laptop can train:
    1. at one width, fewer nonzero weights: a worse loss, but smaller circuits
    2. at one number of nonzero weights, a wider model: better on both
Every cell is trained with every seed on the same batches; one seed's cells are compared with each
other, and the control of each comparison is the same comparison with the cells' names exchanged at
random. Every circuit stands beside random circuits of its size. Resumes where it was stopped.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# cell: width, density of the matrices. The embeddings are denser by width / 96 (method of the
# paper: by the expansion factor), so that equal nonzeros in the matrices are equal in all.
CELLS = {
    "narrow": (96, 1 / 4),
    "narrow, sparser": (96, 1 / 16),
    "wide, denser": (192, 1 / 4),
    "wide": (192, 1 / 16),
    "wide, sparser": (192, 1 / 64),
}
CLAIMS = (  # what is claimed of the first cell against the second: its loss, its circuits' size
    ("fewer nonzeros", "wide", "wide, denser", +1, -1),
    ("fewer nonzeros", "wide, sparser", "wide", +1, -1),
    ("wider at equal nonzeros", "wide", "narrow", -1, -1),
    ("wider at equal nonzeros", "wide, sparser", "narrow, sparser", -1, -1),
)
BASE, BATCH, LENGTH = 96, 16, 64  # smallest width; sequences per step; tokens per sequence


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--output_dir", default="runs/study")
    p.add_argument("--dataset", help="file, folder or dataset; default: Python's own sources")
    p.add_argument("--seeds", type=int, default=3, help="trainings of every cell")
    p.add_argument("--steps", type=int, default=2000, help="optimizer steps of 16 x 64 tokens")
    p.add_argument("--prune_steps", type=int, default=300, help="optimizer steps of the pruning")
    p.add_argument("--target_loss", type=float, default=0.4, help="nats that circuits should reach")
    return p.parse_args()


def main() -> None:
    args = parse()
    from dense import tiny
    from sparse import load_corpus, pack

    folder, tokenizer = Path(args.output_dir), tiny().tokenizer
    corpus = load_corpus(args.dataset)
    train = pack(corpus.train, tokenizer, LENGTH, cache=folder / "tokens")
    heldout = pack(corpus.validation, tokenizer, LENGTH, cache=folder / "tokens")[:256]
    rows = []
    for seed, cell in itertools.product(range(args.seeds), CELLS):
        path = folder / f"{cell.replace(', ', '-')}-{seed}" / "result.json"
        if not path.is_file():
            model, nats = train_cell(args, cell, seed, path.parent, tokenizer, train, heldout)
            row = {"cell": cell, "seed": seed, "nonzeros": nonzeros(model), "nats": nats}
            row["circuits"] = [
                circuit_row(args, model, task, seed, tokenizer, train)
                for task in ("single_double_quote", "while_return_true")
            ]
            path.write_text(json.dumps(row, indent=1))
        rows.append(json.loads(path.read_text()))
    text = table(rows, args)
    (folder / "study.md").write_text(text)
    print(text)
    print(f"wrote {folder}/study.md")


def train_cell(args, cell, seed, folder, tokenizer, train, heldout):
    """The trained model of one cell, and its held-out nats per token."""
    import torch

    from sparse import (
        Batches,
        PretrainConfig,
        SparseGPT,
        SparseGPTConfig,
        SparsityConfig,
        TrainConfig,
        pretrain,
    )

    width, density = CELLS[cell]
    torch.manual_seed(seed)
    model = SparseGPT(
        SparseGPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            positions="learned",
        )
    )
    config = PretrainConfig(
        train=TrainConfig(steps=args.steps, folder=str(folder), seed=seed, checkpoint_every=500),
        sparsity=SparsityConfig(density=density, embedding_density=density * width / BASE, floor=1),
        lr=3e-2,
        warmup=0.02,
    )
    scores = pretrain(model, Batches(train, BATCH, seed), config, heldout.split(64))
    model.save_pretrained(folder / "model")
    return model, scores["ce"]


def nonzeros(model) -> int:
    """Nonzero weights of the blocks' matrices."""
    blocks = model.model.blocks.parameters()
    return sum(int(p.count_nonzero()) for p in blocks if p.ndim == 2)


def circuit_row(args, model, name, seed, tokenizer, train) -> dict:
    """The circuit of one task: its size and losses, and what random circuits of its size lose."""
    import torch

    from sparse import PruneConfig, get_task, last_logits, masked, node_means, prune, task_nats

    task = get_task(name)
    config = PruneConfig(
        n_steps=args.prune_steps,
        n_trials=min(200, args.prune_steps),
        target_loss=args.target_loss,
        margin=0,
        seed=seed,
    )
    means = node_means(model, train[:256])
    circuit = prune(model, task, config, tokenizer=tokenizer, means=means, force=True)
    controls = [circuit.random(model, draw) for draw in range(5)]
    batch = task.batch(tokenizer, "validation")
    lost = []
    for control in controls:
        with torch.no_grad(), masked(model, control.masks(), control.ablation):
            lost.append(task_nats(last_logits(model, batch), batch).mean().item())
    return {
        "task": name,
        "nodes": len(circuit),
        "edges": len(circuit.edges(model)),
        "met": circuit.met,
        "loss": circuit.loss,
        "random": sum(lost) / len(lost),
    }


def table(rows: list[dict], args) -> str:
    """The cells and the claims as Markdown."""
    seeds = {row["seed"] for row in rows}
    lines = [
        f"{args.steps} steps of {BATCH * LENGTH} tokens, {len(seeds)} seeds; circuits that reach "
        f"{args.target_loss} nats on validation, sizes as geometric means over tasks. In brackets: "
        "least and most over seeds.\n",
        *table_of_cells(rows),
        "",
        *table_of_claims(rows),
    ]
    return "\n".join(lines) + "\n"


def table_of_cells(rows: list[dict]) -> list[str]:
    """Loss and circuits of every cell."""
    import numpy as np

    lines = [
        "| cell | width | density | nonzero weights | held-out nats per token | nodes | edges | "
        "nats of the circuits | nats of random circuits of that size |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for cell, (width, density) in CELLS.items():
        own = of_cell(rows, cell)
        circuits = [c for row in own for c in row["circuits"]]
        met = f"{sum(c['met'] for c in circuits)} of {len(circuits)} met"
        entries = [
            *(cell, width, f"1/{round(1 / density)}", f"{own[0]['nonzeros']:,}"),
            spread(nats(rows, cell), ".3f"),
            spread(np.exp(log_size(rows, cell, "nodes")), ".0f"),
            spread(np.exp(log_size(rows, cell, "edges")), ".0f"),
            f"{np.mean([c['loss']['circuit/validation'] for c in circuits]):.3f}, {met}",
            f"{np.mean([c['random'] for c in circuits]):.3f}",
        ]
        lines.append(f"| {' | '.join(map(str, entries))} |")
    return lines


def table_of_claims(rows: list[dict]) -> list[str]:
    """Every claim about two cells, beside the same comparison with their names exchanged."""
    lines = [
        "| claim | first cell - second cell | difference, mean over seeds | control: signs "
        "exchanged, the largest | seeds that agree |",
        "|---|---|--:|--:|--:|",
    ]
    for claim, a, b, loss_sign, size_sign in CLAIMS:
        nodes, edges = (log_size(rows, a, x) - log_size(rows, b, x) for x in ("nodes", "edges"))
        quantities = {
            "nats per token": (loss_sign, nats(rows, a) - nats(rows, b)),
            "log nodes": (size_sign, nodes),
            "log edges": (size_sign, edges),
        }
        for name, (sign, d) in quantities.items():
            says = f"{claim}: {'more' if sign > 0 else 'fewer'} {name}"
            agree = f"{int((sign * d > 0).sum())} of {len(d)}"
            control = sign * exchanged(sign * d)
            lines.append(f"| {says} | {a} - {b} | {d.mean():+.3f} | {control:+.3f} | {agree} |")
    return lines


def of_cell(rows: list[dict], cell: str) -> list[dict]:
    """The rows of a cell by rising seed."""
    return sorted((row for row in rows if row["cell"] == cell), key=lambda row: row["seed"])


def nats(rows: list[dict], cell: str):
    """Held-out nats per token, per seed."""
    import numpy as np

    return np.array([row["nats"] for row in of_cell(rows, cell)])


def log_size(rows: list[dict], cell: str, what: str):
    """Log size of the circuits per seed, mean over tasks."""
    import numpy as np

    found = [[c[what] for c in row["circuits"]] for row in of_cell(rows, cell)]
    return np.log(np.maximum(found, 1)).mean(1)


def spread(x, form: str) -> str:
    """Mean, least and most over seeds."""
    return f"{x.mean():{form}} ({x.min():{form}} to {x.max():{form}})"


def exchanged(d) -> float:
    """The largest mean of `d` with some signs turned: what chance could give at the most."""
    turned = [signs for signs in itertools.product((1, -1), repeat=len(d)) if -1 in signs]
    return max(float((d * signs).mean()) for signs in turned)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
