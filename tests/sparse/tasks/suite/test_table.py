import re

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sparse.tasks.suite import get_task
from sparse.tasks.suite.table import task_table
from sparse.tasks.task import Task


def model(bpe) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(bpe), n_layer=1, n_embd=16, n_head=2)).eval()


def test_a_table_has_a_row_for_what_can_be_asked_and_a_reason_for_what_cannot(bpe):
    lm = model(bpe)
    bad = Task.from_pairs("bad", [(f"a{i}", f"b{i} c d", "x", "y") for i in range(90)])
    table = task_table(lm, bpe, ["for_while", get_task("else_elif"), bad], split="test")
    assert [s.task for s in table.scores] == ["for_while", "else_elif"]
    assert table.scores[0] == get_task("for_while").score(lm, bpe, "test")
    assert [r.task for r in table.refused] == ["bad"] and table.does() == ()
    text = str(table)
    assert re.search(r"chance +0\.693 +0\.50", text) and "cannot be asked: task bad" in text
    assert "contexts of unequal length" in text and "test split" in text
    assert len(table.brief().splitlines()) == 3


def test_by_default_every_built_in_task_is_asked(bpe):
    table = task_table(model(bpe), bpe)
    assert len(table.scores) + len(table.refused) == 30
