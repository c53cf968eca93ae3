"""Whole training steps: of a sparse model, and of a twin with its bridges, beside a dense model's.

The steps are those that `fit` takes, at the final density, on random tokens and random weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from cotraining import gpt2
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from bridges import PRESETS, Design, Preset, compiled, plan
from bridges.cost.step_time import NEVER, _Clocked, _Enough, _peak, _reset_peak
from bridges.training.cotrain import Cotraining
from dense import DenseModel
from sparse import PretrainConfig, Pretraining, SparseGPT, TrainConfig
from sparse.training.loop import fit

from .measure import Ceilings, Clock, Row, release, spread

PASSES = 2
"""Passes of a measured step, where the preset's has more: each is as large as the preset's."""
DENSE = {"cuda": (12, 768, 50257, 1024), "cpu": (2, 48, 64, 32)}
"""Layers, width, vocabulary and positions of the dense model: those of GPT-2 on CUDA."""
SMALL = {"length": 16, "batch": 4, "accumulate": 2}
"""Fields of a preset on a CPU."""


def preset_for(device: torch.device, name: str) -> Preset:
    """Return a preset, with as many passes as are measured."""
    preset = PRESETS[name] if device.type == "cuda" else replace(PRESETS[name], **SMALL)
    batch = preset.batch // preset.accumulate * PASSES
    return replace(preset, batch=batch, accumulate=PASSES)


def dense_for(device: torch.device) -> DenseModel:
    """Return a dense model of random weights, with a tokenizer that knows one word."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a", eos_token="a")
    torch.manual_seed(0)
    dense = DenseModel(gpt2(*DENSE[device.type]), tokenizer)
    dense.model.to(device)
    return dense


class Steps:
    """Takes steps of `fit` on one batch of random tokens, of which nothing is written."""

    def __init__(self, module: Any, train: TrainConfig, preset: Preset, vocab: int) -> None:
        self.module, self.accelerator = module, accelerator_of(module, preset)
        self.train = replace(train, steps=NEVER, log_every=NEVER, checkpoint_every=NEVER)
        self.train = replace(self.train, evaluate_every=0)
        self.ids = torch.randint(vocab, (preset.batch, preset.length))
        self.last = module.sparsifier.steps

    def take(self, n: int) -> list[float]:
        """Return the seconds of each of `n` steps."""
        batches = _Clocked(self.ids, self.accelerator.device, n, math.inf)
        try:
            fit(self.module, batches, self.train, self.project, accelerator=self.accelerator)
        except _Enough:
            pass
        self.module.zero_grad(set_to_none=True)
        self.accelerator.free_memory()  # it would keep every optimizer, and its moments
        return [b - a for a, b in zip(batches.times, batches.times[1:], strict=False)]

    def project(self, step: int) -> dict[str, float]:
        """Project to the final density, at whatever step."""
        return self.module.sparsifier.project(self.last)


def accelerator_of(module: nn.Module, preset: Preset) -> Accelerator:
    on_cpu = next(module.parameters()).device.type == "cpu"
    return Accelerator(mixed_precision=preset.mixed_precision, cpu=on_cpu)


def measured(clock: Clock, top: Ceilings, steps: Steps, case: str, around: Any = None) -> Row:
    """Return the row of a step; `around` is a context in which it is timed.

    Its FLOPs are counted by torch in one step of its own, which warms up too.
    """
    with FlopCounterMode(display=False) as counter:
        steps.take(1)
    with around or nullcontext():
        steps.take(2)
        _reset_peak(clock.device)
        seconds = steps.take(clock.repeats)
        peak, _ = _peak(clock.device)
    plain = dense_seconds(clock, steps)
    return Row(
        part="steps",
        case=case,
        reference="GPT-2 step of the twin's shape",
        reference_ms=1e3 * median(plain),
        floor="the FLOPs of this step's products",
        floor_ms=1e3 * top.seconds(flops=counter.get_total_flops()),
        tokens_per_second=steps.ids.numel() / median(seconds),
        peak=peak,
        **spread(seconds),
    )


def dense_seconds(clock: Clock, steps: Steps) -> list[float]:
    """Return the seconds of steps of a Hugging Face GPT-2 of the twin's shape on the same tokens.

    In bfloat16 autocast, with fused AdamW, in as many passes.
    """
    release(clock.device)
    twin = getattr(steps.module, "sparse", None) or steps.module.model
    shape, device = twin.config, clock.device
    length = steps.ids.shape[1]
    model = gpt2(shape.num_hidden_layers, shape.hidden_size, shape.vocab_size, length).to(device)
    model.train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    parts = steps.ids.to(device).chunk(PASSES)

    def forward(ids: torch.Tensor, labels: torch.Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return model(ids, labels=labels, use_cache=False)

    def step() -> None:
        for ids in parts[1:]:
            forward(ids, ids).loss.backward()
        forward(parts[0], parts[0]).loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return clock.turns(step)[0]


def pretraining_rows(clock: Clock, top: Ceilings) -> Iterator[Row]:
    """A step of sparse pretraining, of the twin of the smaller preset."""
    preset = preset_for(clock.device, "gpt2-12gb")
    sparse, _, config = preset.build(dense_for(clock.device), "never written")
    train = replace(config.train, accumulate=PASSES)
    settings = PretrainConfig(train=train, sparsity=config.sparsity)
    module = Pretraining(sparse.to(clock.device), settings)  # pyright: ignore
    steps = Steps(module, train, preset, sparse.vocab_size)
    yield measured(clock, top, steps, f"pretraining, {_size(sparse, preset)}")


def cotraining_rows(name: str, compile_too: bool) -> Callable[[Clock, Ceilings], Iterator[Row]]:
    """Return what measures a co-training step of a preset, compiled or not."""

    def rows(clock: Clock, top: Ceilings) -> Iterator[Row]:
        preset = preset_for(clock.device, name)
        dense = dense_for(clock.device)
        design: Design = preset.build(dense, "never written")
        planned = plan(dense, *design, preset.batch, preset.length).memory
        sparse, bridges, config = design
        module = Cotraining(dense, sparse, bridges, config).to(clock.device)
        steps = Steps(module, config.train, preset, dense.vocab_size)
        backend = "inductor" if clock.device.type == "cuda" else "aot_eager"
        around = compiled(dense, sparse, backend=backend) if compile_too else None
        how = "compiled" if compile_too else "eager"
        case = f"co-training, {name}, {how}, {_size(sparse, preset)}"
        yield replace(measured(clock, top, steps, case, around), planned=planned)

    return rows


def _size(twin: SparseGPT, preset: Preset) -> str:
    rows = preset.batch // PASSES
    return f"twin {twin.config.hidden_size} wide, {PASSES} x {rows} x {preset.length} tokens"
