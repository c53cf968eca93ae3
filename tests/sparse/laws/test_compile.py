"""torch.compile(fullgraph=True) of the whole model: the logits and gradients of the plain one.

In a process of its own without jaxtyping, whose checks cannot be traced (house style, shapes).
"""

import json
from pathlib import Path
from shutil import which

import pytest
import torch

from tests.helpers.processes import run_python

HEAD = """
import json, sys, torch
import torch._dynamo
from sparse import SparseGPT, SparseGPTConfig

torch.set_num_threads(1)
backend = sys.argv[1]
device = sys.argv[2]

def build(**changes):
    torch.manual_seed(0)
    small = dict(vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                 head_dim=4, intermediate_size=32, attention_sinks=True, bigram_table=True,
                 positions="learned", max_position_embeddings=32, initializer_range=0.3)
    model = SparseGPT(SparseGPTConfig(**(small | changes)))
    for block in model.model.blocks:
        torch.nn.init.normal_(block.attn.sinks)
    return model.to(device)

def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)

def apart(a, b):
    return float((a - b).abs().max())

model = build()
ids = torch.randint(13, (2, 9)).to(device)
out = {}
"""
TRAINING = (
    HEAD
    + """
f = compiled(model)
for name, batch in {"first": ids, "again": ids.flip(0)}.items():
    results = []
    for m in (model, f):
        model.zero_grad()
        result = m(batch, labels=batch)
        result.loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        results.append((result.logits.detach(), grads))
    (logits, grads), (logits_f, grads_f) = results
    out[name] = apart(logits, logits_f)
    out[name + " gradients"] = max(map(apart, grads, grads_f))
out["size"] = min(float(g.abs().max()) for g in grads)
"""
)
SERVING = (
    HEAD
    + """
model.eval()
real = torch.ones_like(ids)
real[0, :3] = 0
with torch.no_grad():
    plain, traced = (m(ids, attention_mask=real).logits for m in (model, compiled(model)))
shown = real.bool()
out["left padding"] = apart(plain[shown], traced[shown])
out["padding matters"] = apart(plain[0], model(ids).logits[0])
call = dict(max_new_tokens=6, do_sample=False, attention_mask=real, pad_token_id=0)
want = model.generate(ids, **call)
torch._dynamo.reset()
model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
got = model.generate(ids, cache_implementation="static", **call)
out["tokens that differ"] = int((want != got).sum())
out["tokens"] = got.shape[1]
"""
)
AUTOCAST = (
    HEAD
    + """
results = []
for m in (model, compiled(model)):
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        logits = m(ids).logits
    logits.float().square().mean().backward()
    results.append((logits.detach().float(), [p.grad.clone() for p in model.parameters()]))
(logits, grads), (logits_f, grads_f) = results
out["logits"] = apart(logits, logits_f)
out["gradients"] = max(apart(a, b) / float(a.abs().max()) for a, b in zip(grads, grads_f))
"""
)
BROKEN = (
    HEAD
    + """
model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
compiled(model)(ids)
"""
)
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.skipif(not which("g++"), reason="needs a C++ compiler"),
            pytest.mark.skipif(
                any(x.isspace() for x in torch.__file__),
                reason="inductor's command line breaks where torch's own folder has a space",
            ),
        ],
    ),
]
gpu = pytest.mark.gpu


def run(code: str, backend: str, tmp_path: Path, device: str = "cpu") -> dict:
    said = run_python(
        "-c",
        code + "\nprint(json.dumps(out))",
        backend,
        device,
        JAXTYPING_DISABLE="1",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        TORCHINDUCTOR_COMPILE_THREADS="1",
    )
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_compiled_whole_gives_the_logits_and_gradients_of_the_plain_model(
    backend, tmp_path
):
    out = run(TRAINING, backend, tmp_path)
    assert out.pop("size") > 1e-4  # no gradient is compared with nothing
    assert max(out.values()) < 1e-5, out


def test_padding_and_generation_compiled_whole_give_those_of_the_plain_model(tmp_path):
    out = run(SERVING, "aot_eager", tmp_path)
    assert out["left padding"] < 1e-5 < 1e-2 < out["padding matters"], out
    assert out["tokens that differ"] == 0 and out["tokens"] == 15, out


def test_under_autocast_the_compiled_model_rounds_as_the_plain_one(tmp_path):
    out = run(AUTOCAST, "aot_eager", tmp_path)
    assert out["logits"] < 1e-5 and out["gradients"] < 1e-5, out


def test_a_model_that_cannot_be_traced_whole_is_refused(tmp_path):
    """The control: fullgraph=True is what it says."""
    with pytest.raises(AssertionError, match="Unsupported"):
        run(BROKEN, "aot_eager", tmp_path)


@gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_on_a_gpu_the_compiled_model_is_the_plain_one(backend, tmp_path):
    out = run(TRAINING, backend, tmp_path, "cuda")
    assert out.pop("size") > 1e-4 and max(out.values()) < 1e-4, out
