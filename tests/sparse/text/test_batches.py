"""Blocks and batches: nothing is lost but the remainder, and a resumed run sees the same tokens."""

import hashlib
import json
from itertools import islice

import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparse.text.batches import Batches, StreamingBatches, first_blocks
from sparse.text.corpus import is_validation, load_corpus, stream_corpus
from sparse.text.pack import estimated_tokens, pack, tokenizer_rules


def byte_tokenizer(eos="<eos>", first=""):
    """One token per byte, and an end-of-text token; `first` are the special tokens put first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if eos:
        tokenizer.add_special_tokens([eos])
    if first:
        tokenizer.add_special_tokens(first.split())
        ids = [(token, tokenizer.token_to_id(token)) for token in first.split()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=ids
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos or None)


TEXTS = [f"document {i} " + "ab é " * (i % 7) for i in range(300)]


class Rows:
    """A stream that can say where it is, as a Hugging Face IterableDataset can."""

    def __init__(self, texts):
        self.texts, self.next = texts, 0

    def __iter__(self):
        while self.next < len(self.texts):
            self.next += 1
            yield {"text": self.texts[self.next - 1]}
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class ForgetfulRows(Rows):
    """The control: a stream whose state is always its beginning."""

    def state_dict(self):
        return {"next": 0}


def take(batches, n):
    return torch.stack(list(islice(batches, n)))


def test_packing_loses_only_the_remainder():
    tokenizer = byte_tokenizer()
    blocks = pack(TEXTS, tokenizer, 64)
    whole = "".join(f"{text}<eos>" for text in TEXTS)
    assert blocks.dtype == torch.int64 and blocks.shape[1] == 64
    packed = tokenizer.decode(blocks.flatten())
    assert whole.startswith(packed)
    assert len(whole.encode()) - len(TEXTS) * 4 - blocks.numel() < 64  # <eos> is one token
    assert not "".join(TEXTS).startswith(packed)  # control: the documents do not run together


def test_packing_refuses_what_it_cannot_pack():
    with pytest.raises(ValueError, match="no end-of-text token.*tokenizer.eos_token"):
        pack(TEXTS, byte_tokenizer(eos=""), 64)
    with pytest.raises(ValueError, match="hold 3 tokens, fewer than one block of 64"):
        pack(["ab"], byte_tokenizer(), 64)
    with pytest.raises(ValueError, match="0 documents hold 0 tokens"):
        pack([], byte_tokenizer(), 64)
    with pytest.raises(ValueError, match="length=1"):
        pack(TEXTS, byte_tokenizer(), 1)


def test_a_cache_is_used_only_for_the_same_texts_tokenizer_and_length(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    blocks = pack(TEXTS, tokenizer, 64, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as patch:  # a second call does not tokenize
        patch.setattr("sparse.text.pack.encode", None)
        assert torch.equal(pack(TEXTS, tokenizer, 64, cache=tmp_path), blocks)
    pack(TEXTS, tokenizer, 32, cache=tmp_path)
    pack(TEXTS[1:], tokenizer, 64, cache=tmp_path)
    pack(TEXTS, byte_tokenizer(eos="<end>"), 64, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


FIRST = {"": [], "<s>": [257], "<a> <b>": [257, 258]}  # what is put first, as words and as tokens


@pytest.mark.parametrize("first", FIRST)
def test_every_block_is_the_prefix_and_the_next_piece_of_the_same_text(first):
    tokenizer, n = byte_tokenizer(first=first), len(FIRST[first])
    blocks = pack(TEXTS, tokenizer, 64)
    assert blocks.shape[1] == 64 and blocks.dtype == torch.int64
    assert blocks[:, :n].tolist() == [FIRST[first]] * len(blocks)
    assert torch.equal(blocks[:, n:], pack(TEXTS, byte_tokenizer(), 64 - n))  # nothing is lost
    assert not any(t in blocks[:, n:] for t in FIRST[first])  # once per block, at its beginning


def test_a_block_must_have_room_for_two_tokens_of_text():
    tokenizer = byte_tokenizer(first="<a> <b>")
    for length in (3, 2):
        with pytest.raises(ValueError, match=f"pack: length={length} must be at least 4: 2 that"):
            pack(TEXTS, tokenizer, length)
    with pytest.raises(ValueError, match="StreamingBatches: length=3 must be at least 4"):
        StreamingBatches(Rows(TEXTS), tokenizer, 3, 4)
    assert pack(TEXTS, tokenizer, 4)[0].tolist()[:2] == FIRST["<a> <b>"]  # control
    with pytest.raises(ValueError, match="hold 3 tokens, fewer than one block of 62 and its pref"):
        pack(["ab"], tokenizer, 64)


def test_a_cache_from_before_prefixes_is_used_only_where_there_is_none(tmp_path):
    """The oracle is the key of then; the tokenizer's rules alone did not say what was packed."""
    for first, used in (("", True), ("<s>", False)):
        tokenizer = byte_tokenizer(first=first)
        digest = hashlib.sha256(f"64 {len(TEXTS)} {tokenizer_rules(tokenizer)}".encode())
        for text in TEXTS:
            digest.update(hashlib.sha256(text.encode()).digest())
        old = tmp_path / first.strip("<>") / f"{digest.hexdigest()[:32]}.safetensors"
        old.parent.mkdir(exist_ok=True)
        planted = torch.full((2, 64), 7)
        old.write_bytes(save({"blocks": planted}))
        assert torch.equal(pack(TEXTS, tokenizer, 64, cache=old.parent)[:2], planted) == used


def test_a_cache_that_cannot_be_written_leaves_nothing_half_done(tmp_path, monkeypatch):
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left.*free some space"):
        pack(TEXTS, byte_tokenizer(), 64, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_epoch_is_another_permutation_of_the_same_blocks():
    blocks = torch.arange(12).view(12, 1).expand(12, 3)
    batches = Batches(blocks, 4, seed=7)
    first, second = (torch.cat([batches.at(3 * e + i) for i in range(3)])[:, 0] for e in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert not torch.equal(first, second)
    other = torch.cat([Batches(blocks, 4, seed=8).at(i) for i in range(3)])[:, 0]
    assert not torch.equal(first, other)  # control: the seed decides


def test_a_batch_depends_on_seed_and_step_alone():
    blocks = torch.arange(20).view(20, 1)
    batches = Batches(blocks, 3, seed=1)
    assert batches.per_epoch == 6
    walked = take(batches, 20)
    torch.manual_seed(99)
    fresh = Batches(blocks, 3, seed=1)
    for step in (19, 0, 13, 6, 5):
        assert torch.equal(fresh.at(step), walked[step])
    assert fresh.step == 0  # looking does not advance


def test_batches_resume_bit_for_bit_twice_in_a_row():
    blocks = torch.arange(200).view(20, 10)
    whole = take(Batches(blocks, 3, seed=1), 30)
    start, seen = {"step": 0}, []
    for n in (11, 9, 10):
        batches = Batches(blocks, 3, seed=1)
        batches.load_state_dict(start)
        seen.append(take(batches, n))
        start = json.loads(json.dumps(batches.state_dict()))
    assert start["step"] == 30
    assert torch.equal(torch.cat(seen), whole)
    assert not torch.equal(take(Batches(blocks, 3, seed=1), 19), whole[11:])  # control: no state


def test_a_state_of_other_batches_is_refused_by_what_differs():
    blocks = torch.arange(200).view(20, 10)
    state = Batches(blocks, 3, seed=1).state_dict() | {"step": 5}
    for other, says in (
        (Batches(blocks, 4, seed=1), "batch_size: 3 there, 4 here"),
        (Batches(blocks.view(10, 20), 3, seed=1), "length: 10 there, 20 here"),
        (Batches(blocks, 3, seed=2), "batch_seed: 1 there, 2 here"),
        (Batches(blocks + 1, 3, seed=1), "text: .* there, .* here"),
    ):
        with pytest.raises(ValueError, match=f"other batches .*{says}.*; give the text"):
            other.load_state_dict(state)
        assert other.step == 0
    same = Batches(blocks.clone(), 3, seed=1)
    same.load_state_dict(state)  # control: its equal
    assert same.step == 5


def test_batches_refuse_fewer_blocks_than_a_batch_and_steps_before_the_first():
    with pytest.raises(ValueError, match=r"batch_size=5 is outside 1..4.*smaller batch"):
        Batches(torch.zeros(4, 8, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="step=-1"):
        Batches(torch.zeros(4, 8, dtype=torch.int64), 2).at(-1)


@pytest.mark.parametrize("first", FIRST)
def test_a_stream_holds_the_tokens_that_packing_gives(first):
    tokenizer = byte_tokenizer(first=first)
    blocks = pack(TEXTS, tokenizer, 16)
    n = len(blocks) // 4
    streamed = take(StreamingBatches(Rows(TEXTS), tokenizer, 16, 4, part="all"), n)
    assert torch.equal(streamed.flatten(0, 1), blocks[: 4 * n])
    for part, held_out in (("train", False), ("validation", True)):
        texts = [text for text in TEXTS if is_validation(text) == held_out]
        stream = StreamingBatches(Rows(TEXTS), tokenizer, 16, 2, part=part)
        assert torch.equal(take(stream, 2).flatten(0, 1), pack(texts, tokenizer, 16)[:4])


def check_resumes(rows, n=80, first=""):
    """Say whether a stream cut twice, its state kept as JSON, gives the undisturbed batches."""

    def new():
        return StreamingBatches(rows(), byte_tokenizer(first=first), 16, 4, part="all")

    whole, state, seen = take(new(), n), None, []
    for part in (n // 2 + 1, 7, n - n // 2 - 8):
        stream = new()
        if state:
            stream.load_state_dict(state)
        seen.append(take(stream, part))
        state = json.loads(json.dumps(stream.state_dict()))
    assert stream.epoch >= 2, "the test should pass the end of the rows"
    assert stream.step == n
    return torch.equal(torch.cat(seen), whole)


@pytest.mark.parametrize("first", FIRST)
def test_a_stream_resumes_at_the_exact_token_twice_and_over_epochs(first):
    assert check_resumes(lambda: Rows(TEXTS[:40]), first=first)
    assert not check_resumes(lambda: ForgetfulRows(TEXTS[:40]))  # control


def test_a_stream_of_hugging_face_rows_resumes_at_the_exact_token(tmp_path):
    datasets = pytest.importorskip("datasets")
    files = []
    for i in range(3):
        files.append(str(tmp_path / f"{i}.jsonl"))
        lines = (json.dumps({"text": text}) for text in TEXTS[20 * i : 20 * i + 20])
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))

    def rows():
        return datasets.load_dataset(
            "json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path)
        )

    assert check_resumes(rows)


def test_a_stream_does_not_resume_a_state_of_other_rows_or_settings():
    def stream(texts=TEXTS, eos="<eos>", length=16, batch_size=4, **fields):
        return StreamingBatches(Rows(texts), byte_tokenizer(eos), length, batch_size, **fields)

    whole = take(stream(), 6)
    first = stream()
    untouched = first.state_dict()
    take(first, 3)
    state = json.loads(json.dumps(first.state_dict()))
    for other, says in (
        (stream(["another", *TEXTS]), "first_row: .* there, .* here"),
        (stream(eos="<end>"), "tokenizer: .* there, .* here"),
        (stream(length=8), "length: 16 there, 8 here"),
        (stream(batch_size=2), "batch_size: 4 there, 2 here"),
        (stream(part="all"), "part: train there, all here"),
        (stream(validation_share=0.1), "validation_share: 0.05 there, 0.1 here"),
    ):
        with pytest.raises(ValueError, match=f"StreamingBatches: .*other batches .*{says}.*anew"):
            other.load_state_dict(state)
        assert other.step == 0
    same = stream()
    same.load_state_dict(state)  # control: its equal goes on, and can be put back
    assert torch.equal(take(same, 3), whole[3:])
    same.load_state_dict(state)
    assert torch.equal(take(same, 3), whole[3:])
    first.load_state_dict(untouched)  # a state from before anything was read names no row
    assert torch.equal(take(first, 6), whole)


def test_a_stream_does_not_resume_a_state_of_another_prefix_and_an_old_state_had_none():
    def stream(first):
        return StreamingBatches(Rows(TEXTS), byte_tokenizer(first=first), 16, 4)

    for first, other, says in (("", "<s>", r"\[\] .*\[257\]"), ("<s>", "", r"\[257\] .*\[\]")):
        state = stream(first).state_dict() | {"tokenizer": None}  # the prefix alone is compared
        with pytest.raises(ValueError, match=f"prefix: {says} here.*give the text, tokenizer"):
            stream(other).load_state_dict(state)
        stream(first).load_state_dict(state)  # control
    state = stream("").state_dict()
    del state["prefix"]  # as it was before prefixes were known
    stream("").load_state_dict(state)
    with pytest.raises(ValueError, match=r"prefix: \[\] there, \[257\] here"):
        stream("<s>").load_state_dict(state | {"tokenizer": None})


def test_a_stream_refuses_what_it_could_not_resume_or_fill():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="list has no state_dict.*pack and Batches"):
        StreamingBatches([{"text": "a"}], tokenizer, 16, 4)
    with pytest.raises(ValueError, match="no document of part 'all'"):
        next(iter(StreamingBatches(Rows(["", " "]), tokenizer, 16, 4, part="all")))
    with pytest.raises(ValueError, match=r"column 'body'.*'text': 'str'"):
        next(iter(StreamingBatches(Rows(TEXTS), tokenizer, 16, 4, text_column="body")))
    with pytest.raises(ValueError, match="batch_size=0"):
        StreamingBatches(Rows(TEXTS), tokenizer, 16, 0)
    with pytest.raises(ValueError, match="no end-of-text token"):
        StreamingBatches(Rows(TEXTS), byte_tokenizer(eos=""), 16, 4)


def write_files(folder):
    """TEXTS as rows of two .jsonl files and documents of a .txt file."""
    for i, name in enumerate(("a", "c")):
        lines = (json.dumps({"text": text}) for text in TEXTS[15 * i : 15 * i + 15])
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("<|endoftext|>".join(TEXTS[30:45]))
    return folder


def test_a_stream_of_files_holds_the_tokens_that_packing_gives_and_resumes(tmp_path):
    folder, tokenizer = write_files(tmp_path), byte_tokenizer()
    stream = StreamingBatches(stream_corpus(folder), tokenizer, 16, 2)
    blocks = pack(load_corpus(folder).train, tokenizer, 16)
    n = len(blocks) // 2
    assert torch.equal(take(stream, n).flatten(0, 1), blocks[: 2 * n])
    assert check_resumes(lambda: stream_corpus(folder))


def test_first_blocks_are_those_of_packing_and_end_with_the_text(tmp_path):
    folder, tokenizer = write_files(tmp_path), byte_tokenizer()
    corpus = load_corpus(folder)
    for part, texts in (("train", corpus.train), ("validation", corpus.validation)):
        want = pack(texts, tokenizer, 8)
        begun = byte_tokenizer(first="<s>")
        rows = stream_corpus(folder)
        assert torch.equal(first_blocks(rows, begun, 9, 2, part), pack(texts, begun, 9)[:2])
        rows = stream_corpus(folder)
        assert torch.equal(first_blocks(rows, tokenizer, 8, 2, part), want[:2])
        assert rows.file < 2  # what comes after was not read
        assert torch.equal(first_blocks(stream_corpus(folder), tokenizer, 8, 9999, part), want)
    with pytest.raises(ValueError, match="part 'validation' hold fewer than one block of 5000"):
        first_blocks(stream_corpus(folder), tokenizer, 5000, 1)


def test_the_estimate_of_tokens_is_exact_for_few_documents_and_close_for_many(tmp_path):
    folder, tokenizer = write_files(tmp_path), byte_tokenizer()
    corpus = load_corpus(folder)
    texts = corpus.train + corpus.validation
    assert estimated_tokens(corpus, tokenizer) == sum(len(t.encode()) + 1 for t in texts)
    (tmp_path / "d.txt").write_text("<|endoftext|>".join(TEXTS))
    corpus = load_corpus(folder)
    exact = sum(len(t.encode()) + 1 for t in corpus.train + corpus.validation)
    assert estimated_tokens(corpus, tokenizer) == pytest.approx(exact, rel=0.05)
    for first, shortened in (("", 1), ("<a> <b>", 16 / 14)):
        estimate = estimated_tokens(corpus, byte_tokenizer(first=first), 16)
        assert estimate == pytest.approx(shortened * exact, rel=0.05)
