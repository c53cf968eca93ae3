"""The products of a run are chosen once, named in its checkpoints, and kept when it resumes."""

import shutil

import jaxtyping
import pytest
import torch

from sparse import PretrainConfig, SparseGPT, SparseGPTConfig, SparsityConfig, TrainConfig, pretrain
from sparse.ops.csr_linear import csr_products, fastest_products
from sparse.storage.checkpoint import read_folder, steps_saved, write_folder
from sparse.text.batches import Batches
from sparse.training import run_state
from sparse.training.run_state import with_products

needs_mkl = pytest.mark.skipif(fastest_products() != "mkl", reason="this torch has no MKL")
PRODUCTS = ["scipy", "dense", pytest.param("mkl", marks=needs_mkl)]
OTHER = {"scipy": "mkl", "mkl": "scipy", "dense": "scipy"}
STEPS, CUT = 8, 4


@pytest.fixture(autouse=True)
def small_matrices_count(monkeypatch):
    monkeypatch.setattr("sparse.training.pretrain.WORTH_REBUILDING", 0)


@pytest.fixture
def fastest(monkeypatch):
    """Sets which products a new run takes, as another machine would."""
    return lambda name: monkeypatch.setattr(run_state, "fastest_products", lambda: name)


def train(folder, products=None):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = SparseGPT(SparseGPTConfig(**shape, head_dim=16, intermediate_size=128))
    config = PretrainConfig(
        train=TrainConfig(
            steps=STEPS, folder=str(folder), log_every=1, checkpoint_every=CUT, products=products
        ),
        sparsity=SparsityConfig(density=0.1, embedding_density=0.1, floor=1, anneal_end=0.1),
    )
    pretrain(model, Batches(torch.randint(0, 50, (64, 40)), 32), config)
    with csr_products(model) as names:
        assert len(names) == 5, "the trained weights are sparse enough"
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def newest(folder):
    return steps_saved(folder / "checkpoints")[-1]


def named(folder):
    return read_folder(newest(folder))[1]["identity"]["products"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_resumed_run_keeps_its_products_where_others_are_fastest_bit_for_bit(
    tmp_path, fastest, products
):
    fastest(products)
    whole = train(tmp_path / "cut")
    assert named(tmp_path / "cut") == products
    shutil.rmtree(newest(tmp_path / "cut"))
    fastest(OTHER[products])
    again = train(tmp_path / "cut")
    assert named(tmp_path / "cut") == products and same(again, whole)


@pytest.mark.parametrize("products", PRODUCTS)
def test_control_the_other_products_would_have_given_other_bits(tmp_path, fastest, products):
    if OTHER[products] == "mkl" and fastest_products() != "mkl":
        pytest.skip("this torch has no MKL")
    fastest(OTHER[products])
    other = train(tmp_path / "other")
    assert named(tmp_path / "other") == OTHER[products]
    given = train(tmp_path / "given", products=products)
    assert named(tmp_path / "given") == products and not same(other, given)
    for name, want in other.items():
        assert torch.allclose(given[name], want, rtol=1e-2, atol=1e-4), name


def test_a_checkpoint_older_than_the_choice_goes_on_with_scipy(tmp_path, fastest):
    whole = train(tmp_path / "old", products="scipy")
    shutil.rmtree(newest(tmp_path / "old"))
    tensors, state = read_folder(newest(tmp_path / "old"), "module", "adam")
    del state["identity"]["products"]
    write_folder(newest(tmp_path / "old"), tensors, state)
    fastest("dense")
    assert with_products(TrainConfig(steps=1, folder=str(tmp_path / "new"))).products == "dense"
    assert same(train(tmp_path / "old"), whole) and named(tmp_path / "old") == "scipy"


def test_other_products_than_those_of_the_checkpoint_are_refused(tmp_path, monkeypatch):
    train(tmp_path, products="scipy")
    shutil.rmtree(newest(tmp_path))
    with pytest.raises(ValueError, match="products: scipy there, dense here.; give the settings"):
        train(tmp_path, products="dense")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks
    with pytest.raises(ValueError, match="products='fast' must be one of"):
        TrainConfig(steps=1, folder="unused", products="fast")  # pyright: ignore
