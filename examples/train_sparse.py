"""Train a weight-sparse GPT alone, by the recipe of Gao et al. 2025.

    python examples/train_sparse.py --output_dir runs/sparse
    accelerate launch --mixed_precision bf16 examples/train_sparse.py --preset gao2025 \\
        --dataset text/ --output_dir runs/gao2025

Writes a Hugging Face folder with the tokenizer and a model card, log.jsonl and checkpoints beside
them, and prints the held-out loss beside two controls. Started again with the same settings it
resumes. Precision and processes are those of `accelerate launch`.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PRESETS = {
    # width d (d_mlp = 4 d), matrices' density, optimizer steps of batch x length tokens
    "small": dict(width=256, density=1 / 16, steps=1000),
    "gao2025": dict(width=1024, density=1 / 64, steps=244_140),
}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--preset", choices=PRESETS, default="small", help="small runs on a CPU")
    p.add_argument("--dataset", help="file, folder or dataset; default: Python's own sources")
    p.add_argument("--output_dir", default="runs/sparse", help="Hugging Face folder to write")
    p.add_argument("--steps", type=int, help="optimizer steps, instead of the preset's")
    p.add_argument("--density", type=float, help="share of the matrices' weights kept at the end")
    p.add_argument("--width", type=int, help="of the residual stream; a multiple of 16")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps < 1:
        p.error(f"--steps {args.steps} must be at least 1")
    if not 0 < args.density <= 1:
        p.error(f"--density {args.density} must be above 0 and at most 1")
    if args.width < 16 or args.width % 16:
        p.error(f"--width {args.width} must be a multiple of 16, the width of a head")
    if Path(args.output_dir).is_file():
        p.error(f"--output_dir {args.output_dir} is a file; name a folder, there or to be made")
    return args


def recipe(args: argparse.Namespace, tokenizer):
    """The published recipe at this width and density; "small" is shallow, with small batches."""
    from sparse import gao2025, prefix_ids

    expansion, prefix = args.width / 256, prefix_ids(tokenizer)
    shape = dict(vocab_size=len(tokenizer))
    if len(prefix) == 1:
        shape["bos_token_id"] = prefix[0]  # where a generation begins
    fields = {}
    if args.preset == "small":
        shape |= dict(num_hidden_layers=2, max_position_embeddings=256)
        fields = dict(batch_size=16, length=128, lr=3e-2)
        fields |= dict(sparsity=dict(embedding_density=min(1.0, 4 * args.density)))
    return gao2025(
        args.output_dir,
        expansion,
        args.density * expansion**2,
        steps=args.steps,
        model=shape,
        train=dict(
            seed=args.seed,
            evaluate_every=max(10, args.steps // 10),
            checkpoint_every=max(10, min(1000, args.steps // 10)),
            mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        ),
        **fields,
    )


def read_text(args: argparse.Namespace, tokenizer, length: int):
    """The corpus, its training blocks, and a few batches of held-out blocks."""
    from sparse import load_corpus, pack

    corpus = load_corpus(args.dataset)
    cache = Path(args.output_dir).parent / "tokens"  # shared by the runs beside each other
    blocks = pack(corpus.train, tokenizer, length, cache=cache)
    held = pack(corpus.validation, tokenizer, length, cache=cache).split(16)[:8]
    return corpus, blocks, held


def main() -> None:
    args = parse()
    import torch
    from accelerate import Accelerator

    from dense import tiny
    from sparse import Batches, SparseGPT, heldout_nats, prefix_ids, pretrain, unigram_nats

    tokenizer = tiny().tokenizer
    preset = recipe(args, tokenizer)
    torch.manual_seed(args.seed)
    model = SparseGPT(preset.model)
    preset.pretrain.sparsity.check(model)  # before the text is read
    accelerator = Accelerator(mixed_precision=preset.pretrain.train.mixed_precision)
    say = accelerator.print
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    corpus, blocks, held = read_text(args, tokenizer, preset.length)
    batches = Batches(blocks, preset.batch_size, args.seed)
    say(f"{model.num_parameters():,} parameters, {args.density:.4f} of the matrices kept at last")
    say(f"{corpus.name}: {blocks.numel():,} training tokens")

    start = heldout_nats(model, held)
    loss = pretrain(model, batches, preset.pretrain, held, accelerator)["ce"]
    unigram = unigram_nats(blocks, held, len(tokenizer), prefix_ids(tokenizer))
    say(f"held out: {loss:.3f} nats per token; knowing only how often tokens occur {unigram:.3f},")
    say(f"          before training, with every weight {start:.3f}")
    if accelerator.is_main_process:
        controls = {"unigram frequencies": unigram, "the same model, untrained": start}
        model.card = card(args, preset, corpus, model, loss, controls)
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        say(f"wrote {args.output_dir}; open it with SparseGPT.from_pretrained")
    accelerator.end_training()


def card(args: argparse.Namespace, preset, corpus, model, loss: float, controls: dict[str, float]):
    """The model card: how the model was made, and its loss beside its controls."""
    from sparse import Card, Metric

    what = dict(name="held-out cross entropy", value=loss, unit="nats per token")
    return Card(
        command=" ".join(["python", *sys.argv]),
        data=f"{corpus.name}, sha256 {corpus.fingerprint[:16]}",
        tokens=args.steps * preset.batch_size * preset.length,
        steps=args.steps,
        seed=args.seed,
        metrics=tuple(
            Metric(**what, control=name, control_value=nats) for name, nats in controls.items()
        ),
        fingerprint=model.fingerprint(),
        notes="Trained by examples/train_sparse.py; biases are sparse, as in the paper.",
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(f"{str(stop) or 'interrupted'}; start the same command again to resume")
