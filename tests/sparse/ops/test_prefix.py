"""What a tokenizer puts before a text is found from what it does; its attributes are not asked."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

from sparse.ops.prefix import begin, check_begin, counted, prefix_ids
from tests.helpers.prefixed import BOS, EOS, byte_tokenizer


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("$A", ()),
        ("<s> $A", (BOS,)),
        ("<s> $A </s>", (BOS,)),
        ("$A </s>", ()),  # what comes last is not taken: a prompt is to be continued
        ("</s> <s> $A", (EOS, BOS)),
        ("<s> $A <s>", (BOS,)),
    ],
)
def test_the_prefix_is_what_the_template_puts_first(template, prefix):
    tokenizer = byte_tokenizer(template)
    assert prefix_ids(tokenizer) == prefix
    for text in ("some text", " x", "é\n"):  # the law, on texts that are not looked at
        whole = tokenizer(text).input_ids
        assert whole[: len(prefix)] == list(prefix)
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert whole[len(prefix) :][: len(plain)] == plain


def test_a_sentencepiece_tokenizer_has_the_prefix_that_its_attribute_asks_for(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{c: 4 + i for i, c in enumerate("axo =1")}}
    for adds in (True, False):
        LlamaTokenizerFast(vocab=vocab, merges=[]).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=adds)
        assert tokenizer("a", add_special_tokens=False).input_ids == [3, 4]  # a space is put first
        assert prefix_ids(tokenizer) == ((1,) if adds else ())
    tokenizer.add_bos_token = True
    assert prefix_ids(tokenizer) == (1,)


def words(unknown: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows no word of any text and puts token 0 first."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "[UNK]": 1}, ["<s>", "[UNK]"][unknown]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def test_a_text_of_unknown_tokens_is_found_unless_they_are_the_prefix_itself():
    assert prefix_ids(words(unknown=1)) == (0,)
    with pytest.raises(ValueError, match=r"unclear.*'a' is \[0, 0\] by default and \[0\] without"):
        prefix_ids(words(unknown=0))


class Lowered(PreTrainedTokenizerFast):
    """It changes the text where it adds special tokens."""

    def __call__(self, texts, add_special_tokens=True, **how):
        texts = [text.swapcase() for text in texts] if add_special_tokens else texts
        return super().__call__(texts, add_special_tokens=False, **how)


class Counting(PreTrainedTokenizerFast):
    """It puts the length of a text before it."""

    def __call__(self, texts, add_special_tokens=True, **how):
        return {"input_ids": [[len(t)] * add_special_tokens + [300] for t in texts]}


@pytest.mark.parametrize("kind", [Lowered, Counting])
def test_a_tokenizer_that_does_more_than_add_special_tokens_is_refused(kind):
    tokenizer = kind(tokenizer_object=byte_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"'a' is \[.*\] by default and \[.*\] without.*add_bos"):
        prefix_ids(tokenizer)


def test_blocks_that_begin_are_those_that_are_found_to_begin():
    text = torch.arange(12, dtype=torch.int32).view(3, 4)
    blocks = begin(text, (BOS, EOS))
    assert blocks.dtype == torch.int32 and blocks.tolist()[1] == [BOS, EOS, 4, 5, 6, 7]
    assert begin(text, ()) is text
    check_begin(blocks, (BOS, EOS), "a test")
    check_begin(blocks, (BOS,), "a test")
    check_begin(text, (), "a test")
    blocks[2, 1] = 7
    with pytest.raises(ValueError, match=r"a test: block 2 begins with \[256, 7\].*\[256, 257\]"):
        check_begin(blocks, (BOS, EOS), "a test")
    with pytest.raises(ValueError, match=r"begins with \[256\].*make the blocks with pack"):
        check_begin(blocks[:, :1], (BOS, EOS), "a test")


def test_all_tokens_are_counted_but_the_one_that_is_predicted_nowhere():
    text = torch.arange(12).view(3, 4)
    assert counted(text, ()).tolist() == list(range(12))
    assert counted(begin(text, (BOS,)), (BOS,)).tolist() == list(range(12))
    assert counted(begin(text[:1], (BOS, EOS)), (BOS, EOS)).tolist() == [EOS, 0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"counting tokens: block 0 begins with \[0\]"):
        counted(text, (BOS,))
