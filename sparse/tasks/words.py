"""The words that contexts are made of, and how they are dealt out to the splits.

Splits share no words: every list is dealt out in turn, of every five entries three to train, one to
validation and one to test, and no word is in two lists. Digits, of which there are ten, are the
exception (NUMERIC).
"""

from __future__ import annotations

Pool = tuple[tuple[str, ...], ...]
"""Entries of one word, or of several that belong together, such as a country and its capital."""


def _words(text: str) -> Pool:
    """Return the words of a text, each an entry."""
    return tuple((word,) for word in text.split())


def _linked(text: str) -> Pool:
    """Return the entries of a text in which a stroke joins the words that belong together."""
    return tuple(tuple(entry.split("/")) for entry in text.split())


NAMES = _words("""name path mode title label prefix suffix color kind style author version status
domain host user group format encoding header footer message command target source method action
event state level theme locale region country city street owner client server driver engine backend
device channel topic queue folder module package branch""")
WORDS = _words("""red green blue small large open closed left right north south east west hello
world apple banana cherry orange lemon paper stone water fire earth wind summer winter spring autumn
monday friday sunday january march april silver gold copper iron wood glass music dance night
morning table chair window garden river mountain forest ocean desert valley bridge castle""")
FUNCTIONS = _words("""run start stop load save read write check update reset open_file close_all
find search parse build make_list clean sort_items merge split_text join_parts count_lines
filter_rows send receive connect wait_for is_ready has_next can_write validate""")
VARIABLES = _words("""value data item result line text index node obj func err exc key count size
first last child block byte char code col context current doc end exp expected file filename
handler lines loop msg new number object op option other parser pos res root sock temp
thread url var widget arg call case""")
LISTS = _words("""values numbers sizes points scores weights widths heights limits ranges bounds
steps ports codes rows_seen cells pairs_used shape grid matrix table_rows counts offsets levels ages
times prices totals marks ids""")
CLASSES = _words("""Reader Writer Parser Handler Client Server Manager Factory Buffer Stream Request
Response Session Worker Queue Cache Node Tree Event Message Option Config Record Table Filter""")
MODULES = _words("""os sys re time math json copy types struct string random errno signal
threading select logging shutil codecs stat keyword platform weakref operator bisect""")
NUMBERS: Pool = tuple((str(n),) for n in range(1, 100))
ORDERED = _linked("""1/4 2/7 3/8 5/9 1/6 4/7 2/5 6/9 3/4 1/8 2/9 5/8 1/3 6/7 4/9 3/6 1/7 2/4 8/9 5/7
2/6 3/9 4/8 1/5 7/9""")

MEN = _words("""John David James Robert Michael Peter Paul Mark George Thomas Henry Jack Tom Tim Ben
Sam Bob Jim Joe Fred Frank Bill Steve Adam Daniel Charles Richard Edward Simon Andrew Martin
Philip Stephen Kevin Brian Alan Eric Jason Roger""")
WOMEN = _words("""Mary Sarah Anna Emma Lisa Laura Alice Jane Kate Susan Julia Emily Lucy Rose Grace
Helen Ruth Amy Sally Betty Maria Linda Karen Nancy Diana Elizabeth Margaret Barbara Catherine Anne
Martha Rebecca Rachel Hannah Claire Sophie Charlotte Louise Victoria Ellen""")
PLACES = _words("""park store school office market library station beach hotel museum hospital
church theater kitchen bank farm village bakery cinema harbor""")
THINGS = _words("""book drink letter ring gift hat basket ticket pen coat lamp bottle cake camera
watch phone map toy bag cup""")
NOUNS = _linked("""dog/dogs car/cars boy/boys girl/girls house/houses tree/trees bird/birds
horse/horses friend/friends teacher/teachers picture/pictures story/stories student/students
doctor/doctors door/doors king/kings soldier/soldiers farmer/farmers painter/painters ship/ships
brother/brothers sister/sisters idea/ideas lesson/lessons machine/machines""")
VOWEL = _words("""egg animal artist actor uncle aunt answer idiot eagle expert oil army arrow owl
onion oven agent umbrella orchestra elephant editor orchard image opera idol""")
CONSONANT = _words("""dream train wheel pirate singer cousin nurse question lawyer lion sailor pilot
manager problem project band writer cat potato fridge spy jacket choir tiger reporter""")
CAPITALS = _linked("""France/Paris Italy/Rome Germany/Berlin Spain/Madrid Japan/Tokyo England/London
Russia/Moscow China/Beijing Egypt/Cairo Greece/Athens Austria/Vienna Ireland/Dublin Cuba/Havana
Poland/Warsaw Portugal/Lisbon Sweden/Stockholm Norway/Oslo Hungary/Budapest Turkey/Ankara
Iran/Tehran Iraq/Baghdad Canada/Ottawa Kenya/Nairobi Peru/Lima Thailand/Bangkok""")

POOLS: dict[str, tuple[Pool, int]] = {
    # slot: its list, and which word of an entry it takes
    "name": (NAMES, 0),
    "word": (WORDS, 0),
    "f": (FUNCTIONS, 0),
    "v": (VARIABLES, 0),
    "list": (LISTS, 0),
    "cls": (CLASSES, 0),
    "mod": (MODULES, 0),
    "n": (NUMBERS, 0),
    "less": (ORDERED, 0),
    "more": (ORDERED, 1),
    "man": (MEN, 0),
    "woman": (WOMEN, 0),
    "place": (PLACES, 0),
    "thing": (THINGS, 0),
    "noun": (NOUNS, 0),
    "nouns": (NOUNS, 1),
    "vowel": (VOWEL, 0),
    "consonant": (CONSONANT, 0),
    "land": (CAPITALS, 0),
    "city": (CAPITALS, 1),
}
"""The slots of the recipes: `$v`, and `$v2`, `$v3` for other words of the same list."""
NUMERIC = {"n", "less", "more"}
"""Slots of numbers: no factor of `Pair.groups`, and digits may be in several splits."""


def deal(entries: Pool, split: int) -> list[tuple[str, ...]]:
    """Return the entries of a split: of every five, three for split 0, one for 1 and one for 2."""
    return [entry for i, entry in enumerate(entries) if max(i % 5 - 2, 0) == split]
