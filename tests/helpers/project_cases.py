"""Matrices on which a projection goes wrong, and the kernels' answers beside the definition's.

As a script, in a process of its own because triton reads TRITON_INTERPRET when it is imported:

    TRITON_INTERPRET=1 python -m tests.helpers.project_cases MODE

with a MODE of

    interpreter     the kernels on a CPU
    cuda            project_ on a GPU
    sm_90           compile for a GPU that is not here

prints one JSON object.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

AS_INT = {4: torch.int32, 2: torch.int16, 8: torch.int64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrices(rows: int, cols: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every one hard in its own way; all finite."""
    rng = torch.Generator().manual_seed(rows)
    plain = torch.randn(rows, cols, generator=rng)
    by_row, by_col = torch.randn(rows, 1, generator=rng), torch.randn(1, cols, generator=rng)
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    yield "plain", plain.to(dtype)
    yield "uneven", (plain * by_row.exp() ** 2 * by_col.exp() ** 2).to(dtype)
    yield "one row", torch.where(torch.arange(rows)[:, None] == 3, plain, plain / 1e3).to(dtype)
    yield "one column", torch.where(torch.arange(cols) == 3, plain, plain / 1e3).to(dtype)
    yield "tied", (plain * 2).round().to(dtype) / 2
    yield "tied in rows", by_row.expand(rows, cols).to(dtype).contiguous()
    yield "equal", -torch.ones(rows, cols, dtype=dtype)
    yield "zeros of both signs", torch.zeros(rows, cols, dtype=dtype).copysign(plain)
    yield "mostly zero", torch.where(plain > 1.5, plain, -0.0).to(dtype)
    yield "denormal", plain.to(dtype) * tiny / 8
    yield "huge", (plain.sign() * largest / (1 + plain**2)).to(dtype)


def compare(project_: Callable, shapes, device: str, dtypes=DTYPES) -> dict:
    """Run every matrix through `project_`; name the cases that differ in a bit."""
    from sparse.ops.project import chosen_reference

    n, differ = 0, []
    for rows, cols in shapes:
        for dtype in dtypes:
            for name, weight in matrices(rows, cols, dtype):
                for dim, floor in ((0, 0), (0, 4), (1, 2)):
                    least, size = floor * weight.shape[dim], weight.numel()
                    for keep in {least, max(least, size // 8), size // 2}:
                        got = weight.clone().to(device)
                        project_(got, keep, floor, dim)
                        chosen = chosen_reference(weight, keep, floor, dim)
                        want = weight.masked_fill(~chosen, 0.0)
                        as_int = AS_INT[weight.element_size()]
                        n += 1
                        if not torch.equal(got.cpu().view(as_int), want.view(as_int)):
                            differ.append(f"{name} {dtype} {rows}x{cols} {dim=} {floor=} {keep=}")
    return {"cases": n, "differ": differ}


def compile_all() -> dict:
    """Compile every kernel for sm_90, without a GPU, and read what it takes."""
    from sparse.ops import project_cuda as k
    from tests.helpers.sm_90 import compile_for_sm_90

    digits = {"BINS": k.BINS, "BLOCK": k.BLOCK}
    jobs = [
        *(
            (k._protect, "A width floor", {"BLOCK": w}, max(w // 1024, 1))
            for w in (256, 1024, 16384)
        ),
        *(
            (k._count_digits, "A COUNTS STATE n", {"SHIFT": s, "BITS": b, **digits}, 4)
            for s, b in ((23, 8), (0, 7))
        ),
        (k._next_digit, "COUNTS STATE", {"BITS": 8, "BINS": k.BINS}, 1),
        (k._count_ties, "A TIES STATE n", {"BLOCK": k.BLOCK}, 4),
        (k._apply, "W A TIES STATE n", {"BLOCK": k.BLOCK}, 4),
    ]
    kernels = []
    for kernel, arguments, constants, warps in jobs:
        signature = {a: "*i32" if a.isupper() else "i32" for a in arguments.split()}
        taken = compile_for_sm_90(kernel, signature, constants, warps)
        kernels.append({"kernel": kernel.__name__, **constants, "warps": warps} | taken)
    return {"kernels": kernels}


def main(mode: str) -> dict:
    if mode == "sm_90":
        return compile_all()
    if mode == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("set TRITON_INTERPRET=1, or the kernels would ask for a GPU")
        from sparse.ops import project_cuda as kernels_project

        kernels_project.BLOCK = 64  # so that a small matrix takes several programs
        dtypes = (torch.float32, torch.bfloat16)
        return compare(kernels_project.project_, [(6, 13)], "cpu", dtypes)
    from sparse.ops.project import project_

    return compare(project_, [(9, 13), (130, 256), (1000, 333)], "cuda")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])))
