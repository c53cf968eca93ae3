"""The Triton kernels, in processes of their own: triton decides on import how it runs."""

import json
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.processes import run_helper

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


def run(mode, **environment):
    return json.loads(run_helper("abs_topk_cases", mode, **environment))


@needs_triton
def test_in_the_interpreter_the_kernels_give_the_bits_of_sorted_lists():
    result = run("interpreter", TRITON_INTERPRET="1")
    assert result["cases"] > 50 and not result["differ"], result["differ"]


@needs_triton
def test_compiled_for_an_h100_the_kernels_spill_no_register():
    kernels = run("sm_90", TRITON_INTERPRET="0")["kernels"]
    assert {k["kernel"] for k in kernels} == {"forward", "backward"}
    for kernel in kernels:
        assert kernel["REG"] > 0 and kernel["STACK"] == kernel["LOCAL"] == 0, kernel


@needs_triton
def test_the_widths_and_dtypes_that_fit_are_stated():
    from sparse.ops.abs_topk_cuda import MAX_WIDTH, fits

    assert fits(torch.empty(1, MAX_WIDTH)) and fits(torch.empty(1, 3, dtype=torch.bfloat16))
    assert not fits(torch.empty(1, MAX_WIDTH + 1))
    assert not fits(torch.empty(1, 3, dtype=torch.float64))


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_the_kernels_give_the_bits_of_sorted_lists():
    result = run("cuda", TRITON_INTERPRET="0")
    for part in (result, result["autograd"]):
        assert part["cases"] > 100 and not part["differ"], part["differ"]
