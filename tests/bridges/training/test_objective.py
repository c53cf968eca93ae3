import copy
from dataclasses import asdict

import pytest
import torch

from bridges.losses.quantities import ce_nats, kl_nats, nmse
from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.training.config import LossWeights
from bridges.training.objective import Draw, losses

ALL = LossWeights()


TERMS = ("ce", "kl", "encode", "decode", "up", "down")


def at_site(bridges, site):
    """The same bridges, at one site only."""
    config = bridges.config
    one = BridgeSet(
        BridgeConfig.from_dict(asdict(config) | {"sites": (site,), "sparse_sites": (site,)})
    )
    one.encoders[0], one.decoders[0] = bridges.encoders[site], bridges.decoders[site]
    one.mean, one.scale = bridges.mean[site : site + 1], bridges.scale[site : site + 1]
    return one


def trunk_groups(sparse):
    """The parameters of the trunk by where they act: before sublayer 0, in each, after the last."""
    model = sparse.model
    groups = {"embed": [*model.wte.parameters(), *model.wpe.parameters()]}
    for i, block in enumerate(model.blocks):
        groups[2 * i] = [*block.norm_1.parameters(), *block.attn.parameters()]
        groups[2 * i + 1] = [*block.norm_2.parameters(), *block.mlp.parameters()]
    groups["unembed"] = [*model.norm.parameters(), sparse.lm_head.weight, sparse.bigram]
    assert sum(len(g) for g in groups.values()) == len(list(sparse.parameters()))
    return groups


def reached(total, params):
    """Whether the gradient of `total` is nonzero in every, or zero in each, of these tensors."""
    grads = torch.autograd.grad(total, params, allow_unused=True, retain_graph=True)
    moved = {g is not None and bool((g != 0).any()) for g in grads}
    assert len(moved) == 1, "a group is reached as a whole or not at all"
    return moved.pop()


@pytest.mark.parametrize("site", range(5))
@pytest.mark.parametrize("drawn", [False, True])
def test_every_term_reaches_the_parameters_of_the_table_and_no_others(
    dense, sparse, bridges, ids, site, drawn
):
    """docs/method.md#gradient-flow, group by group, for bridges at one site."""
    one = at_site(bridges, site)
    sites = torch.full((len(ids), 1), site) if drawn else None
    parts = losses(dense, sparse, one, ids, ALL, draw=Draw(sites))
    groups = trunk_groups(sparse)
    before = {"embed"} | {s for s in range(4) if s < site}
    after = {"unembed"} | {s for s in range(4) if s >= site}
    table = {  # term: (encoder, decoder, trunk)
        "ce": (False, False, before | after),
        "kl": (False, False, before | after),
        "encode": (True, False, set()),
        "decode": (False, True, before),
        "up": (True, False, after),
        "down": (False, True, before),
    }
    assert set(table) == set(parts)
    for term, (encoder, decoder, trunk) in table.items():
        total = parts[term]
        assert reached(total, list(one.encoders.parameters())) == encoder, term
        assert reached(total, list(one.decoders.parameters())) == decoder, term
        assert {name for name, group in groups.items() if reached(total, group)} == trunk, term
    parts["down"].backward()
    assert all(p.grad is None and not p.requires_grad for p in dense.model.parameters())


def test_the_decoder_term_can_be_kept_off_the_trunk(dense, sparse, bridges, ids):
    parts = losses(dense, sparse, bridges, ids, ALL, decoder_trains_trunk=False)
    assert not reached(parts["decode"], [sparse.model.wte.weight])
    assert reached(parts["decode"], list(bridges.decoders.parameters()))
    assert reached(parts["down"], [sparse.model.wte.weight])  # the hybrid pass still reaches it
    other = losses(dense, sparse, bridges, ids, ALL)
    assert all(torch.equal(parts[term], other[term]) for term in TERMS), "the values are the same"


@torch.no_grad()
def test_the_terms_are_those_of_the_equation(dense, sparse, bridges, ids):
    h, z, y, x = dense.residuals(ids), sparse.residuals(ids), dense.logits(ids), sparse(ids).logits
    encode, decode, up, down = [], [], [], []
    for s in range(5):
        to_z, to_h = bridges.encode(s, h[s]), bridges.decode(s, z[s])
        encode.append(nmse(to_z, z[s]))
        decode.append(nmse(to_h, h[s]))
        up.append(kl_nats(y, sparse.resume(s, to_z, ids)).mean())
        down.append(kl_nats(y, dense.resume(s, to_h, ids)).mean())
    want = dict(ce=ce_nats(x, ids).mean(), kl=kl_nats(y, x).mean())
    per_site = dict(encode=encode, decode=decode, up=up, down=down)
    want |= {name: torch.stack(values).mean() for name, values in per_site.items()}
    got = losses(dense, sparse, bridges, ids, ALL)
    for term in TERMS:
        assert got[term].item() == pytest.approx(want[term].item(), rel=1e-5), term
    w = LossWeights(ce=0.5, kl=2.0, nmse=3.0, hybrid=7.0)
    weighted = losses(dense, sparse, bridges, ids, w)
    factors = dict(ce=0.5, kl=2.0, encode=3.0, decode=3.0, up=7.0, down=7.0)
    for term in TERMS:
        assert weighted[term].item() == pytest.approx(factors[term] * want[term].item(), rel=1e-5)


@torch.no_grad()
def test_perfect_bridges_between_a_model_and_itself_leave_the_cross_entropy_alone(twice, ids):
    got = losses(twice.dense, twice.sparse, twice.bridges, ids, ALL)
    assert got["ce"] > 1
    assert all(got[term].abs() < 1e-6 for term in TERMS if term != "ce"), got
    shuffled = copy.deepcopy(twice.bridges)
    for layer in [*shuffled.encoders, *shuffled.decoders]:
        layer.weight.copy_(layer.weight[torch.randperm(20, generator=torch.Generator())])
    got = losses(twice.dense, twice.sparse, shuffled, ids, ALL)
    assert all(got[term] > 0.1 for term in ("encode", "decode", "up", "down"))  # control
    assert got["kl"].abs() < 1e-6


def test_terms_of_weight_zero_are_zero_and_the_others_unmoved(dense, sparse, bridges, ids):
    every = losses(dense, sparse, bridges, ids, ALL)
    where = dict(ce=["ce"], kl=["kl"], nmse=["encode", "decode"], hybrid=["up", "down"])
    for left_out, terms in where.items():
        got = losses(dense, sparse, bridges, ids, LossWeights(**{left_out: 0.0}))
        for term in TERMS:
            want = 0.0 if term in terms else every[term].item()
            assert got[term].item() == pytest.approx(want, rel=1e-6), (left_out, term)
