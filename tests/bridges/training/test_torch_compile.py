"""A compiled step is the plain step: losses, gradients, names; and nothing is left behind.

In a process of its own without jaxtyping, whose checks cannot be traced (house style, shapes).
"""

import json

from tests.helpers.processes import run_python

CODE = """
import json, torch
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel
from bridges import BridgeConfig, BridgeSet, CotrainConfig, compiled, plan
from bridges.training.cotrain import Cotraining
from dense import DenseModel
from sparse import SparseGPT, SparseGPTConfig, SparsityConfig, TrainConfig
from sparse.ops.csr_linear import csr_products
from sparse.training.sparsity import project_model_

torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
dense = DenseModel(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))
shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
shape |= dict(intermediate_size=64, positions="learned", initializer_range=0.3)
sparse = SparseGPT(SparseGPTConfig(**shape))
bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=8))
config = CotrainConfig(
    train=TrainConfig(steps=10, folder="unused"),
    sparsity=SparsityConfig(density=0.1, embedding_density=0.3, floor=1),
)
module = Cotraining(dense, sparse, bridges, config)
project_model_(module.sparsifier.budgets, (0.1, 0.3))

def step(i):
    ids = torch.randint(50, (6, 12), generator=torch.Generator().manual_seed(i))
    module.zero_grad()
    losses = module(ids, i)
    sum(losses.values()).backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    return {name: x.item() for name, x in losses.items()}, grads

names = [*module.state_dict()]
want = [step(i) for i in range(3)]
with csr_products(sparse) as plain_products:
    pass
with compiled(dense, sparse, backend="aot_eager"):
    got = [step(i) for i in range(3)]
    inside = [*module.state_dict()]
    with csr_products(sparse) as compiled_products:
        pass
graphs = counters["stats"]["unique_graphs"]
block = sparse.model.blocks[0]
left = "attend" in vars(block) or "think" in vars(block)
planned = str(plan(dense, sparse, bridges, config, 4, 6))
with compiled(dense, sparse, backend="aot_eager"):
    outer = dict(vars(block))
    with compiled(dense, sparse, backend="eager"):
        pass
    restored = all(vars(block)[name] is outer[name] for name in ("attend", "think"))
    same_plan = str(plan(dense, sparse, bridges, config, 4, 6)) == planned
pairs = [*zip(want, got)]
print(json.dumps({
    "losses": max(abs(a[k] - b[k]) for (a, _), (b, _) in pairs for k in a),
    "gradients": max(
        float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-6))
        for (_, a), (_, b) in pairs for k in a
    ),
    "another step": max(abs(want[0][0][k] - got[1][0][k]) for k in want[0][0]),
    "same names": names == inside == [*module.state_dict()],
    "left behind": left or "attend" in vars(block) or "think" in vars(block),
    "inside": [restored, same_plan],
    "products": [len(plain_products), len(compiled_products)],
    "graphs": graphs,
    "breaks": sum(counters["graph_break"].values()),
}))
"""


def test_a_compiled_step_has_the_losses_gradients_and_names_of_the_plain_one():
    out = json.loads(run_python("-c", CODE, JAXTYPING_DISABLE="1").splitlines()[-1])
    assert out["losses"] < 1e-5 and out["gradients"] < 1e-4, out
    assert out["another step"] > 1e-2, out  # control
    assert out["same names"] and not out["left behind"], out
    assert out["inside"] == [True, True], out  # in one another, and planned in one
    assert out["products"][0] > 0 == out["products"][1], out  # compressed rows are not traced
    assert 4 <= out["graphs"] < 16 and not out["breaks"], out  # as many at ten layers: shared
