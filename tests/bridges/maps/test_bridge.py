import json
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch

from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.protocol import FrozenModel, ResidualModel, fingerprint
from sparse.ops.abs_topk import kept_reference


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shape(**fields):
    least = dict(d_dense=12, d_sparse=20, n_dense_sites=5, n_sparse_sites=5, k=7)
    return BridgeConfig(**(least | fields))


def stub(n_sites=5, d_resid=12, mark="a"):
    """The least that has sites and a width."""
    names = ("residuals", "resume", "last_logits", "joined", "unembed")
    methods = {name: (lambda *args: None) for name in names}
    shape = dict(n_sites=n_sites, d_resid=d_resid, vocab_size=23)
    return SimpleNamespace(**shape, fingerprint=mark, **methods)


def test_both_models_speak_the_protocol(dense, sparse):
    assert isinstance(dense, ResidualModel) and isinstance(sparse, ResidualModel)
    assert isinstance(stub(), ResidualModel) and not isinstance(object(), ResidualModel)
    assert isinstance(dense, FrozenModel) and not isinstance(stub(), FrozenModel)


def test_encoding_and_decoding_are_the_equations(bridges):
    for i, site in enumerate(bridges.config.sites):
        h, z = random(3, 4, 12, seed=i), random(3, 4, 20, seed=9 + i)
        mu, sigma = bridges.mean[i], bridges.scale[i]
        e, d = bridges.encoders[i], bridges.decoders[i]
        x = (h - mu) / sigma @ e.weight.T + e.bias
        want = torch.where(kept_reference(x, 7), x, 0.0)
        assert torch.allclose(bridges.encode(site, h), want, atol=1e-6)
        assert (bridges.encode(site, h).count_nonzero(-1) == 7).all()
        want = mu + sigma * (z @ d.weight.T + d.bias)
        assert torch.allclose(bridges.decode(site, z), want, atol=1e-5)


def test_transport_is_the_difference_of_two_decodings(bridges):
    for site in bridges.config.sites:
        z, delta = random(3, 4, 20), random(3, 4, 20, seed=1)
        want = bridges.decode(site, z + delta) - bridges.decode(site, z)
        assert (bridges.transport(site, delta) - want).abs().max() < 1e-5
        assert (bridges.transport(site, torch.zeros(20)) == 0).all()
        assert (bridges.decode(site, torch.zeros(20)) != 0).any()  # control: decoding has a bias


def test_calibration_centres_every_site_and_makes_its_scale_one(dense, ids):
    bridges = BridgeSet(shape())
    residuals = dense.residuals(ids)
    raw = [h.square().mean().sqrt() for h in residuals]
    assert max(raw) > 1.5 * min(raw)  # control: the sites differ in scale
    bridges.calibrate(residuals)
    for i, h in enumerate(residuals):
        x = (h - bridges.mean[i]) / bridges.scale[i]
        assert x.mean((0, 1)).abs().max() < 1e-5
        assert x.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert not bridges.mean.requires_grad and "mean" not in dict(bridges.named_parameters())


def test_bridges_start_as_specified_and_by_the_seed_alone():
    wide = dict(d_dense=200, d_sparse=300, n_dense_sites=2, n_sparse_sites=2, k=5)
    big = BridgeSet(BridgeConfig(**wide), seed=3)
    torch.manual_seed(77)  # the global generator has no say
    same = BridgeSet(big.config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(big.parameters(), same.parameters(), strict=True))
    assert not torch.equal(big.encoders[0].weight, BridgeSet(big.config).encoders[0].weight)
    assert not torch.equal(big.encoders[0].weight, big.encoders[1].weight)
    assert big.encoders[0].weight.std().item() == pytest.approx(0.3 / 200**0.5, rel=0.02)
    assert big.decoders[1].weight.std().item() == pytest.approx(300**-0.5, rel=0.02)
    assert all((x.bias == 0).all() for x in [*big.encoders, *big.decoders])
    assert (big.mean == 0).all() and (big.scale == 1).all()


def test_a_subset_of_sites_is_addressed_by_site(dense, ids):
    bridges = BridgeSet(shape(sites=(1, 4)))
    residuals = dense.residuals(ids)
    bridges.calibrate(residuals)
    assert torch.allclose(bridges.mean[1], residuals[4].mean((0, 1)))
    assert bridges.encode(4, residuals[4]).shape == (5, 6, 20) and len(bridges.decoders) == 2
    for call in (bridges.encode, bridges.decode, bridges.transport):
        with pytest.raises(ValueError, match=r"site 2 is not bridged; .* model are \[1, 4\]"):
            call(2, residuals[2])


def test_saving_and_loading_is_the_identity(bridges, tmp_path):
    bridges.dense_fingerprint, bridges.sparse_fingerprint = "one", None
    bridges.save(tmp_path / "b")
    again = BridgeSet.load(tmp_path / "b")
    assert again.config == bridges.config
    assert (again.dense_fingerprint, again.sparse_fingerprint) == ("one", None)
    assert again.state_dict().keys() == bridges.state_dict().keys()
    for name, value in bridges.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    bridges.save(tmp_path / "b")  # over the old one
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_holds_something_else_is_refused(bridges, tmp_path):
    with pytest.raises(ValueError, match="state.json cannot be read"):
        BridgeSet.load(tmp_path / "absent")
    bridges.save(tmp_path / "b")
    path = tmp_path / "b" / "state.json"
    state = json.loads(path.read_text())
    state["config"]["sharp"] = 1
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"BridgeConfig: unknown keys \['sharp'\]"):
        BridgeSet.load(tmp_path / "b")
    (tmp_path / "b" / "bridges.safetensors").unlink()
    with pytest.raises(ValueError, match="bridges.safetensors cannot be read"):
        BridgeSet.load(tmp_path / "b")


def test_bridges_accept_the_models_they_fit_and_no_others(bridges, dense, sparse):
    bridges.check(dense, sparse)
    bridges.dense_fingerprint = dense.fingerprint
    bridges.sparse_fingerprint = sparse.fingerprint()
    bridges.check(dense, sparse)
    with pytest.raises(ValueError, match="dense model has 5 sites of width 13, but .* width 12"):
        bridges.check(stub(d_resid=13), sparse)
    with pytest.raises(ValueError, match="the sparse model has 7 sites of width 20, but"):
        bridges.check(dense, stub(n_sites=7, d_resid=20))
    with pytest.raises(ValueError, match="the dense model's weights .* load that dense model"):
        bridges.check(stub(mark="other"), sparse)
    with torch.no_grad():
        sparse.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the sparse model's weights .* load that sparse model"):
        bridges.check(dense, sparse)


def test_a_model_without_a_fingerprint_can_be_bridged_as_long_as_none_is_expected(sparse):
    bare = stub()
    del bare.fingerprint
    BridgeSet(shape()).check(bare, sparse)


def test_a_fingerprint_may_be_a_property_or_a_method(dense, sparse):
    assert fingerprint(dense) == dense.fingerprint
    assert fingerprint(sparse) == sparse.fingerprint()


def test_between_takes_the_shape_from_the_models(dense, sparse):
    config = BridgeConfig.between(dense, sparse, k=3, sites=(0, 2))
    assert config == shape(k=3, sites=(0, 2))
    assert shape().sites == shape().sparse_sites == (0, 1, 2, 3, 4)
    other = BridgeConfig.between(dense, stub(n_sites=9, d_resid=20), k=7)
    assert other == shape(n_sparse_sites=9, sites=(0, 1, 2, 3, 4), sparse_sites=(0, 2, 4, 6, 8))


def test_a_map_may_be_a_dict_or_two_tuples_or_the_even_one_in_part(dense):
    deep = stub(n_sites=9, d_resid=12)
    given = {0: 0, 4: 2, 8: 4}
    config = BridgeConfig.between(deep, dense, k=3, sites=given)
    assert config.pairs == given
    assert (config.sites, config.sparse_sites) == ((0, 4, 8), (0, 2, 4))
    assert config == BridgeConfig.between(deep, dense, k=3, sites=dict(reversed(given.items())))
    assert config == BridgeConfig.between(deep, dense, 3, (0, 4, 8), (0, 2, 4))
    assert config == BridgeConfig.between(deep, dense, k=3, sites=(0, 4, 8))  # of the even map
    assert BridgeConfig.between(deep, dense, k=3, sites={3: 2}).pairs == {3: 2}
    with pytest.raises(
        ValueError, match=r"dense sites \[3\] have no partner in the even map \{0: 0"
    ):
        BridgeConfig.between(deep, dense, k=3, sites=(0, 3))
    with pytest.raises(ValueError, match="names the sparse sites already"):
        BridgeConfig.between(deep, dense, k=3, sites=given, sparse_sites=(0, 1, 2))


def test_sites_and_widths_of_any_library_are_kept_as_plain_ints(
    dense, sparse, tmp_path, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks
    want = BridgeConfig.between(dense, sparse, k=3, sites={0: 0, 2: 1, 4: 4})
    numpy_map = dict(zip(np.array([4, 0, 2]), torch.tensor([4, 0, 1]), strict=True))
    got = BridgeConfig.between(dense, sparse, k=np.int64(3), sites=numpy_map)
    assert got == want and {type(s) for s in (*got.sites, *got.sparse_sites, got.k)} == {int}
    sites = BridgeConfig.between(dense, sparse, k=3, sites=torch.tensor([0, 4])).pairs
    assert sites == {0: 0, 4: 4}  # of the even map
    BridgeSet(got).save(tmp_path)
    assert BridgeSet.load(tmp_path).config == want
    for wrong in ({"0": 0}, {0.0: 0}, {0: 1.5}):
        with pytest.raises(ValueError, match=r"BridgeConfig.s.*must be whole numbers"):
            BridgeConfig.between(dense, sparse, k=3, sites=wrong)
    with pytest.raises(ValueError, match=r"BridgeConfig.k: \(2.5,\) must be whole numbers"):
        shape(k=2.5)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(k=0), r"k=0 is outside 1\.\.d_sparse=20"),
        (dict(k=21), "k=21"),
        (dict(n_dense_sites=0), "n_dense_sites=0 must be at least 1"),
        (dict(n_sparse_sites=0), "n_sparse_sites=0 must be at least 1"),
        (dict(d_dense=0), "d_dense=0"),
        (dict(sites=(3, 1)), r"sites=\(3, 1\) must ascend within 0\.\.4"),
        (dict(sites=(1, 1)), "each site once"),
        (dict(sites=(0, 5)), "sites"),
        (dict(sites=(-1, 2)), "sites"),
        (
            dict(sites=(0, 2), sparse_sites=(0, 5)),
            r"sparse_sites=\(0, 5\) must ascend within 0\.\.4",
        ),
        (dict(sites=(0, 2), sparse_sites=(1, 1)), "sparse_sites.* each site once"),
        (dict(sites=(0, 2), sparse_sites=(3, 1)), "sparse_sites.* must ascend"),
        (dict(sites=(0, 2), sparse_sites=(1,)), r"2 sites \(0, 2\) but 1 sparse_sites"),
        (dict(sparse_sites=(1,)), r"BridgeConfig.sites=\(\) must ascend"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        shape(**fields)


def test_a_config_survives_json():
    from dataclasses import asdict

    config = shape(n_dense_sites=9, sites=(1, 6), sparse_sites=(0, 3))
    assert BridgeConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
