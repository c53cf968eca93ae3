"""A co-training step against the same step written plainly, and against a plain dense step.

    python benchmarks/cotraining.py                      # L4, L12 and W: times and memory
    python benchmarks/cotraining.py --sizes S M --repeats 3
    python benchmarks/cotraining.py --sizes L12-6        # a twin of 6 layers under 12
    python benchmarks/cotraining.py --gpt2 --repeats 3   # GPT-2's full shape, a few steps

Times are CPU seconds of one thread, which other load disturbs less than the clock. Ratios are
medians over repetitions, with quartiles; within one repetition every variant takes one step, in
turn, in one process. "exact" and "sampled" compute the sparse products as a new run does
(`fastest_products`), the others as named. Memory is the peak resident size of a process of its
own minus that before the step (parameters and Adam's moments exist by then).

The baseline is in the manner of the one public replication: a pass per site and direction, full
logits, target softmax anew for every pass, AbsTopK by topk and scatter, sinks by a mask of T x
(T+1) that needs a gradient, cut graphs of which each is released by a backward of its own, and a
projection by two topk. Its loss is ours, so gradients must agree: that is checked first, in
float64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timing import quartiles
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from bridges import BridgeConfig, BridgeSet, CotrainConfig, Plan, plan, time_steps
from bridges.losses.quantities import nmse
from bridges.training.cotrain import Cotraining
from dense import DenseModel
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.training.config import TrainConfig
from sparse.training.groups import scale_
from sparse.training.sparsity import SparsityConfig, project_model_

SIZES = {  # layers, dense width, sparse width, vocabulary, positions, sequences
    "check": (2, 16, 32, 50, 12, 3),
    "check-deep": (4, 16, 32, 50, 12, 3),
    "S": (2, 64, 256, 2048, 128, 8),
    "L4": (4, 64, 256, 4096, 128, 4),
    "L12": (12, 64, 192, 4096, 64, 2),
    "W": (2, 128, 1024, 4096, 128, 4),
    "M": (4, 128, 512, 4096, 128, 8),
    "gpt2": (12, 768, 1024, 50257, 64, 2),
    "gpt2-80gb": (12, 768, 2048, 50257, 512, 32),  # a pass of that preset of train_bridge.py
}
SIZES["L12-6"] = SIZES["L12"]
TWIN_LAYERS = {"check-deep": 2, "L12-6": 6}  # where the twin has not the dense depth
VARIANTS = {  # name: fields of CotrainConfig, and what computes the sparse products
    "exact": dict(hybrid_sites="all"),
    "exact, scipy": dict(hybrid_sites="all", products="scipy"),
    "exact, dense": dict(hybrid_sites="all", products="dense"),
    "sampled": dict(),
    "sampled, scipy": dict(products="scipy"),
    "sampled, dense": dict(products="dense"),
    "sampled 2": dict(sites_per_sequence=2),
    "exact, 25% of tokens": dict(hybrid_sites="all", hybrid_tokens=0.25),
}


def gpt2(n_layer: int, width: int, vocab: int, n_pos: int) -> GPT2LMHeadModel:
    shape = dict(n_layer=n_layer, n_embd=width, n_head=max(1, width // 64), vocab_size=vocab)
    ends = dict(bos_token_id=0, eos_token_id=0)
    drop = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**shape, n_positions=max(n_pos, 16), **drop, **ends))


def build(size: str, fields: dict, dtype=torch.float32, density=1 / 64):
    """Return the module of a co-training at its final density, and a batch of random tokens."""
    layers, d_dense, d, vocab, n_pos, batch = SIZES[size]
    torch.manual_seed(0)
    dense = DenseModel(gpt2(layers, d_dense, vocab, n_pos).to(dtype))
    shape = dict(vocab_size=vocab, hidden_size=d, head_dim=16)
    shape |= dict(num_hidden_layers=TWIN_LAYERS.get(size, layers))
    shape |= dict(num_attention_heads=d // 16, intermediate_size=4 * d)
    sparse = SparseGPT(SparseGPTConfig(**shape)).to(dtype)
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=d // 4)).to(dtype)
    sparsity = SparsityConfig(
        density=density,
        embedding_density=density,
        floor=min(4, d // 64),
        sparse_biases=False,
        anneal_start=0.0,
    )
    fields = {"products": None} | fields
    train = TrainConfig(steps=1000, folder="unused", products=fields.pop("products"))
    config = CotrainConfig(train=train, sparsity=sparsity, **fields)
    module = Cotraining(dense, sparse, bridges, config)
    ids = torch.randint(0, vocab, (batch, n_pos))
    bridges.calibrate(dense.residuals(ids))
    project_model_(module.sparsifier.budgets, module.config.sparsity.densities(1000, 1000))
    return module, ids


# ---- ours


class Ours:
    """A step as `fit` takes it."""

    def __init__(self, module: Cotraining) -> None:
        self.module, self.groups = module, module.groups()
        params = [{"params": list(g.params.values()), "eps": g.eps} for g in self.groups]
        self.adam = torch.optim.Adam(params, lr=1e-5, fused=True)

    def step(self, ids: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        losses = self.module(ids, 999)
        torch.stack(list(losses.values())).sum().backward()
        for g in self.groups:
            scale_(list(g.params.values()), g.scaling)
        self.adam.step()
        self.module.sparsifier.project(999)


# ---- the baseline


def topk_scatter(x: Tensor, k: int) -> Tensor:
    if k == x.shape[-1]:
        return x
    index = x.abs().topk(k, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """The sink is one more key and value of zeros; its logit stands in the additive mask."""
    n_pos, n_head = q.shape[2], len(sinks)
    allowed = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
    mask = torch.zeros(n_head, n_pos, n_pos, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
    mask = torch.cat([sinks.view(-1, 1, 1).expand(-1, n_pos, 1), mask], dim=-1)
    k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=scale)


def sparse_sublayer(model: SparseGPT, s: int, z: Tensor) -> Tensor:
    block = model.model.blocks[s // 2]
    if s % 2:
        mlp = block.mlp
        u = topk_scatter(block.norm_2(z), mlp.act_in.k)
        a = topk_scatter(F.gelu(mlp.fc(u)), mlp.post_act.k)
        return z + topk_scatter(mlp.proj(a), mlp.resid_delta.k)
    attn = block.attn
    u = topk_scatter(block.norm_1(z), attn.act_in.k)
    parts = attn.qkv(u).chunk(3, dim=-1)
    q, k, v = (topk_scatter(x, attn.q.k) for x in parts)
    q, k, v = (x.unflatten(-1, (attn.n_head, attn.d_head)).transpose(1, 2) for x in (q, k, v))
    y = masked_attention(q, k, v, attn.sinks, attn.d_head**-0.5).transpose(1, 2).flatten(-2)
    return z + topk_scatter(attn.out(y), attn.resid_delta.k)


def dense_sublayer(model: GPT2LMHeadModel, s: int, h: Tensor) -> Tensor:
    block = model.transformer.h[s // 2]
    return h + (block.mlp(block.ln_2(h)) if s % 2 else block.attn(block.ln_1(h))[0])


def plain_kl(logits: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), y.softmax(-1), reduction="none").sum(-1).mean()


class Plain:
    """The baseline's step; also over a `Cotraining`, whose parameters it trains."""

    def __init__(self, module: Cotraining) -> None:
        self.module = module
        self.params = list(module.parameters())
        self.adam = torch.optim.AdamW(self.params, lr=1e-5, eps=0.1)

    def losses(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the total and the buffers: (what was cut, the leaf in its place)."""
        dense, sparse, bridges = self.module.dense.model, self.module.sparse, self.module.bridges
        pairs = bridges.config.pairs  # dense site to sparse site
        with torch.no_grad():
            h = [dense.transformer.wte(ids) + dense.transformer.wpe(torch.arange(ids.shape[1]))]
            for s in range(2 * len(dense.transformer.h)):
                h.append(dense_sublayer(dense, s, h[-1]))
            y = dense.lm_head(dense.transformer.ln_f(h[-1]))
        z = [sparse.model.wte(ids)]
        for s in range(sparse.n_sites - 1):
            z.append(sparse_sublayer(sparse, s, z[-1]))
        x = sparse.lm_head(sparse.model.norm(z[-1]))
        predicted = x[:, :-1].flatten(0, 1)
        total = F.cross_entropy(predicted, ids[:, 1:].flatten()) + plain_kl(x, y)
        buffers = []
        for s, at in pairs.items():
            fit_z = nmse(self.encode(s, h[s]), z[at].detach())
            total = total + (fit_z + nmse(bridges.decode(s, z[at]), h[s])) / len(pairs)
            for made in (self.encode(s, h[s]), bridges.decode(s, z[at])):
                buffers.append((made, made.detach().requires_grad_()))
            up, down = buffers[-2][1], buffers[-1][1]
            for t in range(at, len(z) - 1):
                up = sparse_sublayer(sparse, t, up)
            for t in range(s, len(h) - 1):
                down = dense_sublayer(dense, t, down)
            up = sparse.lm_head(sparse.model.norm(up))
            down = dense.lm_head(dense.transformer.ln_f(down))
            total = total + (plain_kl(up, y) + plain_kl(down, y)) / len(pairs)
        return total, buffers

    def encode(self, s: int, h: Tensor) -> Tensor:
        b = self.module.bridges
        i = b.index(s)
        return topk_scatter(b.encoders[i]((h - b.mean[i]) / b.scale[i]), b.config.k)

    def backward(self, ids: Tensor) -> Tensor:
        total, buffers = self.losses(ids)
        total.backward(retain_graph=True)
        for made, leaf in buffers:
            made.backward(leaf.grad, retain_graph=True)
        return total

    def step(self, ids: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        self.backward(ids)
        n = sum(p.numel() for p in self.params)
        rms = (sum(p.grad.square().sum() for p in self.params) / n).sqrt()
        for p in self.params:
            p.grad /= rms + 1e-5
        self.adam.step()
        for b in self.module.sparsifier.budgets:
            self.project(b.weight, b.keep((1 / 64, 1 / 64)), b.floor, b.dim)

    @torch.no_grad()
    def project(self, p: Tensor, keep: int, floor: int, dim: int) -> None:
        score = p.abs()
        mask = torch.zeros_like(p)
        if floor:
            mask.scatter_(1 - dim, score.topk(floor, dim=1 - dim).indices, 1.0)
        rest = score.clone()
        rest[mask.bool()] = -1.0
        n = keep - int(mask.sum())
        mask.view(-1)[rest.view(-1).topk(n).indices] = 1.0
        p.mul_(mask)


class DenseStep:
    """A training step of a plain Hugging Face GPT-2 of the sparse model's shape."""

    def __init__(self, size: str) -> None:
        layers, _, d, vocab, n_pos, _ = SIZES[size]
        self.model = gpt2(TWIN_LAYERS.get(size, layers), d, vocab, n_pos)
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self, ids: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        self.model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()


# ---- measuring


def check(size: str) -> None:
    """Gradients of the exact step and of the baseline, float64; and a control that differs."""

    def gradient(params, total) -> Tensor:
        grads = torch.autograd.grad(total, params, allow_unused=True)
        pairs = zip(params, grads, strict=True)
        return torch.cat([(0 * p if g is None else g).flatten() for p, g in pairs])

    grads = {}
    for name in ("exact", "sampled"):
        module, ids = build(size, VARIANTS[name], torch.float64, density=1.0)
        params = list(module.parameters())
        grads[name] = gradient(params, sum(module(ids, 5).values()))
    plain = Plain(module)
    plain.backward(ids)
    want = torch.cat([p.grad.flatten() for p in params])
    scale = want.abs().max()
    error = (grads["exact"] - want).abs().max() / scale
    other = (grads["sampled"] - want).abs().max() / scale
    print(f"{size}: gradients, float64, largest difference / largest entry: {error:.1e}", end="")
    print(f" (control, sampled sites: {other:.1e})")
    if not error <= 1e-12 < other:
        raise SystemExit("the exact step's gradients are not the baseline's")


def runner(size: str, name: str):
    if name == "dense":
        _, ids = build(size, {})
        return DenseStep(size), ids
    module, ids = build(size, VARIANTS.get(name, VARIANTS["exact"]))
    return (Plain if name == "baseline" else Ours)(module), ids


def times(size: str, repeats: int) -> None:
    names = ["baseline", "dense", *VARIANTS]
    steps = {name: runner(size, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats + 1):
        for name, (run, ids) in steps.items():
            start = time.process_time()
            run.step(ids)
            if i:  # the first is for warming up
                seconds[name].append(time.process_time() - start)
    for name in names:
        took = seconds[name]
        faster = [b / a for a, b in zip(took, seconds["baseline"], strict=True)]
        dense_steps = [a / b for a, b in zip(took, seconds["dense"], strict=True)]
        print(
            f"{size:4} {name:22} {1e3 * torch.tensor(took).median():8.0f} ms   "
            f"faster than the baseline {quartiles(faster, 6)}x   "
            f"dense steps {quartiles(dense_steps, 6)}"
        )


def peak_kb() -> int:
    return int(
        next(x for x in Path("/proc/self/status").open() if x.startswith("VmHWM")).split()[1]
    )


def memory_here(size: str, name: str) -> float:
    """Return the peak of one step above what was there before, in MB."""
    run, ids = runner(size, name)
    run.step(ids[:1, :4])  # Adam's moments
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kb()
    run.step(ids)
    return (peak_kb() - before) / 1024


def memory(size: str) -> None:
    used = {}
    for name in ["baseline", "dense", *VARIANTS]:
        command = [sys.executable, __file__, "--memory-of", size, name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used[name] = json.loads(out.splitlines()[-1])
        share = used[name] / used["baseline"]
        print(f"{size:4} {name:22} {used[name]:8.0f} MB a step   {share:5.2f} of the baseline")


def full_gpt2(n_steps: int, names: Sequence[str]) -> None:
    """A few steps with a dense model of GPT-2's shape, and what 1 B tokens of them would take.

    On a CPU: a twin of width 1024, fp32, CPU seconds of one thread. On CUDA: a pass of the preset
    for 80 GB, bf16, by the clock.
    """
    if torch.cuda.is_available():
        for name in names:
            print(name, gpt2_on_a_card(name), sep="\n")
        return
    layers, width, d, vocab, n_pos, batch = SIZES["gpt2"]
    print(f"dense: {layers} layers, {width} wide, {vocab} tokens; twin: {d} wide, density 1/64")
    for name in names:
        run, ids = runner("gpt2", name)
        n = sum(p.numel() for p in run.module.parameters())
        run.step(ids[:1, :2])
        Path("/proc/self/clear_refs").write_text("5")
        before, took = peak_kb(), []
        for _ in range(n_steps):
            start = time.process_time()
            run.step(ids)
            took.append(time.process_time() - start)
        mid = torch.tensor(took).median().item()
        m = run.module
        planned = plan(m.dense, m.sparse, m.bridges, m.config, batch, n_pos)
        rate = ids.numel() / mid
        print(
            f"{name:8} {n / 1e6:.0f} M trained parameters, {batch} x {n_pos} tokens: "
            f"{mid:.1f} s a step, {rate:.1f} tokens/s, {1e9 / rate / 3600:,.0f} hours for 1 B "
            f"tokens, peak {peak_kb() * 1024e-9:.2f} GB, of which the step "
            f"{(peak_kb() - before) * 1024e-9:.2f} GB; the plan said {planned.memory * 1e-9:.2f} GB"
            f" without the libraries, of which the step {sum(planned.step.values()) * 1e-9:.2f} GB"
        )
        del run, m


def gpt2_on_a_card(name: str) -> Plan:
    """Return the plan of a run of such passes, probed."""
    *_, n_pos, batch = SIZES["gpt2-80gb"]
    module, _ = build("gpt2-80gb", VARIANTS[name])
    train = replace(module.config.train, mixed_precision="bf16", folder="unused")
    models = (module.dense, module.sparse, module.bridges, replace(module.config, train=train))
    found = time_steps(*models, batch, n_pos, Accelerator(mixed_precision="bf16"), seconds=120)
    return plan(*models, batch, n_pos, step_time=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["L4", "L12", "W"], choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=7, help="repetitions per size")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    how = ("sampled", "exact")
    parser.add_argument("--gpt2", nargs="*", choices=how, help="GPT-2's shape instead")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if args.memory_of:
        print(json.dumps(memory_here(*args.memory_of)))
    elif args.gpt2 is not None:
        full_gpt2(args.repeats, args.gpt2 or how)
    else:
        check("check")
        check("check-deep")
        for size in args.sizes:
            times(size, args.repeats)
            if not args.no_memory:
                memory(size)


if __name__ == "__main__":
    main()
