"""Train a weight-sparse GPT alone, in a plain loop: Adam, and after every step a projection.

    python examples/train_sparse.py --output_dir runs/sparse

Every matrix keeps exactly its budget of entries, which falls to --density over half the run. With
normalised gradients, decay, checkpoints and a dense model beside it: examples/train_bridge.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--output_dir", default="runs/sparse", help="Hugging Face folder to write")
    p.add_argument("--dataset", help="file, folder or dataset; default: Python's own sources")
    p.add_argument("--steps", type=int, default=1000, help="optimizer steps of 16 x 128 tokens")
    p.add_argument("--density", type=float, default=1 / 16, help="share of weights kept at the end")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()

    import torch
    from tqdm import trange

    from dense import tiny
    from sparse import Anneal, Batches, SparseGPT, SparseGPTConfig, load_corpus, pack, project_

    tokenizer = tiny().tokenizer
    blocks = pack(load_corpus(args.dataset).train, tokenizer, 128)
    batches = Batches(blocks, 16, args.seed)
    torch.manual_seed(args.seed)
    model = SparseGPT(SparseGPTConfig(vocab_size=len(tokenizer)))
    matrices = {
        name: p for name, p in model.named_parameters() if ".blocks." in name and p.ndim > 1
    }
    anneal = Anneal(target=args.density, start=0, end=max(1, args.steps // 2))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    for step in (bar := trange(args.steps, desc="sparse", mininterval=1)):
        optimizer.param_groups[0]["lr"] = 6e-3 * anneal.lr_scale(step) * (1 - step / args.steps)
        ids = batches.at(step)
        loss = model(ids, labels=ids).loss  # nats per token
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = anneal.keep(step + 1)
        for name, weight in matrices.items():
            columns = name.endswith(("out.weight", "proj.weight"))
            project_(weight.data, int(share * weight.numel()), floor=4, dim=int(columns))
        bar.set_postfix(nats_per_token=f"{loss.item():.3f}", kept=f"{share:.3f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"wrote {args.output_dir}; open it with SparseGPT.from_pretrained")


if __name__ == "__main__":
    main()
