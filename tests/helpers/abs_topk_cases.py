"""Vectors on which a selection goes wrong, and AbsTopK in plain Python to compare with.

As a script, in a process of its own because triton reads TRITON_INTERPRET when it is imported:

    TRITON_INTERPRET=1 python -m tests.helpers.abs_topk_cases MODE

with a MODE of

    interpreter     the kernels on a CPU
    cuda            abs_topk on a GPU
    sm_90           compile for a GPU that is not here

prints one JSON object.
"""

import json
import math
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

ALL_BITS = {4: torch.int32, 2: torch.int16, 8: torch.int64}


def vectors(dtype: torch.dtype, d: int) -> dict[str, Tensor]:
    """Rows of every difficult kind, (2, d) each, signs mixed."""
    rng, n = torch.Generator().manual_seed(d), 2
    normal = torch.randn(n, d, generator=rng, dtype=torch.float64)
    sign = torch.where(torch.rand(n, d, generator=rng) < 0.5, -1.0, 1.0)
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    few = (torch.rand(n, d, generator=rng) < 0.1).double()
    kinds = {
        "normal": normal,
        "gelu": torch.nn.functional.gelu(normal),
        "tied": (normal * 2).round() / 2,
        "equal": sign * 0.7,
        "zero": sign * 0.0,
        "sparse": normal * few,
        "sparse and tied": sign * few,
        "denormal": normal * tiny / 8,
        "huge": sign * largest * torch.rand(n, d, generator=rng),
        "infinite": torch.where(few > 0, sign * math.inf, normal),
        "not a number": torch.where(few > 0, math.nan, normal).copysign(sign),
        "ascending": torch.arange(n * d, dtype=torch.float64).view(n, d) - d,
    }
    return {name: x.to(dtype) for name, x in kinds.items()}


def kept_by_hand(x: Tensor, k: int) -> Tensor:
    """Mark the first k by (NaN first, |x| descending, index ascending), by sorting lists."""
    kept = torch.zeros(x.shape, dtype=torch.bool)
    for marks, row in zip(kept, x.double().tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), -abs(row[i]), i))
        marks[order[:k]] = True
    return kept


def zero_unless(marks: Tensor, x: Tensor) -> Tensor:
    """x where marked, else +0."""
    return torch.where(marks, x, torch.zeros_like(x))


def gradient_by_hand(x: Tensor, k: int, dy: Tensor) -> Tensor:
    """dy at the kept entries; all of dy where fewer than k entries of x are nonzero."""
    fewer = torch.tensor([[sum(v != 0 for v in row) < k] for row in x.tolist()])
    return zero_unless(kept_by_hand(x, k) | fewer, dy)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 and knows NaN."""
    as_int = ALL_BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


def cases(dtypes, widths) -> Iterator[tuple[str, Tensor, int]]:
    """Every kind in every dtype and width, with k at both ends and a quarter."""
    for dtype in dtypes:
        for d in widths:
            for name, x in vectors(dtype, d).items():
                for k in sorted({1, max(1, d // 4), d - 1}):
                    yield f"{name} {dtype} d={d} k={k}", x, k


def wrong(forward, backward, dtypes, widths, device="cpu") -> tuple[int, list[str]]:
    """How many cases there are, and which differ from the lists in one bit or more."""
    n, differ = 0, []
    for name, x, k in cases(dtypes, widths):
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        y = forward(x.to(device), k)
        dx = backward(dy.to(device), y, k)
        n += 1
        if not same_bits(y.cpu(), zero_unless(kept_by_hand(x, k), x)):
            differ.append(f"forward {name}")
        if not same_bits(dx.cpu(), gradient_by_hand(x, k, dy)):
            differ.append(f"backward {name}")
    return n, differ


def run(device: str) -> dict:
    """Compare the kernels with the lists, and on strided rows, on `device`."""
    from sparse.ops import abs_topk_cuda as kernels

    dtypes = (torch.float32, torch.bfloat16)
    widths = (33,) if device == "cpu" else (2, 33, 64, 1000, 4096, kernels.MAX_WIDTH)
    n, differ = wrong(kernels.forward, kernels.backward, dtypes, widths, device)
    wide = torch.randn(3, 2, 12, device=device)
    strided = {
        "float16": wide.half(),
        "thirds": wide.chunk(3, dim=-1)[1],
        "transposed": wide.transpose(0, 2),
        "expanded": wide[:1, :1].expand(2, 3, 12),
        "empty": wide[:0],
        "one vector": wide[0, 0],
    }
    for name, x in strided.items():
        rows = x.contiguous()
        if not same_bits(kernels.forward(x, 2), kernels.forward(rows, 2)):
            differ.append(f"forward {name}")
        if not same_bits(kernels.backward(x, rows, 2), kernels.backward(rows, rows, 2)):
            differ.append(f"backward {name}")
    payload = torch.tensor([[-1, 5, 0x7F800001, 0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    kept = kernels.forward(payload.to(device), 2).cpu().view(torch.int32).tolist()
    if kept != [[-1, 0, 0, 0x7FFFFFFF]]:
        differ.append(f"NaNs with all bits set: {kept}")
    return {"cases": n, "differ": differ}


def through_autograd() -> dict:
    """Compare abs_topk on a GPU, whichever path it takes, with the lists."""
    from sparse.ops.abs_topk import abs_topk

    def backward(dy, y, k):
        return torch.ops.sparse_bridges.abs_topk_backward(dy, y, k)

    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    n, differ = wrong(abs_topk, backward, dtypes, (33, 1000), "cuda")
    return {"cases": n, "differ": differ}


def compiled(name: str, kernel, pointers: str, x: Tensor) -> dict:
    """Compile a kernel for sm_90, without a GPU, and read what it takes from the machine code."""
    from sparse.ops.abs_topk_cuda import launch_options
    from tests.helpers.sm_90 import compile_for_sm_90

    options = launch_options(x)
    warps = options.pop("num_warps")
    kind = "*i32" if x.dtype == torch.float32 else "*i16"
    signature = {p: kind for p in pointers.split()}
    signature |= {"stride": "i32"} if name == "forward" else {}
    signature |= {"d": "i32", "k": "i32"}
    taken = compile_for_sm_90(kernel, signature, options, warps)
    return {"kernel": name, "dtype": str(x.dtype), "d": x.shape[-1], "warps": warps} | taken


def compile_all(widths=(256, 1024, 4096, 16384)) -> dict:
    """Compile both kernels at the usual widths."""
    from sparse.ops import abs_topk_cuda as kernels

    pairs = {"forward": (kernels._forward, "X Y"), "backward": (kernels._backward, "DY Y DX")}
    return {
        "kernels": [
            compiled(name, kernel, pointers, torch.empty(1, d, dtype=dtype))
            for name, (kernel, pointers) in pairs.items()
            for dtype in (torch.float32, torch.bfloat16)
            for d in widths
        ]
    }


if __name__ == "__main__":
    mode = sys.argv[1]
    if mode == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1, or the kernels would ask for a GPU")
    result = (
        compile_all()
        if mode == "sm_90"
        else run("cpu")
        if mode == "interpreter"
        else run("cuda") | {"autograd": through_autograd()}
    )
    sys.stdout.write(json.dumps(result))
