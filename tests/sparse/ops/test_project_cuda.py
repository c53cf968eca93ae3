"""The projection's Triton kernels, in processes of their own: see test_abs_topk_cuda.py."""

import json
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.processes import run_helper

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


def run(mode, **environment):
    return json.loads(run_helper("project_cases", mode, **environment))


@needs_triton
def test_in_the_interpreter_the_kernels_project_as_the_definition_bit_for_bit():
    result = run("interpreter", TRITON_INTERPRET="1")
    assert result["cases"] > 100 and not result["differ"], result["differ"]


@needs_triton
def test_compiled_for_an_h100_the_kernels_spill_no_register():
    kernels = run("sm_90", TRITON_INTERPRET="0")["kernels"]
    assert len({k["kernel"] for k in kernels}) == 5
    for kernel in kernels:
        assert kernel["REG"] > 0 and kernel["STACK"] == kernel["LOCAL"] == 0, kernel


@needs_triton
def test_the_matrices_that_fit_are_stated():
    from sparse.ops.project_cuda import MAX_WIDTH, fits

    assert fits(torch.empty(2, MAX_WIDTH), 4, 0) and fits(torch.empty(2, MAX_WIDTH + 1), 0, 0)
    assert not fits(torch.empty(2, MAX_WIDTH + 1), 4, 0)
    assert fits(torch.empty(2, MAX_WIDTH + 1, dtype=torch.bfloat16), 1, 1)
    assert not fits(torch.empty(MAX_WIDTH + 1, 2), 4, 1)
    assert not fits(torch.empty(2, 2, dtype=torch.float64), 0, 0)
    assert not fits(torch.empty(2, 4)[:, ::2], 0, 0)


@pytest.mark.gpu
def test_on_a_gpu_matrices_are_projected_as_by_the_definition_bit_for_bit():
    result = run("cuda", TRITON_INTERPRET="0")
    assert result["cases"] > 400 and not result["differ"], result["differ"]


@pytest.mark.gpu
def test_on_a_gpu_the_projection_never_waits_for_the_device():
    from sparse.ops.project import project_

    weights = [torch.randn(300, 256, device="cuda") for _ in range(2)]
    project_(weights[0].clone(), 2000, 4, 1)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for floor, dim in ((0, 0), (4, 0), (4, 1)):
            project_(weights[0], 2000 - floor, floor, dim)
        with pytest.raises(RuntimeError):  # the control
            weights[1].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
