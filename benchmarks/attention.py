"""Causal attention with sinks on the flash kernel, against a mask with an extra column.

    OMP_NUM_THREADS=1 python benchmarks/attention.py --repeats 7

The plain form is scaled_dot_product_attention with one more key and value of zeros and a T x (T+1)
mask: -inf above the diagonal, the sink's logit in the extra column. The mask needs a gradient, so
no flash kernel takes it. Forward and backward, batch 1, one thread. Each ratio is the median
(quartiles) over repetitions in which the two take turns, in processor time. Memory is the growth of
the peak resident size over the inputs', each form in a process of its own.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import quartiles

from sparse.ops.attention_sink import flash_sink

SIZES = [(128, 64, 16), (512, 64, 16), (1024, 16, 64), (2048, 16, 16)]  # T, heads, d_head


def plain(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, scale: float) -> Tensor:
    """The usual way to write it."""
    batch, n_head, n, _ = q.shape
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    causal = torch.zeros(n, n, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    column = sink.view(1, -1, 1, 1).expand(batch, n_head, n, 1).to(q.dtype)
    mask = torch.cat([causal.expand(batch, n_head, n, n), column], dim=-1)
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


FORMS = {"plain": plain, "flash": flash_sink}


def inputs(size: tuple[int, int, int]) -> list[Tensor]:
    n, n_head, d_head = size
    torch.manual_seed(0)
    qkv = [torch.randn(1, n, n_head, d_head).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_() for x in (*qkv, torch.randn(n_head))]


def step(form: str, x: list[Tensor]) -> list[Tensor]:
    y = FORMS[form](*x, x[0].shape[-1] ** -0.5)
    return [y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))]


def peak() -> float:
    """Peak resident size in MiB (getrusage would count the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory_of(form: str, size: tuple[int, int, int]) -> float:
    """MiB, measured in a process of its own."""
    words = [sys.executable, __file__, "--memory-of", form, *map(str, size)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def measure(size: tuple[int, int, int], repeats: int) -> None:
    x = inputs(size)
    taken = {form: [] for form in FORMS}
    results = {}
    for repeat in range(repeats + 1):
        for form, times in taken.items():
            start = time.process_time()
            results[form] = step(form, x)
            if repeat:
                times.append(time.process_time() - start)
    apart = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(results["flash"], results["plain"], strict=True)
    )
    ratio = quartiles([a / b for a, b in zip(taken["plain"], taken["flash"], strict=True)])
    memory = {form: memory_of(form, size) for form in FORMS}
    n, n_head, d_head = size
    print(
        f"T={n:5} heads={n_head:3} d_head={d_head:3}  time {ratio:18} peak memory "
        f"{memory['plain']:6.0f} against {memory['flash']:4.0f} MiB  relative error {apart:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", nargs=4, metavar=("FORM", "T", "HEADS", "D_HEAD"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        form, *size = options.memory_of
        step(form, inputs((8, 2, 8)))
        x = inputs(tuple(map(int, size)))
        before = peak()
        step(form, x)
        print(peak() - before)
        return
    print("time of the mask with an extra column / time of flash_sink, median (quartiles)")
    for size in SIZES:
        measure(size, options.repeats)


if __name__ == "__main__":
    main()
