"""Every path of the library keeps to the device that it is given, and gives the CPU's numbers.

On a machine without a GPU the device is one of torch's own making (helpers/other_device.py): it
computes with the CPU and refuses the CPU's tensors. On one with a GPU it is CUDA.
"""

import json

import pytest

from tests.helpers.processes import run_helper, run_python

PATHS = ["twin", "dense", "steps", "cotraining", "pretraining", "sites", "pruning", "mapping"]
SLOW = ["evaluation", "transfer"]
# CUDA adds in another order, which may move a weight over the threshold of a projection
TOLERANCE = {"other": 1e-4, "cuda": 1e-2}


def check(device: str, path: str, tolerance: float | None = None) -> dict:
    """Run a path on the CPU and on `device`; fail where their numbers differ; return all it said"""
    said = json.loads(run_helper("device_paths", device, path).splitlines()[-1])
    want, got, tolerance = said["cpu"], said[device], tolerance or TOLERANCE[device]
    assert want and want.keys() == got.keys()
    differ = {
        name: (x, got[name])
        for name, x in want.items()
        if abs(x - got[name]) > tolerance * max(1.0, abs(x))
    }
    assert not differ, differ
    return said


@pytest.mark.parametrize("path", [*PATHS, *(pytest.param(p, marks=pytest.mark.slow) for p in SLOW)])
def test_every_path_keeps_to_one_device_and_gives_the_numbers_of_the_cpu(path):
    check("other", path)


def test_in_a_cotraining_step_only_transformers_waits_for_the_device():
    """GPT-2's mask asks whether texts are packed: once for each of the dense model's passes."""
    assert check("other", "steps")["waits"] == {"aten._local_scalar_dense.default": 4}


MIXED = """
import torch
from tests.helpers.other_device import OtherDevice
with OtherDevice() as device:
    there, here = torch.ones(2, 3, device="other"), torch.ones(3)
    for mix in (lambda: there + here, lambda: there @ here, lambda: torch.cat([there[0], here]),
                lambda: here[there[0].long()], there.numpy):
        try:
            mix()
        except RuntimeError as error:
            print(type(error).__name__)
    assert not device.waits, device.waits
    assert (there + torch.tensor(1.0)).sum().item() == 12 and (there.cpu() + here).sum() == 12
    there[:, torch.tensor([0])], here.to("other"), here.to("other", non_blocking=True)
    print(sum(device.waits.values()))
"""


def test_the_other_device_refuses_what_cuda_refuses_and_counts_what_waits():
    """The control of the tests above."""
    *errors, waits = run_python("-c", MIXED).split()
    assert errors == ["RuntimeError"] * 5 and waits == "4", (errors, waits)


@pytest.mark.gpu
@pytest.mark.parametrize("path", [*PATHS, *SLOW])
def test_on_a_gpu_every_path_gives_the_numbers_of_the_cpu(path):
    check("cuda", path)


@pytest.mark.gpu
def test_on_a_gpu_cotraining_in_bfloat16_gives_about_the_numbers_of_the_cpu():
    check("cuda", "cotraining_bf16", tolerance=0.1)
