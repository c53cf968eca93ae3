import json

import pytest

from sparse.tasks.own import SPLITS, deal_out, read_jsonl, read_pairs
from sparse.tasks.pair import Pair
from sparse.tasks.suite import get_task
from sparse.tasks.task import Task


def row(i: int, **more) -> dict:
    return {"context_1": f"a{i}", "context_2": f"b{i}", "target_1": "x", "target_2": "y"} | more


def test_a_file_of_pairs_is_read_and_split_by_its_own_word_or_in_turn(tmp_path):
    rows = [row(i) for i in range(10)]
    rows += [row(0) | {"context_1": "p", "context_2": "q", "split": "test"}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    task = Task.from_jsonl(path)
    assert task.name == "mine" and task.family == "mine"
    assert [len(task.pairs(s)) for s in SPLITS] == [6, 2, 3]
    firsts = {p.context_1 for s in SPLITS for p in task.pairs(s)}
    assert firsts == {"p", *(f"a{i}" for i in range(10))}
    assert get_task(path) == task and get_task(f"{path}:nonsense") == task.nonsense()
    assert get_task(f"{path}:distractors:nonsense").name == "mine:distractors:nonsense"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ('{"context_1": "a"}', r"line 2: .'context_2', 'target_1', 'target_2'. missing"),
        ('{"context_1": "a", "context_2": "b", "target_1": 3, "target_2": "y"}', "target_1 is 3"),
        ('{"context": "a"}', "line 2: unknown keys .'context'"),
        ('{"split": "dev"}', "line 2: split 'dev' must be one of"),
        (json.dumps(row(1, groups="f")), "line 2: groups is 'f'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + line)
    with pytest.raises(ValueError, match=says):
        Task.from_jsonl(path)


def test_a_file_that_is_missing_empty_or_without_train_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl is not there"):
        get_task(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert read_jsonl(empty) == []
    with pytest.raises(ValueError, match="no train pair in it; give at least 8"):
        Task.from_jsonl(empty)
    empty.write_text(json.dumps(row(0, split="test")))
    with pytest.raises(ValueError, match="no train pair"):
        Task.from_jsonl(empty)


def test_pairs_in_python_may_be_tuples_dicts_or_pairs():
    pair = Pair(context_1="a", context_2="b", target_1="x", target_2=None)
    found = read_pairs([("a", "b", "x", None), {**row(0), "split": "test"}, pair])
    assert found[0] == (pair, None) and found[2] == (pair, None) and found[1][1] == "test"
    task = Task.from_pairs("mine", [(f"a{i}", f"b{i}", "x", "y") for i in range(5)], meaning="m")
    assert (len(task.train), len(task.validation), len(task.test)) == (3, 1, 1)
    assert task.meaning == "m"
    with pytest.raises(ValueError, match=r"pair 2: \('a', 'b'\) is no pair; give \(context_1"):
        read_pairs([("a", "b", "x", "y"), ("a", "b")])
    with pytest.raises(ValueError, match="pair 1: context_2 is 3"):
        read_pairs([("a", 3, "x", "y")])


def test_split_by_deals_out_levels_so_that_none_is_in_two_splits():
    rows = [row(i, groups={"frame": f"f{i % 11}"}) for i in range(44)]
    task = Task.from_pairs("mine", rows, split_by="frame")
    seen = [{p.groups["frame"] for p in task.pairs(s)} for s in SPLITS]
    assert [len(levels) for levels in seen] == [7, 2, 2]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    plain = Task.from_pairs("mine", rows)  # control: in turn, frames straddle splits
    assert {p.groups["frame"] for p in plain.train} & {p.groups["frame"] for p in plain.test}
    with pytest.raises(ValueError, match="split_by='frame': 1 of 45 pairs have no such group"):
        Task.from_pairs("mine", [*rows, row(99)], split_by="frame")


def test_pairs_made_by_nested_loops_are_mixed_over_the_splits():
    """Dealt out in turn as they stand, every fifth would have one and the same inner word."""
    rows = [row(5 * i + j, groups={"word": f"w{j}"}) for i in range(20) for j in range(5)]
    task = Task.from_pairs("mine", rows)
    assert [len(task.pairs(s)) for s in SPLITS] == [60, 20, 20]
    assert all(task.levels(s)["word"] == 5 for s in SPLITS)
    assert Task.from_pairs("mine", rows) == task


def test_split_by_needs_levels_enough_and_a_name():
    rows = [row(i, groups={"frame": f"f{i % 4}"}) for i in range(20)]
    with pytest.raises(ValueError, match="split_by='frame': 4 levels cannot fill three splits"):
        Task.from_pairs("mine", rows, split_by="frame")


def test_line_separators_inside_a_json_string_do_not_end_the_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row(1) | {"context_1": "a\u2028b"}, ensure_ascii=False) + "\r\n")
    assert Task.from_jsonl(path).train[0].context_1 == "a\u2028b"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1: not JSON"):
        Task.from_jsonl(path)


def test_a_file_may_not_be_called_like_a_built_in_task(tmp_path):
    path = tmp_path / "for_while.jsonl"
    path.write_text(json.dumps(row(1)))
    with pytest.raises(ValueError, match="called like the built-in task.*rename"):
        get_task(path)
    inside = tmp_path / "x.jsonl.d"
    inside.mkdir()
    (inside / "mine.jsonl").write_text(json.dumps(row(1)))
    assert get_task(inside / "mine.jsonl").name == "mine"


def test_a_split_of_its_own_is_kept_beside_dealt_ones():
    pairs = read_pairs([row(i) for i in range(5)] + [row(9, split="train")])
    dealt = deal_out(pairs)
    assert [len(dealt[s]) for s in SPLITS] == [4, 1, 1]
    assert dealt["train"][-1].context_1 == "a9"


def test_a_pair_given_twice_and_a_file_of_other_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the pair \('a1', 'b1'\) is there twice"):
        Task.from_pairs("mine", [row(1), row(2), row(1)])
    swapped = {"context_1": "b1", "context_2": "a1", "target_1": "y", "target_2": "x"}
    with pytest.raises(ValueError, match="is there twice"):
        Task.from_pairs("mine", [row(1), swapped])
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"context_1": "\xff"}')
    with pytest.raises(ValueError, match="mine.jsonl: not UTF-8 text .*save it as UTF-8"):
        Task.from_jsonl(path)
    path.write_text(json.dumps(row(1)), encoding="utf-8-sig")
    assert Task.from_jsonl(path).train[0].context_1 == "a1"
