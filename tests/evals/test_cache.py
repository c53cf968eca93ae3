"""Parts of a report are kept under everything that they depend on."""

from dataclasses import replace

import pytest
import torch

from bridges import BridgeSet
from evals.cache import bridges_mark, circuit_mark, forget, kept


def test_a_part_is_made_once_and_again_when_anything_is_another(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"n": len(made)}

    assert kept(tmp_path, {"a": 1}, make) == kept(tmp_path, {"a": 1}, make) == {"n": 1}
    assert kept(tmp_path, {"a": 2}, make) == {"n": 2}
    assert kept(None, {"a": 1}, make) == {"n": 3}  # without a folder nothing is kept


def test_a_broken_file_is_made_anew(tmp_path):
    kept(tmp_path, {}, lambda: {"n": 1})
    (file,) = tmp_path.iterdir()
    file.write_text('{"n": ')
    assert kept(tmp_path, {}, lambda: {"n": 2}) == {"n": 2}
    assert kept(tmp_path, {}, lambda: {"n": 3}) == {"n": 2}


def test_what_is_interrupted_keeps_what_was_finished(tmp_path):
    def stop():
        raise KeyboardInterrupt

    kept(tmp_path, {"part": 1}, lambda: {"n": 1})
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, {"part": 2}, stop)
    assert kept(tmp_path, {"part": 1}, stop) == {"n": 1}


def test_a_circuit_s_mark_sees_nodes_task_ranking_and_values(quotes, found, tiny):
    at = next(iter(quotes.ablation))
    moved = {**quotes.ablation, at: quotes.ablation[at] + 1e-3}
    ranked = {**quotes.ranking, at: quotes.ranking[at] + 1e-3}
    others = [
        replace(quotes, ablation=moved),
        replace(quotes, ranking=ranked),
        replace(quotes, task=found["else_elif"].task),
        quotes.random(tiny.sparse, 0),
    ]
    marks = {circuit_mark(c) for c in [quotes, *others]}
    assert len(marks) == 5 and circuit_mark(quotes) in marks


def test_the_mark_of_bridges_sees_one_weight(tiny):
    other = BridgeSet(tiny.bridges.config)
    other.load_state_dict(tiny.bridges.state_dict())
    assert bridges_mark(other) == bridges_mark(tiny.bridges)
    with torch.no_grad():
        other.decoders[0].weight[0, 0] += 1e-3
    assert bridges_mark(other) != bridges_mark(tiny.bridges)


def test_what_is_forgotten_is_made_anew_and_nothing_else_is_lost(tmp_path):
    kept(tmp_path, {}, lambda: {"n": 1})
    (tmp_path / "mine.txt").write_text("a note")
    forget(tmp_path)
    forget(tmp_path / "never made")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert kept(tmp_path, {}, lambda: {"n": 2}) == {"n": 2}
