import math
from dataclasses import replace

import pytest
import torch

from sparse.tasks.batch import REST, TaskBatch, check_vocabulary, logit_difference, task_nats
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


def test_a_one_sided_loss_is_the_log_probability_over_the_whole_vocabulary(bpe):
    batch = get_task("else_elif").batch(bpe, "test")
    n = batch.n_pairs
    assert batch.one_sided and (batch.foil[:n] == REST).all() and (batch.target[n:] == REST).all()
    logits = torch.randn(2 * n, len(bpe), dtype=torch.float64, requires_grad=True)
    token = batch.target[:n].repeat(2)
    logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    oracle = torch.cat([-logp[:n], -(-logp[n:].exp()).log1p()])
    loss = task_nats(logits, batch)
    torch.testing.assert_close(loss, oracle)
    ours, theirs = (
        torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, oracle)
    )
    torch.testing.assert_close(ours, theirs)
    p = torch.sigmoid(logit_difference(logits, batch))
    torch.testing.assert_close(p[:n], logp[:n].exp())
    two_sided = replace(batch, targets=((":", "("),), target=token, foil=token.roll(1) * 0 + 5)
    assert not torch.allclose(task_nats(logits, two_sided), oracle)  # control: REST matters


def test_one_sided_and_other_pairs_may_stand_in_one_batch(bpe):
    """Every row is scored by its own rule: the batch gives what its parts give."""
    some = torch.arange(4)
    one, two = (get_task(name).batch(bpe, "test").take(some) for name in ("else_elif", "for_while"))
    assert one.one_sided and not two.one_sided
    rows = torch.tensor([0, 1, 4, 5])  # two pairs of the first, and two of the second
    mixed = replace(
        one,
        target=torch.cat([one.target[rows], two.target[rows]]),
        foil=torch.cat([one.foil[rows], two.foil[rows]]),
    )
    logits = torch.randn(8, len(bpe))
    apart = [task_nats(logits[:4], one.take(rows[:2])), task_nats(logits[4:], two.take(rows[:2]))]
    torch.testing.assert_close(task_nats(logits, mixed), torch.cat(apart))


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
    frames = batch.groups["frame"]
    assert part.groups["frame"] == (frames[5], frames[2]) and len(frames) == n


def test_levels_count_the_units_that_pairs_share_and_not_the_pairs(bpe):
    batch = get_task("while_return_true").batch(bpe, "test")
    assert batch.levels()["frame"] == len(set(batch.groups["frame"])) < batch.n_pairs
    frames = batch.groups["frame"]
    same = [i for i in range(batch.n_pairs) if frames[i] == frames[0]]
    assert batch.take(torch.tensor(same)).levels()["frame"] == 1
    assert replace(batch, groups={"word": ("", "a", "b")}).levels() == {"word": 2}


def test_the_last_token_tells_some_tasks_and_not_others(bpe):
    shares = {n: get_task(n).batch(bpe, "test").told_by_last_token() for n in ("else_elif", "a_an")}
    assert shares == {"else_elif": 1.0, "a_an": 1.0}
    assert get_task("while_return_true").batch(bpe, "test").told_by_last_token() == 0
    assert get_task("single_double_quote").batch(bpe, "test").told_by_last_token() == 0
    mixed = get_task("agreement").batch(bpe, "test")
    rows = torch.arange(len(mixed.last))
    ends = mixed.ids[rows, mixed.last]
    n = mixed.n_pairs
    oracle = sum(int(ends[i] != ends[i + n]) for i in range(n)) / n
    assert abs(mixed.told_by_last_token() - oracle) < 1e-6 and 0 < oracle < 1


def test_a_batch_is_not_compared_by_value_and_moves_whole(bpe):
    batch = get_task("single_double_quote").batch(bpe, "test")
    assert isinstance(batch, TaskBatch) and batch.to("meta").ids.device.type == "meta"


def test_a_tokenizer_must_match_the_models_vocabulary(bpe):
    n = len(bpe)
    check_vocabulary(bpe, n)
    for size in (n - 1, int(1.06 * n)):
        with pytest.raises(ValueError, match=f"{n} entries but the model has {size}"):
            check_vocabulary(bpe, size)
