"""The words that contexts are made of, and how they are dealt out to the splits.

Splits share no words: every list is dealt out in turn, of every five entries three to train, one to
validation and one to test, and no word is in two lists.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES = """name path mode title label prefix suffix color kind style author version status domain
host user group format encoding header footer message command target source method action event
state level theme locale region country city street owner client server driver engine backend
device channel topic queue folder module package branch""".split()
WORDS = """red green blue small large open closed left right north south east west hello world
apple banana cherry orange lemon paper stone water fire earth wind summer winter spring autumn
monday friday sunday january march april silver gold copper iron wood glass music dance night
morning table chair window garden river mountain forest island ocean desert valley bridge castle
""".split()
FUNCTIONS = """run start stop load save read write check update reset open_file close_all find
search parse build make_list clean sort_items merge split_text join_parts count_lines filter_rows
send receive connect wait_for is_ready has_next can_write validate""".split()
VARIABLES = """data value result items count index total line text buffer block chunk token node
parent child left_side key entry record field row column offset length position current previous
pending done found""".split()
LISTS = """values numbers sizes points scores weights widths heights limits ranges bounds steps
ports codes rows_seen cells pairs_used shape grid matrix table_rows counts offsets levels ages
times prices totals marks ids""".split()


def deal(entries: Sequence[str], split: int) -> list[str]:
    """Return the entries of a split: of every five, three for split 0, one for 1 and one for 2."""
    return [entry for i, entry in enumerate(entries) if max(i % 5 - 2, 0) == split]


def _meetings(first: list[str], second: list[str], n: int) -> list[tuple[str, str]]:
    """Return n distinct couples of an entry of `first` and one of `second`.

    Every entry is in about equally many couples.
    """
    every = [
        (a, second[(i + j) % len(second)]) for j in range(len(second)) for i, a in enumerate(first)
    ]
    return every[:n]
