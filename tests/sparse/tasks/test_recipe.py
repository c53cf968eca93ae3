from dataclasses import replace
from random import Random

import pytest

from sparse.tasks.own import SPLITS
from sparse.tasks.recipe import BARE, PerSplit, Recipe, _framed, _Words, make, slots_of
from sparse.tasks.words import NUMERIC, POOLS, deal

PLAIN = Recipe(
    meaning="m",
    differs={"q": ("<", ">")},
    targets=(("$v", "$v2"), ("a", "b")),
    settings=PerSplit(("$form", "def $f:\n    $form"), ("if $v9:\n  $form",), ("$form",)),
    forms=PerSplit(("$q $v $v2",), ("$q$q $v $v2",), ("$q $v\n$v2 $n",)),
)


def test_a_pair_is_its_form_in_its_setting_and_differs_only_where_it_says():
    task = make("t", PLAIN)
    for p in task.train:
        assert p.context_2 == p.context_1.replace("<", ">") and "$" not in p.context_1
        assert p.target_1 == p.groups["v"] and p.target_2 == p.groups["v2"]
        assert p.groups["v"] != p.groups["v2"]
    inside = [p for p in task.train if p.context_1.startswith("def ")]
    assert abs(len(inside) - len(task.train) / 2) <= 4
    assert inside[0].groups["frame"] == "def $f:\n    $q $v $v2"
    assert inside[0].groups["form"] == "$q $v $v2"
    assert "n" not in task.test[0].groups and "f" not in inside[0].groups
    assert task.alternatives == (("a", "b"),)


def test_lines_of_a_form_are_indented_as_the_first():
    assert _framed("def f:\n    $form", "a\nb") == "def f:\n    a\n    b"
    assert _framed("# x. $form", "a\nb") == "# x. a\n b"
    assert slots_of("$a ${b2}_c $$5", "$a", None) == ["a", "b2"]


def test_the_same_recipe_gives_the_same_pairs_and_another_name_others():
    assert make("t", PLAIN) == make("t", PLAIN)
    assert make("t", PLAIN).train != make("u", PLAIN).train


def test_no_word_is_in_two_splits_or_two_lists():
    lists = {id(pool): pool for slot, (pool, _) in POOLS.items() if slot not in NUMERIC}
    words = [word for pool in lists.values() for entry in pool for word in entry]
    assert len(set(words)) == len(words)
    for pool in lists.values():
        dealt = [deal(pool, split) for split in range(3)]
        assert sorted(sum(dealt, [])) == sorted(pool) and min(map(len, dealt)) >= 4


def test_every_word_of_a_list_is_drawn_before_any_is_drawn_again():
    words = _Words(Random(0), split=0)
    pool = deal(POOLS["v"][0], 0)
    drawn = [words.draw(["v"])["v"] for _ in range(2 * len(pool))]
    assert sorted(drawn[: len(pool)]) == sorted(drawn[len(pool) :]) == sorted(w for (w,) in pool)
    together = words.draw(["v", "v2", "v3", "noun", "nouns", "land", "city2", "land2"])
    assert len({together[s] for s in ("v", "v2", "v3")}) == 3
    assert together["nouns"] == together["noun"] + "s"
    capitals = dict(POOLS["land"][0])
    assert capitals[together["land2"]] == together["city2"] != capitals[together["land"]]


def test_a_recipe_with_a_slot_that_no_list_fills_is_refused():
    bad = Recipe(
        meaning="m", targets=(("a", "b"),), forms=PerSplit(("$colour",), ("x $v",), ("y $v",))
    )
    with pytest.raises(ValueError, match=r"no list of words is called 'colour'; there are"):
        make("t", bad)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"forms": PerSplit("a $v", ("b",), ("c",))}, "every split needs a tuple of templates"),
        ({"forms": PerSplit(("a",), (), ("c",))}, "every split needs a tuple of templates"),
        ({"forms": PerSplit(("$v",), ("$v",), ("c",)), "settings": BARE}, "in several splits"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_at_once(change, says):
    with pytest.raises(ValueError, match=says):
        replace(PLAIN, **change)


def test_a_recipe_without_words_gives_each_pair_once():
    few = Recipe(
        meaning="m",
        differs={"q": ("a", "b")},
        targets=(("x", "y"),),
        forms=PerSplit(("1 $q", "2 $q"), ("3 $q",), ("4 $q",)),
    )
    task = make("t", few)
    assert [len(task.pairs(s)) for s in SPLITS] == [2, 1, 1]
