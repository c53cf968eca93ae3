"""Documents: read in a fixed order, and split by what they say rather than by where they stand."""

import json
import sys

import pytest

from sparse.text.corpus import (
    Corpus,
    Documents,
    is_validation,
    load_corpus,
    open_dataset,
    stream_corpus,
)


def write(folder, texts, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}{suffix}").write_text(text, encoding="utf-8")
    return folder


def numbered(n):
    return {f"{i:03}": f"document number {i}\n" for i in range(n)}


def test_train_and_validation_share_no_document_and_lose_none(tmp_path):
    texts = numbered(300)
    corpus = load_corpus(write(tmp_path / "a", texts))
    assert not set(corpus.train) & set(corpus.validation)
    assert sorted(corpus.train + corpus.validation) == sorted(texts.values())
    assert 3 <= len(corpus.validation) <= 35  # 5 % of 300 is 15, standard deviation 3.8


def test_adding_a_file_moves_no_other_and_copies_stay_together(tmp_path):
    folder = write(tmp_path / "a", numbered(120))
    before = load_corpus(folder)
    write(folder, {"000a": "a newcomer near the front\n", "zzz": before.validation[0]})
    after = load_corpus(folder)
    assert set(before.train) <= set(after.train)
    assert set(before.validation) == set(after.validation) - {"a newcomer near the front\n"}
    assert after.validation.count(before.validation[0]) == 2
    by_position = [i % 20 == 0 for i in range(121)]  # control: positions do move documents
    texts = sorted(numbered(120).values())
    shifted = [texts[0], "a newcomer", *texts[1:]]
    placed = {text for text, held in zip(shifted, by_position, strict=True) if held}
    assert not {text for i, text in enumerate(texts) if i % 20 == 0} <= placed


def test_a_larger_share_only_adds_to_validation(tmp_path):
    folder = write(tmp_path / "a", numbered(200))
    small, large = load_corpus(folder), load_corpus(folder, validation_share=0.3)
    assert set(small.validation) < set(large.validation)
    assert all(is_validation(text, 0.3) for text in large.validation)


def test_documents_come_in_the_order_of_their_names_and_the_fingerprint_follows_both(tmp_path):
    texts = numbered(80)
    corpus = load_corpus(write(tmp_path / "a", texts))
    assert corpus.train == [text for text in texts.values() if not is_validation(text)]
    first = corpus.fingerprint
    assert load_corpus(write(tmp_path / "b", dict(reversed(texts.items())))).fingerprint == first
    assert load_corpus(write(tmp_path / "c", texts | {"000": "other"})).fingerprint != first
    renamed = {f"x{name}": text for name, text in texts.items()}
    assert load_corpus(write(tmp_path / "d", renamed)).fingerprint != first


def test_a_folder_is_read_whatever_its_files_are_and_skips_are_counted(tmp_path):
    folder = write(tmp_path / "a", numbered(150))
    write(folder / "deep", {"b": "x = 'ä'\n", "c": "y = 1\n"}, ".py")
    write(folder / "deep" / "site-packages", {"no": "never\n"}, ".py")
    write(folder, {"m": "# head\n", "empty": " \n"}, ".md")
    (folder / "latin.py").write_bytes("# coding: latin-1\nz = 'é'\n".encode("latin-1"))
    (folder / "broken.py").write_bytes(b"z = '\xff'\n")
    (folder / "other.bin").write_bytes(b"\0\1")
    (folder / "rows.jsonl").write_text('{"text": "one\u2028line"}\n\n{"text": "two"}\n', "utf-8")
    corpus = load_corpus(folder)
    read = corpus.train + corpus.validation
    assert {"x = 'ä'\n", "# head\n", "one\u2028line", "two"} <= set(read)
    assert "# coding: latin-1\nz = 'é'\n" in read
    assert len(read) == 156
    assert corpus.skipped == {"empty": 1, "not in the declared coding": 1}


def test_a_lone_text_file_is_cut_at_its_marks_or_at_blank_lines(tmp_path):
    stories = [f"story {i} begins.\n\nIt ends.\n" for i in range(100)]
    (tmp_path / "s.txt").write_text("<|endoftext|>".join(stories))
    corpus = load_corpus(tmp_path / "s.txt")
    assert sorted(corpus.train + corpus.validation) == sorted(stories)
    book = "\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(400))
    (tmp_path / "b.txt").write_text(book)
    passages = load_corpus(str(tmp_path / "b.txt"))
    assert sum(map(len, passages.train + passages.validation)) == len(book) + 2
    assert all(len(text) >= 2_000 for text in passages.train[:-1])


def test_a_jsonl_file_gives_its_rows_and_documents_keeps_the_first(tmp_path):
    rows = [{"id": i, "body": f"row {i}"} for i in range(200)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(path, text_column="body")
    assert len(corpus.train) + len(corpus.validation) == 200
    first = load_corpus(path, text_column="body", documents=90)
    assert len(first.train) + len(first.validation) == 90
    assert first.train == corpus.train[: len(first.train)]
    with pytest.raises(ValueError, match=r"column 'text'.*'id': 'int'.*'body'.*text_column"):
        load_corpus(path)
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match="rows.jsonl:2 is not JSON"):
        load_corpus(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="not a JSON object"):
        load_corpus(path)


def test_a_stream_of_files_gives_the_documents_of_the_corpus_in_the_same_order(
    tmp_path, monkeypatch
):
    folder = write(tmp_path / "a", numbered(120))
    write(folder, {"b": "one<|endoftext|>two\n\n<|endoftext|>", "c": "# only\n\nhead"}, ".txt")
    (folder / "rows.jsonl").write_text('{"text": "\\u00e9 row"}\r\n\n{"text": "row two"}', "utf-8")
    (folder / "broken.txt").write_bytes(b"fine at first " * 9 + b"\xff")
    book = tmp_path / "b.txt"
    book.write_text("\n\n".join(f"paragraph {i}\n" + "word " * 100 for i in range(60)))
    for at_once in (7, 1 << 20):  # what is read at a time cuts nothing
        monkeypatch.setattr("sparse.text.corpus.AT_ONCE", at_once)
        for source in (folder, book):
            rows = [row["text"] for row in stream_corpus(source)]
            corpus = load_corpus(source)
            full = [text for text in rows if text.strip()]
            assert [text for text in full if not is_validation(text)] == corpus.train
            assert [text for text in full if is_validation(text)] == corpus.validation
    assert "".join(rows) == book.read_text() + "\n\n"
    assert {"one", "two\n\n", "é row", "row two"} <= {r["text"] for r in stream_corpus(folder)}


def test_a_stream_of_files_reads_no_further_than_it_was_asked(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", numbered(5))
    lines = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(1000))
    (folder / "002a.jsonl").write_text(lines)
    opened, real = [], type(folder).open
    monkeypatch.setattr(
        type(folder),
        "open",
        lambda path, *a, **kw: opened.append(path.name) or real(path, *a, **kw),
    )
    rows = iter(stream_corpus(folder))
    assert [next(rows)["text"] for _ in range(5)][3:] == ["row 0", "row 1"]
    assert set(opened) == {"000.txt", "001.txt", "002.txt", "002a.jsonl"}


def test_a_stream_of_files_continues_at_any_document_and_names_a_file_that_is_gone(tmp_path):
    folder = write(tmp_path / "a", numbered(3))
    (folder / "001a.txt").write_text("one<|endoftext|>two<|endoftext|>three")
    whole = [row["text"] for row in stream_corpus(folder)]
    assert len(whole) == 6
    for n in range(7):
        rows = stream_corpus(folder)
        reader = iter(rows)
        seen = [next(reader)["text"] for _ in range(n)]
        state = json.loads(json.dumps(rows.state_dict()))
        again = stream_corpus(folder)
        again.load_state_dict(state)
        assert seen + [row["text"] for row in again] == whole
        assert [row["text"] for row in again] == whole  # and begins anew
    rows = stream_corpus(folder)
    next(iter(rows))
    (folder / "000.txt").unlink()
    with pytest.raises(ValueError, match="continues in 000.txt, which is not among the 3 files"):
        stream_corpus(folder).load_state_dict(rows.state_dict())
    assert isinstance(rows, Documents)


def test_bad_sources_say_what_is_wrong_and_what_to_do(tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="0 training and 0 validation documents.*give more"):
        load_corpus(tmp_path / "void")
    with pytest.raises(ValueError, match="1 training and 0 validation|0 training and 1"):
        load_corpus(write(tmp_path / "one", {"a": "alone\n"}))
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus("./nowhere")
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="t.csv is not one of .txt, .jsonl"):
        load_corpus(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="validation_share=1.0"):
        load_corpus(tmp_path, validation_share=1.0)


def test_a_dataset_without_the_extra_is_refused_with_the_command_that_adds_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes `import datasets` fail
    with pytest.raises(
        ImportError, match=r'"someone/stories"|pip install "sparse-bridges\[data\]"'
    ):
        load_corpus("someone/stories")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_is_read_by_column(tmp_path, streaming, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(
        tmp_path / "set",
        {"train": "\n".join(json.dumps({"text": f"r {i}"}) for i in range(90))},
        ".jsonl",
    )
    load = datasets.load_dataset
    folder = str(tmp_path / "set")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: load(folder, *a, **k))
    assert len(list(open_dataset("someone/stories", streaming=streaming))) == 90
    corpus = load_corpus("someone/stories", streaming=streaming)
    assert len(corpus.train) + len(corpus.validation) == 90
    with pytest.raises(ValueError, match="'text': 'str'"):
        load_corpus("someone/stories", text_column="body", streaming=streaming)


def test_the_standard_library_is_a_corpus_on_every_machine():
    corpus = load_corpus()
    assert isinstance(corpus, Corpus)
    assert len(corpus.train) + len(corpus.validation) > 500  # 1,759 here; fewer without its tests
    assert not set(corpus.train) & set(corpus.validation)
    assert any("class JSONDecoder" in text for text in corpus.train + corpus.validation)
    assert corpus.name.endswith(sys.version.split()[0])
