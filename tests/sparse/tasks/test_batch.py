import math
from dataclasses import replace

import torch

from sparse.tasks.batch import TaskBatch, task_nats
from sparse.tasks.suite import get_task


def test_the_loss_is_cross_entropy_between_the_two_tokens_and_ln_2_by_chance(bpe):
    batch = get_task("single_double_quote").batch(bpe, "test")
    logits = torch.randn(2 * batch.n_pairs, len(bpe))
    both = torch.stack([batch.target, batch.foil], dim=1)
    oracle = -logits.gather(1, both).log_softmax(-1)[:, 0]
    torch.testing.assert_close(task_nats(logits, batch), oracle)
    chance = task_nats(torch.zeros_like(logits), batch)
    torch.testing.assert_close(chance, torch.full_like(chance, math.log(2)))
    swapped = replace(batch, target=batch.foil, foil=batch.target)
    assert not torch.allclose(task_nats(logits, swapped), oracle)


def test_scored_counterfactual_and_take_pick_the_right_rows(bpe):
    batch = get_task("while_return_true").batch(bpe, "test")
    n = batch.n_pairs
    logits = torch.randn(*batch.ids.shape, 3)
    rows = [logits[i, batch.last[i]] for i in range(2 * n)]
    assert torch.equal(batch.scored(logits), torch.stack(rows))
    other = batch.counterfactual()
    assert torch.equal(other[:n], batch.ids[n:]) and torch.equal(other[n:], batch.ids[:n])
    part = batch.take(torch.tensor([5, 2]))
    assert part.n_pairs == 2 and part.ids.shape[1] == part.last.max() + 1
    width = part.ids.shape[1]
    assert torch.equal(part.ids, batch.ids[[5, 2, 5 + n, 2 + n], :width])
    assert torch.equal(part.foil, batch.foil[[5, 2, 5 + n, 2 + n]])


def test_a_batch_is_not_compared_by_value_and_moves_whole(bpe):
    batch = get_task("single_double_quote").batch(bpe, "test")
    assert isinstance(batch, TaskBatch) and batch.to("meta").ids.device.type == "meta"
