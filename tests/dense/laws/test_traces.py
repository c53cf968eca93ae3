"""Edits in traces of one's own: invokes, generation, gradients, memory.

The oracle is plain torch hooks on the blocks of the original model, written from each family's
source: no twin, no site module, no nnsight. It generates by running the whole prefix every step.
"""

import ctypes
import gc
from contextlib import ExitStack, contextmanager

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerFast

from dense import (
    DenseModel,
    Edit,
    LiveEdit,
    apply_edits,
    editing,
    generate_edited,
    run_edited,
    trace_model,
)
from dense.edit import check_amount, check_site

HOOKED = ("gpt2", "llama", "gemma2", "gpt_neox")
ADDS_ATTENTION = {  # the module of a block whose output is added to the stream before the MLP
    "gpt2": "attn",
    "llama": "self_attn",
    "gemma2": "post_attention_layernorm",
}
NEW = 4
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None}
STEPS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(params=HOOKED)
def hookable(request, opened):
    return opened(request.param)


@pytest.fixture(scope="session")
def spoken(make):
    """`spoken(family)`: a model whose tokenizer reads "t1 t2 t3" as [1, 2, 3] and pads with 0."""

    def open_with_tokenizer(family):
        vocab = {f"t{i}": i for i in range(101)}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0")
        return DenseModel(make(family), fast, name=family)

    return open_with_tokenizer


def text(ids):
    return " ".join(f"t{i}" for i in ids)


def direction(seed, *shape):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


@contextmanager
def moved(dense, deltas):
    """Hooks on the original's blocks that add deltas[site](stream) at each site."""
    blocks, stack = dense.layout.blocks, ExitStack()

    def after(module, delta):
        def hook(_m, _a, out):
            if isinstance(out, tuple):
                return (out[0] + delta(out[0]), *out[1:])
            return out + delta(out)

        stack.callback(module.register_forward_hook(hook).remove)

    def before(block, delta):
        def hook(_m, args):
            return (args[0] + delta(args[0]), *args[1:])

        stack.callback(block.register_forward_pre_hook(hook).remove)

    for site, delta in deltas.items():
        k, mid = divmod(site, 2) if dense.has_mid else (site, 0)
        if k == len(blocks):
            after(blocks[-1], delta)
        elif mid:
            after(getattr(blocks[k], ADDS_ATTENTION[dense.model_type]), delta)
        else:
            before(blocks[k], delta)
    with stack:
        yield dense.model


def by_blocks(dense, ids, deltas):
    with moved(dense, deltas) as model:
        return model(input_ids=ids, use_cache=False).logits


def generated_by_blocks(dense, ids, deltas, n=NEW):
    """Greedy tokens and the logits they came from, the whole prefix anew at every step."""
    logits = []
    for _ in range(n):
        logits.append(by_blocks(dense, ids, deltas)[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], -1)
    return ids, torch.stack(logits)


def close(a, b, tol=2e-4):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@torch.no_grad()
def test_an_edit_at_any_site_is_a_hook_on_the_block_of_the_original(hookable, ids):
    for site in range(hookable.n_sites):
        delta = direction(site, *ids.shape)
        got = run_edited(hookable, ids, [Edit(site=site, direction=delta, amount=0.5)])
        close(got, by_blocks(hookable, ids, {site: lambda h, d=delta: 0.5 * d}))
        assert (got - hookable.logits(ids)).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_count_the_real_tokens_of_each_row(opened, ids, family, side):
    dense, u = opened(family), direction(1)
    for position in (0, 3, -1, (1, -2), None):
        edit = Edit(site=1, direction=u, position=position)
        rows = [row[: 10 - 3 * i] for i, row in enumerate(ids)]
        gaps = [((10 - len(r)), 0) if side == "left" else (0, 10 - len(r)) for r in rows]
        padded = torch.stack([pad(r, g) for r, g in zip(rows, gaps, strict=True)])
        mask = torch.stack([pad(torch.ones_like(r), g) for r, g in zip(rows, gaps, strict=True)])
        if position is not None:
            delta = edit.delta(torch.zeros(3, 10, 32), mask)
            assert (delta[mask == 0] == 0).all() and (delta[mask == 1] != 0).any()
        got = run_edited(dense, padded, [edit], mask)
        for y, real, row in zip(got, mask.bool(), rows, strict=True):
            where = torch.zeros(len(row), 1)
            where[list(position) if isinstance(position, tuple) else position] = 1
            close(y[real], by_blocks(dense, row[None], {1: lambda h, w=where: w * u})[0])
    with pytest.raises(ValueError, match=r"positions \[4\] are outside -4\.\.3"):
        run_edited(dense, padded, [Edit(site=1, direction=u, position=(0, 4))], mask)


@torch.no_grad()
@pytest.mark.parametrize("family", HOOKED)
def test_each_of_several_invokes_has_edits_of_its_own_as_if_it_ran_alone(spoken, ids, family):
    dense = spoken(family)
    lm = trace_model(dense)
    a, b, c = ids[0, :4] + 1 - (ids[0, :4] == 100) * 1, ids[1, :9], ids[2, :6]
    each = direction(2, 1, 4)
    with lm.trace() as tracer:
        with tracer.invoke(text(a)):
            apply_edits(lm, dense, [Edit(site=2, direction=each)])
            at_a = lm.output.logits.save()
        with tracer.invoke(text(b)):
            untouched = lm.output.logits.save()
        with tracer.invoke(text(c)):
            edits = [
                Edit(site=1, direction=direction(3), position=0),
                Edit(site=2, direction=direction(4)),
            ]
            apply_edits(lm, dense, edits, attention_mask=torch.ones(1, 6))
            at_c = lm.output.logits.save()
    first = torch.zeros(6, 1)
    first[0] = 1
    wants = {1: lambda h: first * direction(3), 2: lambda h: direction(4)}
    close(at_a[:, -4:], by_blocks(dense, a[None], {2: lambda h: each}))
    close(untouched[:, -9:], by_blocks(dense, b[None], {}))
    close(at_c[:, -6:], by_blocks(dense, c[None], wants))
    assert (at_c[:, -6:] - by_blocks(dense, c[None], {})).abs().max() > 0.01
    with pytest.raises(ValueError, match="unclear where position 0 is; pass attention_mask="):
        with lm.trace() as tracer:
            with tracer.invoke(text(a)):
                apply_edits(lm, dense, [Edit(site=1, direction=direction(3), position=0)])
            with tracer.invoke(text(b)):
                untouched = lm.output.logits.save()


def at_prompt(delta):
    """The oracle's rule: `delta` at the prompt's positions, nothing at later ones."""
    return lambda h: pad(delta, (0, 0, 0, h.shape[1] - delta.shape[-2]))


def kinds_of_edits(n):
    """(name, edits, what the oracle's hooks add to a stream of any length)."""
    u, each = direction(5), direction(6, 3, n)
    ends = torch.zeros(n, 1)
    ends[[0, -1]] = 2.0
    ramp = torch.linspace(0, 1, n)
    everywhere = Edit(site=1, direction=u, amount=2.0)
    yield "everywhere", [everywhere], {1: lambda h: 2 * u}
    yield (
        "named positions",
        [Edit(site=1, direction=u, amount=2.0, position=(0, -1))],
        {1: at_prompt(ends * u)},
    )
    yield "one for each position", [Edit(site=2, direction=each)], {2: at_prompt(each)}
    yield (
        "an amount for each position",
        [Edit(site=2, direction=u, amount=ramp)],
        {2: at_prompt(ramp[:, None] * u)},
    )
    yield (
        "the prompt alone, beside everywhere",
        [everywhere, Edit(site=2, direction=u, prompt_only=True)],
        {1: lambda h: 2 * u, 2: at_prompt(u.expand(n, 32))},
    )


@torch.no_grad()
def test_generation_is_edited_at_every_step_with_a_cache_and_without(hookable, ids):
    ids, plain = ids[:, :5], generated_by_blocks(hookable, ids[:, :5], {})
    for name, edits, deltas in kinds_of_edits(5):
        want, logits = generated_by_blocks(hookable, ids, deltas)
        for cached in (True, False):
            out = generate_edited(hookable, ids, edits, use_cache=cached, **GREEDY, **STEPS)
            assert torch.equal(out.sequences, want), name
            close(torch.stack(out.logits), logits)
        assert (logits[1:] - plain[1][1:]).abs().max() > 0.01, name
    untouched = generate_edited(hookable, ids, [], **GREEDY, **STEPS)
    assert torch.equal(untouched.sequences, plain[0])


@torch.no_grad()
def test_an_edit_of_the_first_step_alone_is_another_generation(opened, ids):
    """Control: the oracle sees the difference between every step and the first."""
    dense, ids, u = opened("gpt2"), ids[:, :5], direction(5)
    _, every = generated_by_blocks(dense, ids, {1: lambda h: 2 * u})
    _, first = generated_by_blocks(dense, ids, {1: at_prompt(2 * u.expand(5, 32))})
    close(every[0], first[0])
    assert (every[1:] - first[1:]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padded_prompts_generate_as_each_does_alone(opened, ids, family):
    dense, rows = opened(family), [ids[0, :6], ids[1, :3]]
    padded = torch.stack([rows[0], pad(rows[1], (3, 0))])
    mask = torch.stack([torch.ones(6), pad(torch.ones(3), (3, 0))]).long()
    edits = [
        Edit(site=1, direction=direction(5), amount=2.0),
        Edit(site=2, direction=direction(6), amount=3.0, position=0),
    ]
    got = generate_edited(dense, padded, edits, mask, **GREEDY, **STEPS)
    for i, row in enumerate(rows):
        alone = generate_edited(dense, row[None], edits, **GREEDY, **STEPS)
        assert torch.equal(got.sequences[i, 6:], alone.sequences[0, len(row) :])
        close(torch.stack(got.logits)[:, i], torch.stack(alone.logits)[:, 0])


@torch.no_grad()
def test_a_live_edit_follows_the_tokens_generated(hookable, ids):
    ids, table = ids[:, :5], direction(7, 101)

    def compute(tokens, _mask):  # from a token and the one before it
        before = pad(table[tokens], (0, 0, 1, 0))[:, :-1]
        return table[tokens] + before

    live, seen = LiveEdit(site=1, compute=compute, amount=0.5), ids
    for _ in range(NEW):
        delta = 0.5 * compute(seen, None)
        y = by_blocks(hookable, seen, {1: lambda h, d=delta: d})
        close(run_edited(hookable, seen, [live]), y)
        seen = torch.cat([seen, y[:, -1:].argmax(-1)], -1)
    for cached in (True, False):
        assert torch.equal(generate_edited(hookable, ids, [live], use_cache=cached, **GREEDY), seen)
    with pytest.raises(ValueError, match="num_beams=2: a live edit follows the tokens"):
        generate_edited(hookable, ids, [live], num_beams=2, max_new_tokens=2)
    wrong = LiveEdit(site=1, compute=lambda tokens, mask: table[tokens][:, :1])
    with pytest.raises(ValueError, match=r"compute gave \(3, 1, 32\)"):
        run_edited(hookable, ids, [wrong])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_edits_enter_a_generation_of_ones_own_step_by_step(spoken, ids, family):
    dense = spoken(family)
    lm, prompt = trace_model(dense), ids[:1, :5] % 99 + 1
    edits = [edit for _, some, _ in kinds_of_edits(5) for edit in some if edit.direction.ndim == 1]
    late = dense.site_path(dense.n_sites - 1)
    want = generate_edited(dense, prompt, edits, **GREEDY, **STEPS)
    with lm.generate(text(prompt[0]), **GREEDY) as tracer:
        seen = list().save()
        for step in tracer.iter[:NEW]:
            apply_edits(lm, dense, edits, step=step)
            seen.append(lm.get(late).output.clone())
        out = tracer.result.save()
    assert torch.equal(out, want.sequences)
    assert [h.shape[1] for h in seen] == [5] + [1] * (NEW - 1)
    again = dense.unembed(torch.cat([h[:, -1:] for h in seen], 1), out[:, 4:-1])
    close(again[0], torch.stack(want.logits)[:, 0])


@torch.no_grad()
def test_as_a_context_edits_hold_for_every_trace_and_generation_in_it(spoken, ids):
    dense = spoken("llama")
    lm, u, prompt = trace_model(dense), direction(5), ids[:1, :5] % 99 + 1
    edits, path = [Edit(site=2, direction=u, amount=2.0)], dense.site_path(2)
    with editing(lm, dense, edits) as edited:
        for _ in range(2):
            with edited.trace(text(prompt[0])):
                h = edited.get(path).output.clone().save()
                logits = edited.output.logits.save()
            assert torch.equal(h, dense.residuals(prompt)[2] + 2 * u)
            assert torch.equal(logits, run_edited(dense, prompt, edits))
        out = edited.generate(text(prompt[0]), **GREEDY)
        with edited.trace(text(prompt[0])):  # one's own edit comes after those of the context
            edited.get(path).output = edited.get(path).output - 2 * u
            back = edited.output.logits.save()
        with editing(edited, dense, edits) as twice:
            with twice.trace(text(prompt[0])):
                both = twice.output.logits.save()
        with lm.trace(text(prompt[0])):
            plain = lm.output.logits.save()
    with edited.trace(text(prompt[0])):
        after = edited.output.logits.save()
    assert torch.equal(out, generate_edited(dense, prompt, edits, **GREEDY))
    close(both, run_edited(dense, prompt, edits * 2), 1e-5)
    assert torch.equal(plain, dense.logits(prompt)) and torch.equal(after, plain)
    close(back, plain, 1e-4)


def test_gradients_pass_through_an_edit_to_direction_and_amount_in_any_trace(hookable, ids):
    def slopes(run):
        u, amount = direction(0).requires_grad_(), torch.full((3, 1), 0.5, requires_grad=True)
        run(u, amount)[:, -1].logsumexp(-1).sum().backward()
        return u.grad, amount.grad

    def by_trace(u, amount):
        lm = trace_model(hookable)
        with lm.trace(**hookable.inputs(ids)):
            apply_edits(lm, hookable, [Edit(site=1, direction=u, amount=amount)])
            logits = lm.output.logits.save()
        return logits

    def by_context(u, amount):
        edits = [Edit(site=1, direction=u, amount=amount)]
        with editing(trace_model(hookable), hookable, edits) as lm:
            with lm.trace(**hookable.inputs(ids)):
                logits = lm.output.logits.save()
        return logits

    want = slopes(lambda u, a: by_blocks(hookable, ids, {1: lambda h: a[..., None] * u}))
    assert all(g.norm() > 1e-3 for g in want)
    for run in (
        by_trace,
        by_context,
        lambda u, a: run_edited(hookable, ids, [Edit(site=1, direction=u, amount=a)]),
    ):
        for got, g in zip(slopes(run), want, strict=True):
            close(got, g)


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def resident_mib():
    """Memory of this process in RAM, MiB, when what is free was given back."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def test_a_hundred_interventions_leave_neither_tensors_nor_memory_behind(opened, ids):
    dense, rows = opened("gpt2"), ids.repeat(20, 3)  # logits of 0.7 MiB
    edits = [Edit(site=1, direction=direction(0).requires_grad_())]

    def grown(times, kept):
        """Tensors and MiB more than before, after interventions of three kinds in turn."""
        before, mib = tensors_alive(), resident_mib()
        for i in range(times):
            if i % 4 == 3:
                generate_edited(dense, ids, edits, max_new_tokens=2, do_sample=False)
                continue
            y = run_edited(dense, rows, edits)
            if i % 4 == 2:
                y.sum().backward()
            if kept is not None:
                kept.append(y.detach())
            del y
        return tensors_alive() - before, resident_mib() - mib

    grown(8, None)
    tensors, mib = grown(100, None)
    assert tensors == 0 and mib < 5
    leak = []  # control: what is kept is seen
    tensors, mib = grown(100, leak)
    assert tensors == len(leak) == 75 and mib > 25


def test_what_is_no_site_no_amount_or_no_wrapper_of_a_twin_is_refused(opened, ids):
    import nnsight

    dense, u = opened("gpt2"), direction(0)
    for site in (1.0, "1", True, None):
        with pytest.raises(ValueError, match="must be an int, the index of a residual site"):
            check_site(site)
    for amount in ("1", None):
        with pytest.raises(ValueError, match="amount=.* must be a finite number"):
            check_amount(amount, "amount")
    for amount in (float("nan"), float("inf"), torch.tensor([0.0, float("nan")])):
        for make in (
            lambda a: Edit(site=1, direction=u, amount=a),
            lambda a: LiveEdit(site=1, compute=lambda ids, mask: u, amount=a),
        ):
            with pytest.raises(ValueError, match="Edit at site 1: amount=.* must be a finite"):
                make(amount)
    with pytest.raises(ValueError, match="must be an int"):
        Edit(site=True, direction=u)
    edits, other = [Edit(site=1, direction=u)], DenseModel(opened("gpt2").model)
    for wrapper, why in (
        (nnsight.NNsight(dense.model), "of the plain model, which has no module at .* trace_model"),
        (trace_model(opened("llama")), "of another model than gpt2"),
        (dense.model, "GPT2LMHeadModel is no nnsight wrapper; make one with trace_model"),
    ):
        for call in (apply_edits, lambda *a: editing(*a).__enter__()):
            with pytest.raises(ValueError, match=why):
                call(wrapper, dense, edits)
    with editing(trace_model(other), dense, edits) as fine:  # two DenseModels of one model
        assert fine is not None
