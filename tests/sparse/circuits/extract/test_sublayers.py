import pytest
import torch
import torch.nn.functional as F

from sparse.circuits.extract.sublayers import ROWS_AT_ONCE, Attend, Map, Place, Read, Think
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.ops.abs_topk import abs_topk

DOUBLE = torch.zeros((), dtype=torch.float64)


def weight(rows: int, columns: int, density: float) -> torch.Tensor:
    rng = torch.Generator().manual_seed(rows + columns)
    w = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    return w * (torch.rand(w.shape, generator=rng) < density)


@pytest.mark.parametrize(("density", "compressed"), [(0.01, True), (0.5, False)])
def test_a_map_is_its_equation_whether_or_not_its_weight_is_compressed(density, compressed):
    w, b = weight(300, 200, density), torch.randn(300, dtype=torch.float64)
    index = torch.tensor([0, 7, 299])
    for n in (0, 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 3):
        x = torch.randn(n, 200, dtype=torch.float64)
        plain = F.linear(x, w, b)
        assert (module := Map(w, b, DOUBLE)).sparse is compressed
        torch.testing.assert_close(module(x), plain)
        torch.testing.assert_close(Map(w, None, DOUBLE)(x), x @ w.T)
        full = Map(w, b, DOUBLE, k=50, index=index, act=F.gelu)
        torch.testing.assert_close(full(x), abs_topk(F.gelu(plain), 50)[:, index])


def test_a_map_of_nothing_is_its_bias():
    b = torch.arange(3, dtype=torch.float64)
    assert torch.equal(
        Map(weight(3, 0, 1.0), b, DOUBLE)(torch.zeros(2, 0, dtype=b.dtype)), b.expand(2, 3)
    )


def test_half_precision_is_never_compressed():
    assert not Map(weight(300, 200, 0.01), None, torch.zeros((), dtype=torch.bfloat16)).sparse


@pytest.mark.parametrize("k", [0, 6])
def test_a_read_is_the_norm_of_the_whole_residual_though_it_sees_a_part(k):
    norm = torch.nn.RMSNorm(20, eps=1e-3, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight)
    z = torch.randn(4, 20, dtype=torch.float64)
    used = torch.arange(20) % 5 == 1
    live = used | (torch.arange(20) > 14) | torch.tensor(k > 0)
    u = norm(z) if not k else abs_topk(norm(z), k)
    squares = z[:, ~live].square().sum(1, keepdim=True)
    torch.testing.assert_close(Read(norm, k, used, live)(z[:, live], squares), u[:, used])
    if not k:  # control: the squares matter
        assert not torch.allclose(Read(norm, k, used, live)(z[:, live], 0 * squares), u[:, used])


def places(model: SparseGPT, kept: dict[str, list[int]]) -> dict[str, Place]:
    found = {}
    for at, width in model.node_widths().items():
        m = torch.zeros(width, dtype=torch.bool)
        m[kept.get(at[2:], [])] = True
        found[at[2:]] = Place(m, torch.zeros(width, dtype=torch.float64), 0)
    return found


@pytest.fixture
def wired() -> SparseGPT:
    """One layer with a single path: read 1, neuron 2 (or head 1), write 3."""
    config = SparseGPTConfig(
        vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, head_dim=2,
        intermediate_size=6, activation_fraction=1.0,
    )  # fmt: skip
    model = SparseGPT(config).double()
    block = model.model.blocks[0]
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        block.mlp.fc.weight[2, 1] = block.mlp.proj.weight[3, 2] = 1.0
        block.attn.qkv.weight[4 + 4 + 2, 1] = block.attn.out.weight[3, 2] = 1.0
    return model


def test_what_nothing_reads_is_left_out(wired):
    everything = {at[2:]: list(range(w)) for at, w in wired.node_widths().items()}
    block = wired.model.blocks[0]
    think = Think(block.mlp, places(wired, everything), DOUBLE)
    assert think.used.tolist() == [False, True, False, False]
    assert think.fc.weight.shape == (1, 1) and not think.constant
    attend = Attend(block.attn, places(wired, everything), DOUBLE)
    assert attend.used.tolist() == [False, True, False, False]
    assert attend.n_head == 1 and not attend.constant  # head 0 writes nothing
    for cut in ({"mlp.post_act": [0, 1]}, {"mlp.resid_delta": [0, 1]}):
        assert Think(block.mlp, places(wired, everything | cut), DOUBLE).constant
    for cut in ({"attn.v": [0, 1]}, {"attn.resid_delta": [0, 1]}):
        assert Attend(block.attn, places(wired, everything | cut), DOUBLE).constant


def test_all_rows_are_computed_where_values_compete_and_only_the_kept_ones_elsewhere(wired):
    kept = {"mlp.act_in": [1], "mlp.post_act": [2], "mlp.resid_delta": [3]}
    p = places(wired, kept)
    assert Think(wired.model.blocks[0].mlp, p, DOUBLE).fc.weight.shape == (1, 1)
    p["mlp.post_act"] = p["mlp.post_act"]._replace(k=2)
    think = Think(wired.model.blocks[0].mlp, p, DOUBLE)
    assert think.fc.weight.shape == (6, 1) and think.proj.weight.shape == (1, 1)
