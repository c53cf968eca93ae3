"""What reading and resuming a dense model costs beside its plain forward.

    python benchmarks/dense_residuals.py --repeats 7
    python benchmarks/dense_residuals.py --repeats 7 --layers 4 --width 256 --batch 4 --pos 64

GPT-2-small shape (random weights), one thread, float32, no gradient; times are CPU seconds, which
a busy machine does not stretch as it does the clock. Every repetition runs all ways one after the
other; a figure is the median of the repetitions' ratios, with quartiles.

    read       (residuals_and_logits)             / plain forward          ideal 1
    read+tail  (residuals, resume at the last)    / plain forward          ideal 1
    resume k   (resume before block k)            / its share of the plain forward, ideal 1
    joined     (a row of its own at every site)   / the same rows resumed one by one to the end

The baseline is `model(ids).logits`. The share of a resume is that of the blocks left to run plus
the time of the final norm and head, which is measured as resume at the last site.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timing import seconds
from transformers import GPT2Config, GPT2LMHeadModel

from dense import DenseModel


def quartiles(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f}  ({low:.3f} .. {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("layers", 12), ("width", 768), ("batch", 2), ("pos", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=7, help="at least 2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = args.width // 64
    config = GPT2Config(n_layer=args.layers, n_embd=args.width, n_head=heads)
    dense = DenseModel(GPT2LMHeadModel(config))
    ids = torch.randint(0, config.vocab_size, (args.batch, args.pos))
    last = dense.n_sites - 1
    with torch.no_grad():
        h = dense.residuals(ids)
        rows = {s: x[:1] for s, x in enumerate(h)}
        own = dict.fromkeys(rows, ids[:1])
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda: dense.model(input_ids=ids, use_cache=False).logits,
            "read": lambda: dense.residuals_and_logits(ids),
            "read+tail": lambda: dense.resume(last, dense.residuals(ids)[-1], ids),
            "tail": lambda: dense.resume(last, h[-1], ids),
            "joined": lambda: dense.joined(rows, own),
            "apart": lambda: [dense.joined({s: x}, {s: ids[:1]}) for s, x in rows.items()],
        }
        for k in (0, args.layers // 2, args.layers - 1):
            ways[f"resume {k}"] = lambda k=k: dense.resume(2 * k, h[2 * k], ids)
        seen: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats + 1):
            for name, run in ways.items():
                seen[name].append(seconds(run))
    times = {name: ts[1:] for name, ts in seen.items()}  # the first warms up
    print(f"{dense.n_layers} x {args.width}, batch {args.batch} x {args.pos}, {args.repeats} times")
    print(f"plain      {statistics.median(times['plain']):.3f} s")
    against = {"read": times["plain"], "read+tail": times["plain"], "joined": times["apart"]}
    for name in times:
        if name.startswith("resume"):
            left = 1 - int(name.split()[1]) / args.layers
            pairs = zip(times["plain"], times["tail"], strict=True)
            against[name] = [tail + left * (plain - tail) for plain, tail in pairs]
    for name, base in against.items():
        ratios = [a / b for a, b in zip(times[name], base, strict=True)]
        print(f"{name:10s} {quartiles(ratios)}")


if __name__ == "__main__":
    main()
