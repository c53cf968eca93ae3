"""The comparison of two checkouts: "the same" only where every line is; its control bites."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from sparse import SparseGPT, SparseGPTConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "same_numbers.py"
NUMBERS = ["cotraining: loss 0x1.8p+1", "pruning: circuit/test 0x1.0p-3"]


@pytest.fixture
def compare(monkeypatch):
    """`compare(old, new)`: the exit status when the two sides compute these lines."""

    def compare(old: list[str], new: list[str]) -> int:
        script = runpy.run_path(str(SCRIPT))
        main, sides = script["main"], iter([old, new])
        monkeypatch.setitem(main.__globals__, "run", lambda checkout, change: next(sides))
        monkeypatch.setattr(sys, "argv", ["same_numbers.py", "OLD", "NEW"])
        return main()

    return compare


def test_equal_lines_are_the_same_and_are_counted(compare, capsys):
    assert compare(NUMBERS, list(NUMBERS)) == 0
    assert "the same: 2 lines of numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "new",
    [[NUMBERS[0], "pruning: circuit/test 0x1.0000000000001p-3"], NUMBERS[:1], NUMBERS[::-1]],
    ids=["another last bit", "a line less", "another order"],
)
def test_any_difference_is_shown_and_fails(compare, capsys, new):
    assert compare(NUMBERS, new) == 1
    said = capsys.readouterr().out
    assert "NOT the same" in said and "-pruning: circuit/test 0x1.0p-3" in said


def test_the_control_moves_one_weight_by_one_unit_in_the_last_place():
    model = SparseGPT(SparseGPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    runpy.run_path(str(SCRIPT))["spoil"](model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lm_head.weight"}
    gap = (model.lm_head.weight - before["lm_head.weight"]).abs()
    assert gap.count_nonzero() == 1 and 0 < gap.max() < 1e-6


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no checkout: sparse/__init__.py is missing"):
        runpy.run_path(str(SCRIPT))["run"](tmp_path, False)
