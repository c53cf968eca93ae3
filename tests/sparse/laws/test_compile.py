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
gpu = pytest.mark.gpu
PARTS = """
import json, sys, traceback
said = {}
for name, code in json.loads(sys.argv.pop(1)).items():
    names = {}
    try:
        exec(code, names)
        said[name] = names["out"]
    except Exception:
        said[name] = traceback.format_exc()
print(json.dumps(said))
"""


def run(parts: dict[str, str], backend: str, folder: Path, device: str = "cpu") -> dict:
    """Return by name what each part measured, or the traceback where it could not."""
    said = run_python(
        "-c",
        PARTS,
        json.dumps(parts),
        backend,
        device,
        JAXTYPING_DISABLE="1",
        TORCHINDUCTOR_CACHE_DIR=str(folder),
        TORCHINDUCTOR_COMPILE_THREADS="1",
    )
    return json.loads(said.splitlines()[-1])


@pytest.fixture(scope="module")
def eager(tmp_path_factory) -> dict:
    """What is measured under aot_eager, in one process: importing torch takes longer than it."""
    parts = {"training": TRAINING, "serving": SERVING, "autocast": AUTOCAST, "broken": BROKEN}
    return run(parts, "aot_eager", tmp_path_factory.mktemp("compiled"))


def check_training(out: dict, atol: float) -> None:
    assert out.pop("size") > 1e-4  # no gradient is compared with nothing
    assert max(out.values()) < atol, out


def test_training_traced_whole_gives_the_logits_and_gradients_of_the_plain_model(eager):
    check_training(eager["training"], 1e-5)


@pytest.mark.skipif(not which("g++"), reason="needs a C++ compiler")
@pytest.mark.skipif(
    any(x.isspace() for x in torch.__file__),
    reason="inductor's command line breaks where torch's own folder has a space",
)
def test_training_compiled_whole_gives_the_logits_and_gradients_of_the_plain_model(tmp_path):
    check_training(run({"training": TRAINING}, "inductor", tmp_path)["training"], 1e-5)


def test_padding_and_generation_compiled_whole_give_those_of_the_plain_model(eager):
    out = eager["serving"]
    assert out["left padding"] < 1e-5 < 1e-2 < out["padding matters"], out
    assert out["tokens that differ"] == 0 and out["tokens"] == 15, out


def test_under_autocast_the_compiled_model_rounds_as_the_plain_one(eager):
    out = eager["autocast"]
    assert out["logits"] < 1e-5 and out["gradients"] < 1e-5, out


def test_a_model_that_cannot_be_traced_whole_is_refused(eager):
    """The control: fullgraph=True is what it says."""
    assert "Unsupported" in eager["broken"]


@gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_on_a_gpu_the_compiled_model_is_the_plain_one(backend, tmp_path):
    check_training(run({"training": TRAINING}, backend, tmp_path, "cuda")["training"], 1e-4)
