"""Floats as integers of the same order: |x| is compared by its bits without the sign."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

BITS = {  # float dtype: (integer view, mask that drops the sign), so that |x| orders as an integer
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF),
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
}
BLOCK = 1 << 17  # entries worked on at a time on a CPU: few enough to stay in its cache


def magnitude(x: Float[Tensor, "*batch d"]) -> Shaped[Tensor, "*batch d"]:
    """Return |x| as integers that have the order of the numbers."""
    as_int, drop_sign = BITS[x.dtype]
    return x.view(as_int) & drop_sign
