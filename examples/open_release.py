"""Open a model in the authors' released format, run it, and replay the loss of a circuit in it.

    python examples/open_release.py models/csp_yolo1 --tokenizer tinypython --text corpus.txt \\
        --circuit viz/csp_yolo1/single_double_quote/prune_v2/64/viz_data.pt --targets '")' "')"

Without a folder, a small random release is written and opened. Nodes outside the circuit are held
at their means over --text; the authors used their training text, so with another the loss differs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("folder", nargs="?", help="with beeg_config.json and final_model.pt")
    p.add_argument("--tokenizer", help="folder with encoder.json and vocab.bpe; default: the same")
    p.add_argument("--circuit", help="a viz_data.pt of this model")
    p.add_argument("--targets", nargs=2, default=('"', "'"), help="after class 1 and class 2")
    p.add_argument("--text", default=__file__, help="file whose tokens give the node means")
    args = p.parse_args()

    import torch

    from sparse import PruneConfig, SparseGPT, SparseGPTConfig, get_task, node_means, prune, release

    folder = Path(args.folder or tempfile.mkdtemp(prefix="release-"))
    if args.folder is None:
        torch.manual_seed(0)
        config = SparseGPTConfig(vocab_size=257, hidden_size=16, head_dim=2, intermediate_size=32)
        release.save_model(SparseGPT(config), folder)
        release.save_tokenizer([], folder)  # no merges: bytes, and the end of text
    model = release.load_model(folder)
    tokenizer = release.load_tokenizer(args.tokenizer or folder)
    text = Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    nats = model(ids, labels=ids).loss.item()
    print(f"{folder}: {model.num_parameters():,} weights; {nats:.3f} nats per token of {args.text}")
    means = node_means(model, ids, locations=[*model.node_widths(), "final_resid"])
    if args.folder is None:
        task, few = get_task("single_double_quote"), PruneConfig(n_steps=4, clean_up=0)
        found = prune(model, task, few, tokenizer=tokenizer, means=means, force=True)
        replay = release.Replay(circuit=found.resized(20), batch=task.batch(tokenizer, "train"))
        args.circuit = folder / "viz_data.pt"
        release.save_circuit(replay, model, args.circuit)
    if args.circuit:
        replay = release.load_circuit(args.circuit, model, tokenizer, args.targets, means=means)
        print(replay.circuit)
        print(f"replayed: {replay.loss(model):.4f} nats per prompt; stored: {replay.stored:.4f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
