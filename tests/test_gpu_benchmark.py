"""`benchmarks/gpu.py` in toy shapes on a CPU: every line of it but the clock of CUDA."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
KERNELS = ["projection", "attention", "losses"]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """`measured(parts, **changed)`: exit status, JSON and table, with other values of globals."""

    def run(parts, **changed):
        script = runpy.run_path(str(SCRIPT))
        script["main"].__globals__.update(changed)
        words = ["gpu.py", "--device", "cpu", "--small", "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*words, "--parts", *parts])
        status = script["main"]()
        text = (tmp_path / "gpu.json").read_text()
        return status, json.loads(text), (tmp_path / "gpu.md").read_text()

    return run


def check(said: dict, table: str) -> None:
    assert said["ceilings"]["bytes_per_second"] > 1e6 and not said["failed"]
    for row in said["rows"]:
        assert row["reference"] and row["floor"] and row["case"] in table
        for of in ("ms", "reference_ms", "floor_ms", "to_reference", "to_floor"):
            assert 0 < row[of] < float("inf"), row


def test_kernels_agree_with_a_reference_and_steps_stand_beside_a_dense_one_and_the_plan(measured):
    status, said, table = measured([*KERNELS, "gpt2-12gb"])
    assert status == 0
    check(said, table)
    *kernels, step = said["rows"]
    assert len({row["part"] for row in kernels}) == len(KERNELS)
    assert all(row["apart"] < 0.05 for row in kernels)
    assert step["tokens_per_second"] > 0 and step["peak"] > 0 and step["planned"] > 0
    assert "GPT-2" in step["reference"]


def test_what_fails_takes_too_long_or_is_off_is_told_and_the_others_go_on(measured):
    parts = {"ceilings": 60, "nonsense": 60, "gpt2-12gb": 1, "attention": 60, "projection": 60}
    status, said, table = measured([*parts][1:], PARTS=parts, OFF=1e-9)
    assert status == 1 and set(said["failed"]) == {"nonsense", "gpt2-12gb", "attention"}
    assert "KeyError: 'nonsense'" in said["failed"]["nonsense"] and "KeyError" in table
    assert "1 seconds were over" in said["failed"]["gpt2-12gb"]
    assert "off" in said["failed"]["attention"]
    assert {row["part"] for row in said["rows"]} == {"attention with sinks", "projection"}


@pytest.mark.slow
def test_every_part_runs(measured):
    script = runpy.run_path(str(SCRIPT))
    status, said, table = measured([*script["PARTS"]])
    assert status == 0
    check(said, table)
