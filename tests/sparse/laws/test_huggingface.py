"""What Hugging Face's tools ask of a model, beyond what test_gpt.py says of this one."""

import nnsight
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from sparse.circuits.taps import edited
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT

FIELDS = dict(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=4,
    intermediate_size=20,
    max_position_embeddings=16,
    activation_fraction=0.5,
    initializer_range=0.4,
)
EVERYTHING = dict(bigram_table=True, positions="learned", activation="relu")
NO_EOS = dict(pad_token_id=1, eos_token_id=None)


def build(seed=0, **fields):
    torch.manual_seed(seed)
    model = SparseGPT(SparseGPTConfig(**(FIELDS | fields))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn_like(p)
    return model


def random_ids(n=3, length=9, seed=0):
    return torch.randint(2, 31, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokenizer():
    vocab = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *(f"w{i}" for i in range(29))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", padding_side="left"
    )


@torch.no_grad()
@pytest.mark.parametrize("fields", [dict(), EVERYTHING], ids=["plain", "everything"])
def test_beam_search_with_a_cache_is_beam_search_without(fields):
    model, ids = build(**fields), random_ids(2, 4)
    how = dict(num_beams=3, max_new_tokens=4, do_sample=False, **NO_EOS)
    cached = model.generate(ids, use_cache=True, **how)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **how))
    logp = model(cached).logits.log_softmax(-1)[:, 3:-1]
    beam = logp.gather(-1, cached[:, 4:, None]).sum((1, 2))
    greedy = model.generate(ids, **(how | {"num_beams": 1}))
    logp = model(greedy).logits.log_softmax(-1)[:, 3:-1]
    assert (beam >= logp.gather(-1, greedy[:, 4:, None]).sum((1, 2)) - 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize("fields", [dict(), EVERYTHING], ids=["plain", "everything"])
def test_a_static_cache_and_drafted_tokens_change_no_greedy_answer(fields):
    model, ids = build(**fields), random_ids(1, 5)
    how = dict(max_new_tokens=6, do_sample=False, **NO_EOS)
    want = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, cache_implementation="static", **how), want)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **how), want)


@torch.no_grad()
def test_sampling_with_a_seed_is_repeatable_and_pads_on_the_left_do_not_matter():
    model, ids = build(**EVERYTHING), random_ids(1, 6)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    how = dict(max_new_tokens=5, do_sample=True, **NO_EOS)

    def sample(seed, *args, **kwargs):
        torch.manual_seed(seed)
        return model.generate(*args, **kwargs, **how)[0, -5:]

    alone = sample(3, ids)
    assert torch.equal(alone, sample(3, ids))
    assert torch.equal(alone, sample(3, padded, attention_mask=mask))
    assert any(not torch.equal(alone, sample(seed, ids)) for seed in range(4, 9))  # control


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [True, False])
def test_sdpa_and_eager_agree_also_after_switching_and_loading(padded, sinks, tmp_path):
    model, ids = build(attention_sinks=sinks), random_ids()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[1, :2] = 0
    real = mask.bool()
    sdpa = model(ids, attention_mask=mask).logits[real]
    model.save_pretrained(tmp_path, sparse=True)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    out = eager(ids, attention_mask=mask, output_attentions=True)
    assert (out.logits[real] - sdpa).abs().max() < 1e-5 and len(out.attentions) == 2
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids, attention_mask=mask).logits[real], out.logits[real])
    if sinks:  # control: without its sinks the model is another one
        for block in model.model.blocks:
            block.attn.sinks.fill_(-1e4)
        assert (model(ids, attention_mask=mask).logits[real] - sdpa).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name",
    ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "kernels/any"],
)
def test_attention_that_would_drop_the_sinks_is_refused(name, tmp_path):
    model = build()
    refused = pytest.raises(ValueError, match=r'knows nothing of the attention sinks; use "sdpa"')
    with refused:
        build(attn_implementation=name)
    with refused:
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with refused:
        SparseGPT.from_pretrained(tmp_path, attn_implementation=name)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("n", [40, 20])
def test_resizing_keeps_what_was_there_and_refuses_tables_of_the_vocabulary(n, tmp_path):
    model, ids = build(), random_ids() % 20
    before = model(ids).logits
    assert model.resize_token_embeddings(n) is model.get_input_embeddings()
    assert model.vocab_size == model.config.vocab_size == n == model.lm_head.out_features
    after = model(ids).logits
    assert after.shape[-1] == n
    k = min(n, 31)
    assert (after[..., :k] - before[..., :k]).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(SparseGPT.from_pretrained(tmp_path)(ids).logits, after)
    table = build(bigram_table=True)
    mark = table.fingerprint()
    with pytest.raises(ValueError, match="vocabulary of 31 cannot be resized.*bigram table"):
        table.resize_token_embeddings(n)
    with pytest.raises(ValueError, match="cannot be resized"):
        table.resize_token_embeddings(pad_to_multiple_of=64)
    assert table.resize_token_embeddings() is table.get_input_embeddings()
    assert table.fingerprint() == mark


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_nearly_the_same_by_every_road(dtype, tmp_path):
    model, ids = build(activation_fraction=1.0), random_ids()
    model.save_pretrained(tmp_path)
    want = model(ids).logits
    name = str(dtype).removeprefix("torch.")
    roads = [SparseGPT.from_pretrained(tmp_path, dtype=how) for how in (dtype, name)]
    roads.append(model.to(dtype))
    for half in roads:
        logits = half(ids).logits
        assert logits.dtype == dtype and torch.equal(logits, roads[0](ids).logits)
        error = (logits.float() - want).norm() / want.norm()
        assert 0 < error < 0.05
        out = half.generate(ids[:, :4], max_new_tokens=3, do_sample=False, **NO_EOS)
        assert out.shape == (3, 7)


def test_the_loss_over_several_batches_is_the_loss_over_their_tokens():
    model, ids = build(), random_ids(4)
    labels = ids.masked_fill(random_ids(4, seed=1) < 8, -100)
    n = int((labels[:, 1:] != -100).sum())
    parts = [model(ids[i], labels=labels[i], num_items_in_batch=n).loss for i in ([0], [1, 2, 3])]
    logp = model(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    want = F.nll_loss(logp, labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(sum(parts) - want) < 1e-5 < abs(sum(parts) / 2 - want)
    assert abs(model(ids, labels=labels, num_items_in_batch=torch.tensor(n)).loss - want) < 1e-5


def test_gradients_with_non_reentrant_checkpointing_are_the_same_also_in_part():
    ids, grads = random_ids(), []
    for checkpointed in (False, True):
        model = build(**EVERYTHING).train()
        model.model.wte.weight.requires_grad_(False)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(g is not None for g in grads[-1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_hidden_states_come_with_the_trunk_and_with_generation():
    model, ids = build(**EVERYTHING), random_ids(2, 5)
    z = model.residuals(ids)
    hidden = model.model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3  # as in Hugging Face: the residuals before each block, then the normed
    assert torch.equal(hidden[0], z[0]) and torch.equal(hidden[1], z[2])
    assert torch.equal(hidden[2], model.model.norm(z[4]))
    assert torch.equal(hidden[2], model.model(ids).last_hidden_state)
    out = model.generate(
        ids,
        max_new_tokens=2,
        do_sample=False,
        output_hidden_states=True,
        output_logits=True,
        return_dict_in_generate=True,
        **NO_EOS,
    )
    step = model.residuals(out.sequences[:, :6])
    assert (out.hidden_states[1][1][:, 0] - step[2][:, 5]).abs().max() < 1e-5
    assert (out.logits[1] - model(out.sequences[:, :6]).logits[:, -1]).abs().max() < 1e-5


def test_embeddings_can_be_replaced_and_frozen_as_adapters_do():
    model, ids = build(), random_ids()
    model.enable_input_require_grads()
    for p in model.parameters():
        p.requires_grad_(False)
    assert model(ids).logits.requires_grad  # gradients reach an adapter above frozen embeddings
    model.disable_input_require_grads()
    assert not model(ids).logits.requires_grad  # control
    shared = torch.nn.Embedding(31, 12)
    model.set_input_embeddings(shared)
    assert model.get_input_embeddings() is model.model.wte is shared
    head = torch.nn.Linear(12, 31, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.lm_head is head
    want = head(model.model(inputs_embeds=shared(ids)).last_hidden_state)
    assert torch.equal(model(ids).logits, want)


def test_a_pipeline_writes_what_generate_writes(tokenizer, tmp_path):
    model = build(**EVERYTHING)
    model.save_pretrained(tmp_path, sparse=True)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path))
    assert type(write.model) is SparseGPT
    how = dict(max_new_tokens=4, do_sample=False, return_full_text=False)
    prompts = ["w1 w2 w3 w4", "w7"]
    alone = [write(prompt, **how)[0]["generated_text"] for prompt in prompts]
    both = [out[0]["generated_text"] for out in write(prompts, batch_size=2, **how)]
    assert both == alone  # the shorter one is padded on the left
    for prompt, text in zip(prompts, alone, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=4, do_sample=False, **NO_EOS)[0, ids.shape[1] :]
        assert text == tokenizer.decode(new)


@pytest.mark.parametrize("location", ["0.attn.q", "0.mlp.post_act", "1.attn.resid_delta"])
def test_nnsight_reads_and_edits_a_node_location_as_plain_hooks_do(location):
    model, ids = build(**EVERYTHING), random_ids()
    with edited(model, {location: lambda x: 2 * x + 0.1}):
        want = model(ids).logits.detach()
    plain = model(ids).logits.detach()
    seen = []
    with edited(model, {location: lambda x: (seen.append(x.detach()), x)[1]}):
        model(ids)
    traced = nnsight.NNsight(model)
    node = traced.get(f"model.blocks.{location}")
    with traced.trace(ids):
        value = node.output.detach().clone().save()
        node.output = 2 * node.output + 0.1
        logits = traced.output.logits.detach().save()
    assert torch.equal(value, seen[0]) and torch.equal(logits, want)
    assert not torch.equal(want, plain) and torch.equal(model(ids).logits, plain)


def test_nnsight_generates_with_an_edit_at_every_step_as_plain_hooks_do(tokenizer):
    model, ids = build(**EVERYTHING), random_ids(2, 5)
    how = dict(max_new_tokens=4, do_sample=False, **NO_EOS)
    plain = model.generate(ids, **how)
    seen = []

    def edit(x):
        seen.append(x[:, -1].clone())
        return x * 0 + 0.7

    with edited(model, {"0.mlp.post_act": edit}):
        want = model.generate(ids, **how)
    traced = nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    with traced.generate(ids, **how) as tracer:
        values = list().save()
        for _ in tracer.iter[:4]:
            node = traced.model.blocks[0].mlp.post_act
            values.append(node.output[:, -1].clone())
            node.output = node.output * 0 + 0.7
        result = tracer.result.save()
    assert torch.equal(result, want) and not torch.equal(want, plain)
    assert len(values) == len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(values, seen, strict=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_tied_weights_are_stored_and_counted_once(sparse, tmp_path):
    model, ids = build(tie_word_embeddings=True), random_ids()
    assert model.lm_head.weight is model.model.wte.weight
    with torch.no_grad():
        model.model.wte.weight[3:] = 0
    model.save_pretrained(tmp_path, sparse=sparse)
    again, info = SparseGPT.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and again.lm_head.weight is again.model.wte.weight
    assert torch.equal(again(ids).logits, model(ids).logits)
    n = sum(p.numel() for p in model.parameters())
    assert f"whose {n:,} weights" in " ".join((tmp_path / "README.md").read_text().split())
    assert b"lm_head" not in (tmp_path / "model.safetensors").read_bytes()
