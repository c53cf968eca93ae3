"""One policy for what stands before a text: blocks, prompts and traces begin with it, and it pays.

A model that was trained on blocks with a beginning of text (BOS) predicts text better with it than
without. A model that was trained without one gains nothing: that is the control.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.losses.quantities import ce_nats
from dense import DenseModel, Edit, generate_edited, run_edited, trace_model
from sparse import Batches, pack, prefix_ids
from sparse.ops.prefix import begin
from tests.helpers.prefixed import BOS, EOS, byte_tokenizer

LENGTH, STEPS = 8, 300


def walk(seed: int, letters: int = 20_000) -> str:
    """A text in which each letter is followed by one of three others, all equally likely."""
    follow = torch.randint(0, 26, (26, 3), generator=torch.Generator().manual_seed(0))
    turns = torch.randint(0, 3, (letters,), generator=torch.Generator().manual_seed(seed))
    now, text = 0, ""
    for turn in turns.tolist():
        now = int(follow[now, turn])
        text += chr(ord("a") + now)
    return text


def trained(template: str) -> DenseModel:
    """A small GPT-2 trained on blocks that begin as this tokenizer begins a text."""
    torch.manual_seed(0)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ends = dict(bos_token_id=BOS, eos_token_id=EOS)
    shape = dict(vocab_size=EOS + 1, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    model, tokenizer = GPT2LMHeadModel(GPT2Config(**shape, **off, **ends)), byte_tokenizer(template)
    batches = Batches(pack([walk(1)], tokenizer, LENGTH), 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        ids = batches.at(step)
        loss = ce_nats(model(input_ids=ids).logits, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return DenseModel(model, tokenizer)


@pytest.fixture(scope="module")
def models() -> dict[str, DenseModel]:
    return {"with": trained("<s> $A"), "without": trained("$A")}


@torch.no_grad()
def gain(dense: DenseModel) -> tuple[float, float]:
    """Nats per token by which a BOS lowers the held-out loss, and their standard error.

    Both means are over the same predicted tokens: all but the first of every piece of text.
    """
    text = pack([walk(2)], byte_tokenizer(), LENGTH - 1)[:1000]
    blocks = begin(text, (BOS,))
    with_it = ce_nats(dense.logits(blocks), blocks)[:, 1:]
    by_block = (ce_nats(dense.logits(text), text) - with_it).mean(1)
    return by_block.mean().item(), (by_block.std() / len(by_block) ** 0.5).item()


def test_a_model_trained_with_a_bos_predicts_better_with_it_and_control_one_without_does_not(
    models,
):
    nats, error = gain(models["with"])
    assert nats > 0.1 and nats > 10 * error  # measured: 0.51 +- 0.02; other seeds 0.23 and 0.44
    nats, error = gain(models["without"])
    assert nats < 0.02  # measured: -0.001 +- 0.002; other seeds 0.003 and -0.001


def test_a_text_in_a_trace_and_ids_of_the_tokenizer_begin_alike(models):
    for dense, first in ((models["with"], [BOS]), (models["without"], [])):
        text = "abcd"
        ids = dense.tokenizer(text, return_tensors="pt").input_ids
        assert ids[0].tolist()[:-4] == first == list(prefix_ids(dense.tokenizer))
        traced = trace_model(dense)
        with traced.trace(text):
            logits = traced.output.logits.save()
        torch.testing.assert_close(logits, dense.logits(ids))
        nothing = [Edit(site=1, direction=torch.ones(32), amount=0.0)]
        assert torch.equal(run_edited(dense, ids, nothing), dense.logits(ids))
        new = generate_edited(dense, ids, nothing, max_new_tokens=3, do_sample=False)
        with traced.generate(text, max_new_tokens=3, do_sample=False) as tracer:
            own = tracer.result.save()
        assert new.tolist() == own.tolist()
