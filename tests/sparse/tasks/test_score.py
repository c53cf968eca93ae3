import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.tasks.score import DOES, clustered_stderr, score_batch, tokenizer_of
from sparse.tasks.suite import get_task

NAME = "while_return_true"


class Knows(nn.Module):
    """Answers by whether the prompt holds a token of first contexts only: logit +-strength."""

    def __init__(self, batch, tokens: set[int], strength: float) -> None:
        super().__init__()
        self.vocab, self.strength = int(batch.ids.max()) + 1, strength
        self.tokens = torch.tensor(sorted(tokens))
        self.targets = int(batch.target[0]), int(batch.target[-1])
        self.vocab = max(self.vocab, *self.targets) + 1
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        seen = torch.isin(input_ids, self.tokens).any(1).float() * 2 - 1
        logits = torch.zeros(*input_ids.shape, self.vocab)
        logits[..., self.targets[0]] = (self.strength * seen / 2)[:, None]
        logits[..., self.targets[1]] = -(self.strength * seen / 2)[:, None]
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def batch(bpe):
    return get_task(NAME).batch(bpe, "test")


@pytest.fixture(scope="module")
def tokens(batch):
    """The tokens that first contexts hold and second ones do not."""
    n = batch.n_pairs
    return set(batch.ids[:n].flatten().tolist()) - set(batch.ids[n:].flatten().tolist())


def test_a_model_that_knows_scores_its_margin_and_one_that_does_not_chance(batch, tokens):
    for strength in (4.0, 1.0, 0.0, -2.0):
        score = score_batch(Knows(batch, tokens, strength), batch)
        assert score.nats == pytest.approx(math.log1p(math.exp(-strength)), rel=1e-5)
        assert score.accuracy == (1.0 if strength > 0 else 0.0)
        assert score.does == (score.nats <= DOES) and score.chance == pytest.approx(math.log(2))
        assert score.n_pairs == batch.n_pairs and score.levels == batch.levels()
        assert score.paired == (1.0 if strength > 0 else 0.0)
    blind = score_batch(Knows(batch, {-5}, 4.0), batch)  # always the second answer
    assert (
        blind.paired == 0.0
        and blind.accuracy == 0.5
        and blind.nats > math.log(2)
        and not blind.does
    )


def test_nats_by_group_are_means_over_the_pairs_of_a_level(batch, bpe):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(bpe), n_layer=1, n_embd=16, n_head=2, initializer_range=0.5)
    )
    score = score_batch(model, batch)
    assert model.training  # left as it was
    frames = batch.groups["frame"]
    level = frames[3]
    part = batch.take(torch.tensor([i for i, f in enumerate(frames) if f == level]))
    assert score.nats_by["frame"][level] == pytest.approx(score_batch(model, part).nats, rel=1e-5)
    assert score.worst[1] == max(score.nats_by["frame"].values())
    weights = [frames.count(f) / len(frames) for f in score.nats_by["frame"]]
    mean = sum(w * x for w, x in zip(weights, score.nats_by["frame"].values(), strict=True))
    assert score.nats == pytest.approx(mean, rel=1e-6)


def test_a_constant_liking_for_one_answer_spoils_the_accuracy_and_not_paired(batch, tokens):
    class Biased(Knows):
        def forward(self, input_ids, attention_mask):
            out = super().forward(input_ids, attention_mask)
            out.logits[..., self.targets[0]] += 9.0
            return out

    score = score_batch(Biased(batch, tokens, 4.0), batch)
    assert (score.accuracy, score.paired) == (0.5, 1.0) and not score.does
    against = score_batch(Biased(batch, tokens, -4.0), batch)  # control: it tells them wrongly
    assert (against.accuracy, against.paired) == (0.5, 0.0)


def test_by_group_pairs_without_a_level_are_left_out_and_the_others_counted(batch, tokens):
    named = replace(batch, groups={"word": ("", *("a",) * 3, *("b",) * (batch.n_pairs - 4))})
    score = score_batch(Knows(batch, tokens, 4.0), named)
    assert score.n_by == {"word": {"a": 3, "b": batch.n_pairs - 4}}
    assert set(score.nats_by["word"]) == {"a", "b"} and score.levels == {"word": 2}


def test_every_kind_of_model_is_scored_by_the_same_numbers(bpe):
    """A SparseGPT scores the same through its own head for scored positions and as a HF model."""
    torch.manual_seed(0)
    model = SparseGPT(
        SparseGPTConfig(vocab_size=len(bpe), hidden_size=16, num_hidden_layers=1, head_dim=4)
    )
    task = get_task(NAME)
    own = task.score(model, bpe, "test")
    wrapped = nn.Module()
    wrapped.forward = lambda input_ids, attention_mask: model(input_ids=input_ids)  # type: ignore
    wrapped.device = torch.device("cpu")
    plain = score_batch(wrapped, task.batch(bpe, "test"))
    assert own.nats == pytest.approx(plain.nats, rel=1e-5) and own.accuracy == plain.accuracy


def test_dropout_is_off_while_scoring_and_every_module_gets_its_mode_back(batch, bpe):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(bpe), n_layer=1, n_embd=16, n_head=2))
    model.train()
    model.transformer.h[0].mlp.eval()
    one, two = score_batch(model, batch), score_batch(model, batch)
    assert one.nats == two.nats
    assert model.training and not model.transformer.h[0].mlp.training
    ids = batch.ids[:4]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # control: dropout is on


def test_the_standard_error_counts_units_and_not_pairs():
    torch.manual_seed(0)
    level = torch.randn(8, dtype=torch.float64)
    values = level.repeat_interleave(12)  # twelve pairs a level say the same thing
    groups = {"frame": tuple(str(i // 12) for i in range(96))}
    clustered = clustered_stderr(values, groups)
    assert clustered == pytest.approx(float(level.std() / 8**0.5), rel=1e-6)
    naive = clustered_stderr(values, {})
    assert naive == pytest.approx(float(values.std() / 96**0.5), rel=1e-6)
    assert clustered > 3 * naive
    apart = torch.randn(96, dtype=torch.float64)
    assert clustered_stderr(apart, groups) < 2 * clustered_stderr(apart, {})
    assert clustered_stderr(apart, {"one": ("a",) * 96}) == clustered_stderr(apart, {})
    assert clustered_stderr(torch.ones(1), {}) == float("inf")


def test_pairs_without_a_level_are_units_of_their_own():
    torch.manual_seed(1)
    apart = torch.randn(96, dtype=torch.float64)
    plain = clustered_stderr(apart, {})
    half = {"word": (*(f"w{i}" for i in range(48)), *("",) * 48)}
    assert clustered_stderr(apart, half) == pytest.approx(plain)
    assert clustered_stderr(apart, {"word": ("a",) * 48 + ("",) * 48}) == plain  # one level
    apart[48:] += 1
    lumped = {"word": (*(f"w{i}" for i in range(48)), *("rest",) * 48)}
    assert clustered_stderr(apart, lumped) > 1.8 * clustered_stderr(apart, half)  # control


def test_the_tokenizer_must_be_the_models_and_be_found(batch, bpe):
    model = SparseGPT(SparseGPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="entries but the model has 50 logits"):
        get_task(NAME).score(model, bpe)
    with pytest.raises(ValueError, match="made in memory, so it has no folder"):
        tokenizer_of(model, "Task.score")


def test_prompts_longer_than_the_model_are_refused_with_its_length(bpe):
    model = SparseGPT(
        SparseGPTConfig(
            vocab_size=len(bpe), hidden_size=16, num_hidden_layers=1, max_position_embeddings=6
        )
    )
    with pytest.raises(ValueError, match=r"prompt longer than the model.*6 positions"):
        get_task(NAME).score(model, bpe)
