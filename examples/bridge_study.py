"""What each choice in training a bridge is worth: one change at a time, beside the default.

    python examples/bridge_study.py --output_dir runs/bridge-study

Every cell co-trains a twin of the built-in model (twice its width, 1/16 of the weights, annealed
over the first half) on the same batches and is scored on the same held-out text. The first cell is
trained with several seeds: their range is what a difference must exceed. Resumes where it was
stopped; --cells chooses some. Beside each FVU stands the least that affine maps fitted to the
finished models reach, without AbsTopK: what is above it is the bridge's, what is in it the twin's.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

K = 64  # entries an encoder keeps of 256
HALF = dict(k=2 * K)
FAST, TWICE = dict(lr=6e-2, bridge_lr=3e-2), dict(weights=dict(hybrid=2.0))
CELLS = {  # name: (what is asked, fields of CotrainConfig, of the twin, of the bridges, seed)
    "default": ("", {}, {}, {}, 0),
    "default, seed 1": ("noise", {}, {}, {}, 1),
    "default, seed 2": ("noise", {}, {}, {}, 2),
    "no centring, no scale": ("normalisation", dict(calibration_tokens=0), {}, {}, 0),
    "NMSE per token": ("definition of the NMSE", dict(nmse="per_token"), {}, {}, 0),
    "NMSE uncentred": ("definition of the NMSE", dict(nmse="uncentred"), {}, {}, 0),
    "2 sites per sequence": ("hybrid passes", dict(sites_per_sequence=2), {}, {}, 0),
    "all sites": ("hybrid passes", dict(hybrid_sites="all"), {}, {}, 0),
    "k = d/16": ("encoder", {}, {}, dict(k=K // 4), 0),
    "k = d/2": ("encoder", {}, {}, HALF, 0),
    "k = d": ("encoder", {}, {}, dict(k=4 * K), 0),
    "decoder detached": ("gradient flow", dict(decoder_trains_trunk=False), {}, {}, 0),
    "twin rate 1.5e-2": ("learning rates", dict(lr=1.5e-2), {}, {}, 0),
    "twin rate 6e-2": ("learning rates", dict(lr=6e-2), {}, {}, 0),
    "bridge rate 1e-3": ("learning rates", dict(bridge_lr=1e-3), {}, {}, 0),
    "bridge rate 1e-2": ("learning rates", dict(bridge_lr=1e-2), {}, {}, 0),
    "no cross entropy": ("weights", dict(weights=dict(ce=0.0)), {}, {}, 0),
    "hybrids twice": ("weights", TWICE, {}, {}, 0),
    "errors half": ("weights", dict(weights=dict(nmse=0.5)), {}, {}, 0),
    "k = d/2, 6e-2, 1e-2": ("together", dict(lr=6e-2, bridge_lr=1e-2), {}, HALF, 0),
    "k = d/2, 6e-2, raw": ("together", dict(lr=6e-2, calibration_tokens=0), {}, HALF, 0),
    "k = d/2, 6e-2, 3e-2": ("together", FAST, {}, HALF, 0),
    "k = d/2, 6e-2, 3e-2, hybrids twice": ("together", FAST | TWICE, {}, HALF, 0),
    "k = d/2, 6e-2, 1e-2, hybrids twice": (
        "together",
        FAST | TWICE | dict(bridge_lr=1e-2),
        {},
        HALF,
        0,
    ),
    "three times the width": ("twin", {}, dict(hidden_size=384), dict(k=96), 0),
}
COLUMNS = {  # of the table: key of `validate`, heading
    "ce": "CE, sparse",
    "kl": "KL(dense, sparse)",
    "encode": "encoder FVU",
    "encode_least": "least",
    "decode": "decoder FVU",
    "decode_least": "least",
    "up": "KL up",
    "down": "KL down",
}
BATCH, LENGTH, DENSITY = 16, 128, 1 / 16


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--output_dir", default="runs/bridge-study")
    p.add_argument("--dataset", help="file, folder or dataset; default: Python's own sources")
    p.add_argument("--steps", type=int, default=400, help="optimizer steps of 16 x 128 tokens")
    p.add_argument("--cells", nargs="*", choices=CELLS, help="default: all")
    return p.parse_args()


def main() -> None:
    args = parse()
    from dense import tiny
    from sparse import load_corpus, pack

    folder, dense = Path(args.output_dir), tiny()
    corpus = load_corpus(args.dataset)
    train = pack(corpus.train, dense.tokenizer, LENGTH, cache=folder / "tokens")
    heldout = pack(corpus.validation, dense.tokenizer, LENGTH, cache=folder / "tokens")[:128]
    for cell in args.cells or CELLS:
        path = folder / cell.replace(", ", "-").replace(" ", "-").replace("/", "") / "result.json"
        if not path.is_file():
            scores = train_cell(args, cell, path.parent, dense, train, heldout)
            path.write_text(json.dumps({"cell": cell} | scores, indent=1))
    found = [json.loads(p.read_text()) for p in folder.glob("*/result.json")]
    text = table({row["cell"]: row for row in found}, args)
    (folder / "study.md").write_text(text)
    print(text)


def train_cell(args, cell, folder, dense, train, heldout) -> dict[str, float]:
    """Train one cell; return its scores at all sites, and the seconds it took."""
    from time import process_time

    from bridges import cotrain, validate
    from sparse import Batches

    sparse, bridges, config = build(args, cell, folder, dense)
    batches = Batches(train, BATCH, config.train.seed)
    started = process_time()
    cotrain(dense, sparse, bridges, batches, config)
    seconds = process_time() - started
    some = train[: min(1024, BATCH * args.steps)]  # 131,072 tokens at most
    least = least_errors(dense, sparse, some, heldout)
    return {"seconds": seconds} | validate(dense, sparse, bridges, heldout.split(16)) | least


def build(args, cell, folder, dense):
    """The twin of one cell, its bridges and their training."""
    import torch

    from bridges import BridgeConfig, BridgeSet, CotrainConfig, LossWeights
    from sparse import SparseGPT, SparseGPTConfig, SparsityConfig, TrainConfig

    _, fields, twin, shape, seed = CELLS[cell]
    torch.manual_seed(seed)
    width = twin.get("hidden_size", 256)
    sparse = SparseGPT(
        SparseGPTConfig(
            vocab_size=dense.vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=dense.n_layers,
            num_attention_heads=width // 16,
            head_dim=16,
            max_position_embeddings=256,
            positions="learned",
            eos_token_id=dense.tokenizer.eos_token_id,
        )
    )
    fields = dict(fields)
    weights = LossWeights(**fields.pop("weights", {}))
    config = CotrainConfig(
        train=TrainConfig(steps=args.steps, folder=str(folder), seed=seed, checkpoint_every=100),
        sparsity=SparsityConfig(density=DENSITY, embedding_density=4 * DENSITY),
        weights=weights,
        **fields,
    )
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, **({"k": K} | shape)), seed=seed)
    return sparse, bridges, config


def least_errors(dense, sparse, train, heldout) -> dict[str, float]:
    """The FVU of the best affine maps between the finished models, mean over the bridged sites."""
    from bridges import fit_sites

    fit = fit_sites(dense, sparse, train.split(16), heldout.split(16))
    least = {"encode_least": fit.encoder_fvu, "decode_least": fit.decoder_fvu}
    return {name: fvu.diagonal().mean().item() for name, fvu in least.items()}


def table(rows: dict[str, dict], args) -> str:
    """The scores of every cell that is there; the default's seeds give the range of chance."""
    shown = [name for name in CELLS if name in rows]
    lines = [
        f"{args.steps} optimizer steps of {BATCH} x {LENGTH} tokens, {DENSITY:.4g} of the weights.",
        "Nats per token; FVU: fraction of variance unexplained; means over sites. Lower is better.",
        "",
        "| changed | cell | " + " | ".join(COLUMNS.values()) + " | CPU minutes |",
        "|---|---|" + "--:|" * (len(COLUMNS) + 1),
    ]
    for name in shown:
        row = rows[name]
        cells = [f"{row[key]:.3f}" for key in COLUMNS] + [f"{row['seconds'] / 60:.1f}"]
        lines.append(f"| {CELLS[name][0]} | {name} | " + " | ".join(cells) + " |")
    seeds = [rows[name] for name in shown if name.startswith("default")]
    if len(seeds) > 1:
        spans = [max(r[k] for r in seeds) - min(r[k] for r in seeds) for k in COLUMNS]
        span = " | ".join(f"{x:.3f}" for x in spans)
        lines.append(f"| | range of the default's {len(seeds)} seeds | {span} | |")
    if shown:
        lines += [
            "",
            f"The dense model's cross entropy on the same text: {rows[shown[0]]['ce_dense']:.3f}.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
