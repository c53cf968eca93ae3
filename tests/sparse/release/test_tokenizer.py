"""The oracle is byte-pair encoding written plainly, and the split pattern said in words."""

import json
import random
import unicodedata

import pytest

from sparse import release
from sparse.release.tokenizer import BYTES, CHARS, END_OF_TEXT

CODE = """def f(self, width=3):
    if width == 1024:
        return "naïve" + 'x' * 12345  # done!!
    values = [[1, 2],\r\n\t\t[5, 3]]
\n\n    print(f"{values}")  //\n// end   """
ODD = [
    "",
    " ",
    "\n",
    "a",
    "  a",
    "\x00\xff",
    "日本語 ٣٤٥٦",
    "a\u00a0b",
    "e\u0301",
    "''",
    "   \n  \n x",
    "]\n",
]
WORDS = ["]\n", "]]\n", "self", " self", "    ", " =", "return", "\n\n", "12", "'x", '"n']


def merges_for(words, extra=40):
    """Merges that build the words left to right, then some of whatever is there."""
    merges, known = [], {bytes([b]) for b in range(256)}
    for word in (w.encode() for w in words):
        for i in range(2, len(word) + 1):
            if word[:i] not in known:
                merges.append((word[: i - 1], word[i - 1 : i]))
                known.add(word[:i])
    rng = random.Random(0)
    while extra:
        a, b = rng.choice(merges)[0], bytes([rng.choice(b"aeno t=")])
        if a + b not in known:
            merges.append((a, b))
            known.add(a + b)
            extra -= 1
    return merges


MERGES = merges_for(WORDS)
"""`quiz` is a token that merging its bytes does not reach, since `ui` comes first."""
MERGES += [(b"u", b"i"), (b"q", b"u"), (b"i", b"z"), (b"qu", b"iz")]
RANKS = {bytes([b]): i for i, b in enumerate(BYTES)} | {
    a + b: 256 + i for i, (a, b) in enumerate(MERGES)
}


def letter(c):
    return unicodedata.category(c)[0] == "L"


def number(c):
    return unicodedata.category(c)[0] == "N"


def sign(c):
    return not (letter(c) or number(c) or c.isspace())


def run(text, i, what):
    while i < len(text) and what(text[i]):
        i += 1
    return i


def next_piece(text, i):
    """Where the piece that starts at `i` ends, by the pattern of docs/method.md#released-files."""
    start = i + (text[i] not in "\r\n" and not letter(text[i]) and not number(text[i]))
    if (end := run(text, start, letter)) > start:
        return end
    if number(text[i]):
        return min(run(text, i, number), i + 3)
    start = i + (text[i] == " ")
    if (end := run(text, start, sign)) > start:
        return run(text, end, lambda c: c in "\r\n/")
    blank = run(text, i, str.isspace)
    lines = [j + 1 for j in range(i, blank) if text[j] in "\r\n"]
    if lines:
        return lines[-1]
    return blank if blank == len(text) or blank == i + 1 else blank - 1


def oracle(text):
    ids, i = [], 0
    while i < len(text):
        end = next_piece(text, i)
        piece, i = text[i:end].encode(), end
        parts = [piece] if piece in RANKS else [bytes([b]) for b in piece]
        while True:
            joined = [RANKS.get(a + b, 10**9) for a, b in zip(parts, parts[1:], strict=False)]
            if not joined or min(joined) == 10**9:
                break
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    release.save_tokenizer(MERGES, folder)
    return release.load_tokenizer(folder)


def texts(n=300):
    rng = random.Random(1)
    alphabet = [*"aeno tx=]]\n\n\r  /\"'129_(,٣日é", "self", " return", "    ", "]\n", "]]\n"]
    drawn = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(n)]
    return [CODE, "quiz", "a quiz, quizz", *ODD, *drawn]


def test_the_tokens_are_those_of_plain_byte_pair_encoding(tokenizer):
    for text in texts():
        got = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert got == oracle(text), repr(text)
    assert len(oracle("quiz")) == 1 and len(oracle(",quizz")) > 2
    assert len(oracle(CODE)) < len(CODE.encode()) * 0.9  # control: merges do act


def test_any_text_comes_back(tokenizer):
    for text in [*texts(), *map(chr, range(0x500)), "\U0001f600 \u2028"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_end_of_text_is_the_last_token_and_2047_with_the_released_number_of_merges(
    tokenizer, tmp_path
):
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == 256 + len(MERGES)
    assert tokenizer(f"a{END_OF_TEXT}").input_ids == [RANKS[b"a"], tokenizer.eos_token_id]
    many = [(bytes([a]), bytes([b])) for a in range(32, 96) for b in range(32, 96)][:1791]
    release.save_tokenizer(many, tmp_path)
    assert release.load_tokenizer(tmp_path).eos_token_id == 2047


def test_targets_of_the_released_tasks_can_be_single_tokens(tokenizer):
    """`]` and `]]` with the line end after them are one piece, whatever stands before."""
    for context, target in (("[5, 3", "]\n"), ("[[5, 3", "]]\n")):
        whole = tokenizer(context + target).input_ids
        assert whole == [*tokenizer(context).input_ids, RANKS[target.encode()]]


def test_it_survives_hugging_faces_own_files(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(CODE).input_ids == tokenizer(CODE).input_ids
    assert again.eos_token_id == tokenizer.eos_token_id and again.decode(again(" a").input_ids)


def test_bytes_are_written_as_gpt2_writes_them():
    assert CHARS[ord(" ")] == "Ġ" and CHARS[ord("\n")] == "Ċ" and CHARS[ord("!")] == "!"
    assert BYTES[0] == ord("!") and sorted(BYTES) == list(range(256))
    assert len(set(CHARS.values())) == 256


@pytest.mark.parametrize("spoil", ["swap", "drop", "end", "form", "order", "absent"])
def test_files_of_two_tokenizers_are_refused(spoil, tmp_path):
    release.save_tokenizer(MERGES, tmp_path)
    vocabulary = json.loads((tmp_path / "encoder.json").read_text())
    lines = (tmp_path / "vocab.bpe").read_text().split("\n")
    says = "encoder.json is not the vocabulary of vocab.bpe"
    match spoil:
        case "swap":
            vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
        case "drop":
            lines.pop(-2)
        case "end":
            vocabulary[END_OF_TEXT] += 1
        case "form":
            lines[2], says = "a b c", "line 3: 'a b c' must be two pieces"
        case "order":
            lines[1], lines[-2], says = lines[-2], lines[1], "must join two earlier pieces"
        case "absent":
            (tmp_path / "vocab.bpe").unlink()
            with pytest.raises(ValueError, match="vocab.bpe is missing"):
                release.load_tokenizer(tmp_path)
            return
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "vocab.bpe").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=says):
        release.load_tokenizer(tmp_path)
